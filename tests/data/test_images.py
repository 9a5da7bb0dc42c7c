"""Image folders: what counts as an image, what is left out with which reason, and how formats are opened."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from beitv2_fast.data import check as check_module
from beitv2_fast.data.check import check_images
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageList, open_image
from beitv2_fast.distributed import World
from beitv2_fast.errors import DataError


def save(path, size=(40, 32), mode="RGB", color=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color or 0).save(path, **options)


def noise(path, size=(64, 64), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.frombytes("RGB", size, bytes(data.flatten().tolist())).save(path, **options)


def check(images, cache=None, min_size=8, workers=0, **options):
    return check_images(images, cache=cache, min_size=min_size, workers=workers, **options)


def entries(cache):
    """What a cache knows, by path."""
    return {path: entry for path, *entry in map(json.loads, cache.read_text().splitlines()[1:])}


def test_first_level_folders_are_the_classes_and_paths_are_sorted(tmp_path):
    for name in ("dog/2.png", "cat/deep/1.JPG", "cat/0.png", "bird/x.webp", "cat/.hidden.png", "dog/notes.txt"):
        save(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("")
    images = find_images(tmp_path)
    assert images.paths == ["bird/x.webp", "cat/0.png", "cat/deep/1.JPG", "dog/2.png"]
    assert (images.classes, images.labels) == (["bird", "cat", "dog"], [0, 1, 1, 2])


def test_images_beside_the_folders_mean_that_there_are_no_classes(tmp_path):
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "b.png")
    images = find_images(tmp_path)
    assert (images.paths, images.labels, images.classes) == (["b.png", "cat/a.png"], None, [])


def test_links_are_followed_inside_the_folder_only(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    save(outside / "secret.png")
    save(root / "a" / "own.png")
    (root / "a" / "inside.png").symlink_to(root / "a" / "own.png")
    (root / "a" / "leak.png").symlink_to(outside / "secret.png")
    (root / "b").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    images = find_images(root)
    assert images.paths == ["a/inside.png", "a/own.png"]
    assert images.classes == ["a"]
    assert {path for path, _ in images.rejected} == {"a/leak.png", "b", "a/loop"}


def test_a_split_that_leads_out_of_the_folder_is_refused(tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    save(tmp_path / "root" / "b.png")
    (tmp_path / "root" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leads out"):
        find_images(tmp_path / "root", "train")
    with pytest.raises(DataError, match="not the name of a folder"):
        find_images(tmp_path / "root", "../elsewhere")


def test_missing_empty_and_file_roots_are_explained(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        find_images(tmp_path / "empty")
    save(tmp_path / "file.png")
    with pytest.raises(DataError, match="is a file"):
        find_images(tmp_path / "file.png")


@pytest.fixture
def mixed(tmp_path):
    """A folder with two good images, one in each class, and one of every kind of bad file."""
    root = tmp_path / "mixed"
    noise(root / "a" / "good.png")
    noise(root / "b" / "good.jpg")
    for name in ("b/truncated.jpg", "b/truncated.png"):
        noise(root / name)
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "text.jpg").write_text("this is no image")
    save(root / "b" / "small.png", (7, 100))
    save(root / "b" / "float.tif", mode="F")
    (root / "b" / "dangling.png").symlink_to(root / "b" / "gone.png")
    (root / "a" / "leak.png").symlink_to(tmp_path / "outside.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_left_out_with_a_reason_and_labels_stay_with_their_images(mixed, workers):
    images = check(find_images(mixed), workers=workers)
    assert (images.paths, images.labels) == (["a/good.png", "b/good.jpg"], [0, 1])
    reasons = dict(images.rejected)
    expected = {
        "a/empty.png": "empty",
        "a/text.jpg": "not an image",
        "a/leak.png": "leads out",
        "b/dangling.png": "gone",
        "b/float.tif": "floating-point",
        "b/small.png": "too small: 7x100 pixels, needed 8x8",
        "b/truncated.jpg": "truncated",
        "b/truncated.png": "truncated",
    }
    assert reasons.keys() == expected.keys()
    for path, words in expected.items():
        assert words in reasons[path], path


def test_decompression_bombs_are_left_out(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", (200, 100))
    save(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150 * 100)
    images = check(find_images(tmp_path))
    assert images.paths == ["good.png"]
    assert images.rejected == [("bomb.png", "more than 15,000 pixels")]


def test_bad_files_are_listed_on_the_log_once_ten_and_the_count(tmp_path, caplog):
    save(tmp_path / "good.png")
    for i in range(12):
        (tmp_path / f"bad{i:02}.png").write_bytes(b"")
    caplog.set_level(logging.WARNING)
    cache = tmp_path / "run" / "images.jsonl"
    check(find_images(tmp_path), cache)
    (record,) = caplog.records
    lines = record.getMessage().splitlines()
    assert "12 of 13 files" in lines[0] and "bad00.png: an empty file" in lines[1]
    assert lines[-1].strip() == "... and 2 more" and len(lines) == 12
    caplog.clear()
    assert check(find_images(tmp_path), cache).paths == ["good.png"]
    assert not caplog.records


def test_a_class_that_loses_all_of_its_images_is_named(tmp_path, caplog):
    for name in ("a/good.png", "b/good.png", "c/good.png"):
        save(tmp_path / name)
    for i in range(12):
        (tmp_path / "b" / f"{i}.png").write_bytes(b"")
    check(find_images(tmp_path))
    assert "no image is left" not in caplog.text
    (tmp_path / "b" / "good.png").write_bytes(b"")
    images = check(find_images(tmp_path))
    assert (images.classes, images.labels) == (["a", "b", "c"], [0, 2])
    assert "so that no image is left of the classes b" in caplog.text


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    save(tmp_path / "tiny.png", (4, 4))
    with pytest.raises(DataError, match=r"None of the 1 files(?s:.)*tiny.png: too small(?s:.)*pass another folder"):
        check(find_images(tmp_path))


def test_a_restart_decodes_only_what_has_changed(tmp_path, monkeypatch):
    root, cache = tmp_path / "images", tmp_path / "run" / "images.jsonl"
    for name in ("a.png", "b.png", "c.png"):
        save(root / name)
    decoded = []
    opened = ImageList.open
    monkeypatch.setattr(ImageList, "open", lambda images, i: decoded.append(images.paths[i]) or opened(images, i))
    first = check(find_images(root), cache)
    assert decoded == ["a.png", "b.png", "c.png"]
    decoded.clear()
    assert check(find_images(root), cache) == first
    assert decoded == []
    save(root / "b.png", (100, 100))
    save(root / "d.png")
    os.utime(root / "c.png", ns=(1, 1))
    assert check(find_images(root), cache).paths == ["a.png", "b.png", "c.png", "d.png"]
    assert decoded == ["b.png", "c.png", "d.png"]
    assert check(find_images(root), cache, min_size=50).paths == ["b.png"]


def test_an_interrupted_check_goes_on_where_it_was(tmp_path, monkeypatch):
    root, cache = tmp_path / "images", tmp_path / "images.jsonl"
    for i in range(40):
        save(root / f"{i:02}.png")

    opened = ImageList.open

    def interrupted(images, i):
        if images.paths[i] == "35.png":
            raise KeyboardInterrupt
        return opened(images, i)

    monkeypatch.setattr(check_module, "IMAGES_PER_ROUND", 16)
    monkeypatch.setattr(ImageList, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(find_images(root), cache)
    done = len(entries(cache))
    decoded = []
    monkeypatch.setattr(ImageList, "open", lambda images, i: decoded.append(images.paths[i]) or opened(images, i))
    assert len(check(find_images(root), cache)) == 40
    assert 0 < done == 40 - len(decoded)


def test_a_line_that_a_kill_cut_short_costs_only_its_own_image(tmp_path, monkeypatch):
    root, cache = tmp_path / "images", tmp_path / "images.jsonl"
    for name in ("a.png", "b.png", "c.png"):
        save(root / name)
    check(find_images(root), cache)
    cache.write_bytes(cache.read_bytes()[:-5])
    decoded, opened = [], ImageList.open
    monkeypatch.setattr(ImageList, "open", lambda images, i: decoded.append(images.paths[i]) or opened(images, i))
    assert len(check(find_images(root), cache)) == len(check(find_images(root), cache)) == 3
    assert decoded == ["c.png"]


@dataclasses.dataclass(frozen=True)
class Rank(World):
    """A rank that is a thread: what all of them have said lies in ``said``."""

    said: list = dataclasses.field(default_factory=list)
    together: threading.Barrier | None = None

    def gather_objects(self, thing):
        self.said[self.rank] = thing
        self.together.wait()
        found = list(self.said)
        self.together.wait()
        return found


def test_ranks_share_the_check_and_all_have_its_result_under_one_progress_bar(tmp_path, monkeypatch):
    root, cache, ranks = tmp_path / "images", tmp_path / "images.jsonl", 3
    for i in range(50):
        save(root / f"{i:02}.png", (40, 32 + i))
    (root / "31.png").write_bytes(b"junk")
    decoded, bars, opened = defaultdict(list), [], ImageList.open

    def record(images, i):
        decoded[threading.current_thread().name].append(i)
        return opened(images, i)

    class Bar:
        def __init__(self, total, disable, **_):
            self.total, self.disable, self.count = total, disable, 0
            bars.append(self)

        __enter__, __exit__ = lambda self: self, lambda self, *_: None

        def update(self, count):
            self.count += count

    monkeypatch.setattr(ImageList, "open", record)
    monkeypatch.setattr(check_module, "IMAGES_PER_ROUND", 8)
    monkeypatch.setattr(check_module, "require", lambda *_: SimpleNamespace(tqdm=Bar))
    common = [None] * ranks, threading.Barrier(ranks, timeout=60)
    worlds = [Rank(rank, ranks, torch.device("cpu"), *common) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(lambda world: check(find_images(root), cache, world=world), worlds))
    assert sorted(map(len, decoded.values())) == [16, 17, 17]
    assert sorted(itertools.chain(*decoded.values())) == list(range(50))
    assert found[0] == found[1] == found[2] == check(find_images(root), cache)
    assert len(found[0]) == 49 and found[0].rejected == [("31.png", "not an image")]
    assert found[0].sizes == [(40, 32 + i) for i in range(50) if i != 31]
    assert len(entries(cache)) == len(cache.read_text().splitlines()) - 1 == 50
    assert [(bar.total, bar.count) for bar in bars if not bar.disable] == [(50, 50)] * 2  # the ranks', and the last one


def test_a_check_of_headers_finds_what_they_show_and_a_check_of_pixels_looks_again(mixed, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.png"):
        save(mixed / "a" / name, (40, 20), exif=exif)
    noise(mixed / "a" / "long.jpg", (300, 200), comment=b"x" * 60_000)  # the size lies behind the bytes read first
    cache = tmp_path / "images.jsonl"
    monkeypatch.setattr(ImageList, "open", lambda *_: pytest.fail("decoded"))
    headers = check(find_images(mixed), cache, how="header")
    assert [path for path in headers.paths if "truncated" not in path and path != "b/float.tif"] == [
        "a/good.png", "a/long.jpg", "a/turned.jpg", "a/turned.png", "b/good.jpg",
    ]  # fmt: skip
    assert {"b/truncated.jpg", "b/truncated.png", "b/float.tif"} < set(headers.paths)
    assert dict(zip(headers.paths, headers.sizes, strict=True))["a/long.jpg"] == (300, 200)
    monkeypatch.undo()
    decoded = check(find_images(mixed), cache)
    sizes = dict(zip(headers.paths, headers.sizes, strict=True))
    assert decoded.sizes == [sizes[path] for path in decoded.paths] and len(decoded.paths) == 5
    (mixed / "b" / "dangling.png").unlink()  # a file that is not there is looked for every time
    monkeypatch.setattr(ImageList, "read", lambda *_: pytest.fail("read again"))
    assert check(find_images(mixed), cache, how="header").paths == decoded.paths


def test_a_check_of_headers_reads_only_the_beginning_of_a_file(tmp_path, monkeypatch):
    noise(tmp_path / "large.jpg", (600, 400))
    assert (tmp_path / "large.jpg").stat().st_size > 100_000
    lengths, read = [], ImageList.read
    monkeypatch.setattr(ImageList, "read", lambda *a: lengths.append(len(data := read(*a))) or data)
    assert check(find_images(tmp_path), how="header").sizes == [(600, 400)]
    assert lengths == [2**14]


def test_no_check_opens_nothing_and_keeps_every_image(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageList, "read", lambda *_: pytest.fail("read"))
    images = find_images(mixed)
    assert check(images, tmp_path / "images.jsonl", how="none") == images
    assert images.sizes is None and not (tmp_path / "images.jsonl").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 0, "root": ""}\n["a.png"]'])
def test_a_damaged_or_foreign_cache_is_made_anew(tmp_path, content):
    root, cache = tmp_path / "images", tmp_path / "images.jsonl"
    save(root / "a.png")
    cache.write_text(content)
    assert check(find_images(root), cache).paths == ["a.png"]
    assert list(entries(cache)) == ["a.png"]


def test_the_fingerprint_tells_lists_apart(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    first = find_images(tmp_path)
    assert find_images(tmp_path).fingerprint == first.fingerprint
    save(tmp_path / "b" / "2.png")
    assert find_images(tmp_path).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "mode", "color", "expected"),
    [
        ("rgb.png", "RGB", (10, 200, 30), ("RGB", (10, 200, 30))),
        ("gray.png", "L", 77, ("L", 77)),
        ("gray_alpha.png", "LA", (77, 10), ("L", 77)),
        ("bilevel.png", "1", 1, ("L", 255)),
        ("gray16.png", "I;16", 257 * 100, ("L", 100)),
        ("gray16_rounds.png", "I;16", 257 * 100 + 200, ("L", 101)),
        ("white16.png", "I;16", 65535, ("L", 255)),
        ("gray16.tif", "I;16", 257 * 100, ("L", 100)),
        ("gray32.tif", "I", 257 * 100, ("L", 100)),
        ("alpha.png", "RGBA", (10, 200, 30, 128), ("RGB", (10, 200, 30))),
        ("cmyk.tif", "CMYK", (255, 0, 0, 0), ("RGB", (0, 255, 255))),
    ],
)
def test_every_mode_opens_as_8_bit_rgb_or_gray(tmp_path, name, mode, color, expected):
    save(tmp_path / name, mode=mode, color=color)
    image = open_image(tmp_path / name)
    assert (image.mode, image.getpixel((3, 3))) == expected


def test_palette_images_open_in_their_colors(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 250, 120, 5])
    for name in ("palette.png", "palette.gif"):
        image.save(tmp_path / name)
        assert open_image(tmp_path / name).getpixel((0, 0)) == (250, 120, 5)


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png"])
def test_exif_orientation_is_applied(tmp_path, name):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left becomes the top
    image.save(tmp_path / name, exif=exif)
    upright = open_image(tmp_path / name)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 250 and upright.getpixel((10, 35))[0] < 5


def test_32_bit_pixels_beyond_16_bits_are_refused(tmp_path):
    save(tmp_path / "deep.tif", mode="I", color=70000)
    with pytest.raises(ValueError, match="70000"):
        open_image(tmp_path / "deep.tif")


def test_the_decoding_processes_end_when_the_command_is_killed(tmp_path):
    save(tmp_path / "a.png")
    program = (
        "import os, signal, sys, pathlib\n"
        "from beitv2_fast.data.check import check_images\n"
        "from beitv2_fast.data.find import find_images\n"
        "from beitv2_fast.data.images import ImageList\n"
        "def stuck(images, i):\n"
        "    print('decoding', flush=True)\n"
        "    signal.pause()\n"
        "ImageList.open = stuck\n"
        "check_images(find_images(sys.argv[1]), cache=None, min_size=1, workers=2)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "decoding\n"
        process.kill()
        assert process.stdout.read() == ""  # the end of the output: nobody holds it any more
