"""Images and masks: every layout is found, every mask that does not fit is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beitv2_fast.data.find import find_images
from beitv2_fast.downstream.segmentation.masks import (
    IGNORED,
    MaskList,
    find_masks,
    label_table,
    open_mask,
    training_folders,
    validation_folders,
)
from beitv2_fast.errors import DataError


def write_pairs(images: Path, masks: Path, names=("a", "b"), size=(12, 10), suffix="jpg") -> None:
    for name in names:
        for folder, suffix_, color in ((images, suffix, (9, 9, 9)), (masks, "png", 1)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            mode = "RGB" if folder == images else "L"
            Image.new(mode, size, color).save(folder / f"{name}.{suffix_}")


def found(root: Path) -> MaskList:
    return find_masks(find_images(root / "images"), root / "masks", root / "cache.json", 0)


LAYOUTS = [
    ("train/images", "train/masks", "val/images", "val/masks"),
    ("train/images", "train/annotations", "test/images", "test/annotations"),
    ("images/training", "annotations/training", "images/validation", "annotations/validation"),
    ("images/train", "labels/train", "images/val", "labels/val"),
    ("Training/images", "Training/masks", "Testing/images", "Testing/masks"),
    ("images/Train", "masks/training", "images/VALID", "masks/val"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_ade20k_and_of_plain_folders_are_found_in_any_usual_spelling(tmp_path, layout):
    for images, masks in (layout[:2], layout[2:]):
        write_pairs(tmp_path / images, tmp_path / masks)
    assert training_folders(tmp_path) == (tmp_path / layout[0], tmp_path / layout[1])
    assert validation_folders(tmp_path, None) == (tmp_path / layout[2], tmp_path / layout[3])


def test_a_folder_without_splits_is_the_training_or_with_val_the_validation(tmp_path):
    write_pairs(tmp_path / "images", tmp_path / "masks")
    pair = (tmp_path / "images", tmp_path / "masks")
    assert training_folders(tmp_path) == pair
    assert validation_folders(tmp_path / "other", tmp_path) == pair
    assert validation_folders(tmp_path, None) is None


def test_folders_without_masks_are_refused_with_what_was_expected(tmp_path):
    (tmp_path / "images" / "validation").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train/images and .*train/masks"):
        training_folders(tmp_path)
    with pytest.raises(DataError, match="--val"):
        validation_folders(tmp_path, tmp_path)


def test_masks_are_matched_by_name_in_subfolders_whatever_their_suffix(tmp_path):
    write_pairs(tmp_path / "images", tmp_path / "masks", ("town/a", "b"))
    masks = found(tmp_path)
    assert masks.paths == ["b.png", "town/a.png"] and masks.sizes == [(12, 10)] * 2 and masks.labels == [[1], [1]]


@pytest.mark.parametrize("mode", ("L", "P", "I;16"))
def test_gray_palette_and_16_bit_masks_hold_the_same_labels(tmp_path, mode):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    image = Image.fromarray(labels.astype(np.uint16) if mode == "I;16" else labels)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([(i * 7) % 256 for i in range(768)])
    image.save(tmp_path / "mask.png")
    assert np.array_equal(open_mask(tmp_path / "mask.png"), labels)


def damage(root: Path, kind: str) -> None:
    file = root / "masks" / "b.png"
    if kind == "missing":
        file.unlink()
    elif kind == "size":
        Image.new("L", (10, 12)).save(file)
    elif kind == "color":
        Image.new("RGB", (12, 10)).save(file)
    elif kind == "large":
        Image.fromarray(np.full((10, 12), 300, np.uint16)).save(file)
    else:
        file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "b.jpg: no mask of this name"),
        ("size", "b.jpg: the mask b.png has 10x12 pixels, the image 12x10"),
        ("color", "b.png: a color image"),
        ("large", "labels from 300 to 300"),
        ("truncated", "b.jpg: the mask b.png: "),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(tmp_path, kind, said):
    write_pairs(tmp_path / "images", tmp_path / "masks", ("a", "b", "c"))
    damage(tmp_path, kind)
    with pytest.raises(DataError, match="1 of 3 images") as error:
        found(tmp_path)
    assert said in str(error.value)


def write_masks(root: Path, labels: np.ndarray, name: str = "a", suffix: str = "png") -> Path:
    """An image and its mask."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", labels.shape[::-1], (9, 9, 9)).save(root / "images" / f"{name}.png")
    Image.fromarray(labels).save(root / "masks" / f"{name}.{suffix}")
    return root


def black_and_white(white: int = 255) -> np.ndarray:
    labels = np.zeros((40, 48), np.uint8)
    labels[10:30, 12:40] = white
    return labels


def test_masks_in_black_and_white_are_refused_with_the_option_that_reads_them(tmp_path):
    masks = found(write_masks(tmp_path, black_and_white()))
    for table in (label_table((), False), label_table((), True), label_table((0,), False)):
        with pytest.raises(DataError, match=r"labels 0 255, of which 255 counts for nothing.*--label-values 0 255"):
            masks.check_foreground(table)
    table = label_table((), False, (0, 255))
    masks.check_foreground(table)
    assert np.array_equal(table[masks.open(0)], black_and_white(1))
    write_masks(tmp_path, black_and_white(3), "b")
    found(tmp_path).check_foreground(label_table((), False))  # two classes, and 255 for what is neither


