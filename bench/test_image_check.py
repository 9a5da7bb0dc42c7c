"""What the check of all images before a training costs: processor time per image, that of all processes."""

from __future__ import annotations

import pytest

from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from bench.harness import machine
from bench.test_loading import folder, processor_seconds  # noqa: F401

TIMES = 16  # each file


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["decode", "header", "known"])
def test_microseconds_an_image(request, folder, tmp_path, how, workers):  # noqa: F811
    """known: all of them, by the file that an earlier check left."""
    images, cache = find_images(folder), tmp_path / "images.jsonl"
    if how == "known":
        check_images(images, cache=cache, min_size=16, workers=0)
    many = images.subset(list(range(len(images))) * TIMES)
    options = {"cache": cache} if how == "known" else {"cache": None, "how": how}
    started = processor_seconds()
    assert len(check_images(many, min_size=16, workers=workers, **options)) == len(many)
    cost = (processor_seconds() - started) / len(many) * 1e6
    write = request.config.get_terminal_writer().line
    write(f"\ncheck of 500x375 JPEGs of 100 kB, {how}, {workers} processes: {cost:.0f} us per image ({machine()})")
