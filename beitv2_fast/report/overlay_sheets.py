"""A segmentation's pictures for the report, as its evaluation drew them: image | truth | prediction."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

ROWS, GAP = 3, 8
CAPTION = (
    "Photograph, truth and prediction of images that the training has not seen. Every class has a colour; what counts "
    "for nothing stays dark."
)


def overlay_sheet(run: Path) -> Image.Image | None:
    """Some of the pictures in ``run``/overlays, one below the other at the width of the first; None without any."""
    files = sorted((run / "overlays").glob("*.png"))
    chosen = [files[i * len(files) // ROWS] for i in range(ROWS)] if len(files) > ROWS else files
    pictures = [Image.open(file).convert("RGB") for file in chosen]
    if not pictures:
        return None
    width = pictures[0].width
    pictures = [p.resize((width, max(round(p.height * width / p.width), 1))) for p in pictures]
    sheet = Image.new("RGB", (width, sum(p.height for p in pictures) + GAP * (len(pictures) - 1)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + GAP
    return sheet
