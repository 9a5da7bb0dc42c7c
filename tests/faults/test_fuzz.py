"""10,000 mutated JPEGs through the check of images: none crashes or hangs it, and what it lets through decodes."""

from __future__ import annotations

import faulthandler
import io
import random
from pathlib import Path

import pytest
from PIL import Image

from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import open_image

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore::UserWarning:PIL")]
COUNT = 10_000
HANG = 600  # seconds; it takes half a minute


def seeds() -> list[bytes]:
    """JPEGs of all kinds that PIL writes: baseline, progressive, gray, CMYK, with restart markers, EXIF."""
    image = Image.effect_noise((48, 40), 60)
    kinds = [
        (image, {}),
        (image.convert("RGB"), {"quality": 30}),
        (image.convert("RGB"), {"progressive": True}),
        (image.convert("CMYK"), {}),
        (image.convert("RGB"), {"subsampling": 0, "restart_marker_blocks": 2}),
        (image.convert("RGB"), {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    ]
    files = []
    for picture, options in kinds:
        file = io.BytesIO()
        picture.save(file, "JPEG", **options)
        files.append(file.getvalue())
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, cut, doubled or swapped pieces, and lengths and sizes of the headers set to extremes."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        kind, at = rng.randrange(6), rng.randrange(len(result))
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[at : at + rng.randrange(1, 64)]
        elif kind == 2:
            result[at:at] = result[rng.randrange(len(result)) :][: rng.randrange(1, 64)]
        elif kind == 3:
            del result[at + 1 :]
        elif kind == 4:
            result[at : at + 2] = rng.choice((b"\xff\xff", b"\0\0", b"\xff\xd9", b"\xff\xc2", b"\xff\xda", b"\x7f\xff"))
        else:
            marker = result.find(b"\xff\xc0")  # the frame header: height and width lie 5 bytes behind it
            result[marker + 5 : marker + 9] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\x01\xff\xff"))
        result = result or bytearray(b"\xff")
    return bytes(result)


def fuzz(folder: Path, count: int) -> tuple[int, int]:
    """-> (images let through, files refused)"""
    folder.mkdir()
    rng = random.Random(0)
    originals = seeds()
    for i in range(count):
        (folder / f"{i:05d}.jpg").write_bytes(mutate(originals[i % len(originals)], rng))
    good = check_images(find_images(folder), cache=None, min_size=8, workers=2)
    for path in good.paths:
        assert open_image(folder / path).size >= (8, 8)
    assert all(reason and "\n" not in reason for _, reason in good.rejected)
    return len(good.paths), len(good.rejected)


def test_ten_thousand_mutated_jpegs_neither_crash_nor_hang_the_check(tmp_path):
    faulthandler.dump_traceback_later(HANG, exit=True)
    passed, refused = fuzz(tmp_path / "images", COUNT)
    faulthandler.cancel_dump_traceback_later()
    assert passed + refused == COUNT
    assert passed > 500 and refused > 500  # the mutations are neither too mild nor too wild