def test_values_name_the_classes_in_their_order_and_others_are_beyond_them(tmp_path):
    table = label_table((7,), True, (30, 0, 200))
    assert table[[30, 0, 200, 7, 255]].tolist() == [0, 1, 2, IGNORED, IGNORED]
    labels = np.array([[0, 30], [200, 31]], np.uint8)
    with pytest.raises(DataError, match=r"a.png: 31\n"):
        found(write_masks(tmp_path, labels)).check_range(table, 3)


def test_labels_that_are_no_numbers_of_classes_raise_a_doubt(tmp_path):
    labels = black_and_white(128)
    labels[0] = 255
    masks, table = found(write_masks(tmp_path, labels)), label_table((), False)
    assert "labels of 2 of 129 classes: 0 128 255." in masks.doubt(table, 129)
    assert "--label-values 0 128 255" in masks.doubt(table, 129)
    assert masks.doubt(label_table((), False, (0, 128)), 2) is None and masks.doubt(table, 4) is None


def test_masks_that_were_compressed_or_smoothed_are_refused_by_name(tmp_path):
    write_masks(tmp_path / "jpeg", black_and_white(), suffix="jpg")
    with pytest.raises(DataError, match=r"the mask a.jpg: a JPEG picture, which does not keep labels"):
        found(tmp_path / "jpeg")
    turned = Image.fromarray(black_and_white()).rotate(30)
    smooth = np.asarray(turned.resize((480, 400), Image.Resampling.BICUBIC))
    assert len(np.unique(smooth)) > 64
    write_masks(tmp_path / "smooth", smooth)
    with pytest.raises(DataError, match=r"the mask a.png has \d+ labels: shades of a picture"):
        found(tmp_path / "smooth")


def test_a_jpeg_beside_a_mask_is_no_mask_and_two_masks_of_a_name_are_refused(tmp_path):
    write_masks(tmp_path, black_and_white(1))
    write_masks(tmp_path, black_and_white(), suffix="jpg")
    assert found(tmp_path).paths == ["a.png"]
    write_masks(tmp_path, black_and_white(1), suffix="bmp")
    with pytest.raises(DataError, match=r"several masks of this name: a.bmp, a.png"):
        found(tmp_path)


def test_palette_and_bilevel_masks_hold_their_numbers(tmp_path):
    image = Image.fromarray(black_and_white(1))
    image.putpalette([0, 0, 0, 250, 250, 250])
    image.save(tmp_path / "palette.png")
    Image.fromarray(black_and_white()).convert("1").save(tmp_path / "bilevel.png")
    for name in ("palette", "bilevel"):
        assert np.array_equal(open_mask(tmp_path / f"{name}.png"), black_and_white(1))


def test_a_validation_is_no_training(tmp_path):
    write_pairs(tmp_path / "val" / "images", tmp_path / "val" / "masks")
    with pytest.raises(DataError, match="no images with masks for training"):
        training_folders(tmp_path)


def test_a_restart_reads_only_masks_that_have_changed(tmp_path, monkeypatch):
    write_pairs(tmp_path / "images", tmp_path / "masks")
    first = found(tmp_path)
    opened = []
    monkeypatch.setattr(
        "beitv2_fast.downstream.segmentation.masks.open_mask",
        lambda path: opened.append(path.name) or np.ones((10, 12), np.uint8),
    )
    assert found(tmp_path) == first and opened == []
    Image.new("L", (12, 10), 200).save(tmp_path / "masks" / "b.png")
    found(tmp_path)
    assert opened == ["b.png"]
    (tmp_path / "cache.json").write_text("{")
    assert found(tmp_path).paths == first.paths


def test_an_image_turned_by_exif_needs_a_mask_of_its_upright_size(tmp_path):
    write_pairs(tmp_path / "images", tmp_path / "masks")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10, 12)).save(tmp_path / "images" / "b.jpg", exif=exif)
    assert found(tmp_path).sizes == [(12, 10)] * 2


def test_labels_beyond_the_classes_are_refused_by_name_unless_they_are_ignored(tmp_path):
    masks = MaskList(tmp_path, ["a.png", "b.png"], [(1, 1)] * 2, [[0, 1, 255], [2, 11]])
    with pytest.raises(DataError, match=r"1 of 2 masks(.|\n)*b\.png: 11"):
        masks.check_range(label_table((), False), 11)
    masks.check_range(label_table((11,), False), 11)
    assert masks.largest_label(label_table((11,), False)) == 2
    assert masks.largest_label(label_table((), False)) == 11


def test_reducing_the_zero_label_ignores_it_and_moves_the_others_down():
    table = label_table((), True)
    assert table[[0, 1, 150, 254, 255]].tolist() == [IGNORED, 0, 149, 253, IGNORED]
    assert label_table((3,), True)[[2, 3, 4]].tolist() == [1, IGNORED, 3]
    assert label_table((), False).tolist() == list(range(256))
