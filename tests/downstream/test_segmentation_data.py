"""Images and masks: every layout is found, every mask that does not fit is named, both are cut alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import DataError
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.sampler import EpochSampler
from beitv2_fast.downstream.segmentation.masks import (
    IGNORED,
    MaskList,
    find_masks,
    label_table,
    open_mask,
    training_folders,
    validation_folders,
)
from beitv2_fast.downstream.segmentation.views import SegmentationFolder, TrainView, scaled_size

PLAIN = dict(scale_range=(1.0, 1.0), distortion=False)


def write_pairs(images: Path, masks: Path, names=("a", "b"), size=(12, 10), suffix="jpg") -> None:
    for name in names:
        for folder, suffix_, colour in ((images, suffix, (9, 9, 9)), (masks, "png", 1)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            mode = "RGB" if folder == images else "L"
            Image.new(mode, size, colour).save(folder / f"{name}.{suffix_}")


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
def test_grey_palette_and_16_bit_masks_hold_the_same_labels(tmp_path, mode):
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
    elif kind == "colour":
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
        ("colour", "b.png: a colour image"),
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


def test_a_scaled_image_keeps_its_shape_and_its_longer_side_within_four_times_the_base():
    assert scaled_size((512, 683), 512) == (512, 683)
    assert scaled_size((683, 512), 256, 0.5) == (171, 128)
    assert scaled_size((100, 1000), 512) == (205, 2048)


def quadrants(size: int = 64) -> tuple[Image.Image, np.ndarray]:
    """A picture whose grey value is 60 times the label, four labels."""
    labels = np.kron(np.array([[0, 1], [2, 3]], np.uint8), np.ones((size // 2, size // 2), np.uint8))
    return Image.fromarray(60 * labels), labels


@pytest.mark.parametrize("scale_range", [(1.0, 1.0), (0.5, 2.0)])
def test_image_and_mask_are_scaled_cut_and_flipped_together(scale_range):
    view, seen, sides = TrainView(32, 64, scale_range, 1.0, False), set(), set()
    for key in range(40):
        image, mask = view(*quadrants(), key)
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and image.dtype == mask.dtype == torch.uint8
        wrong = (image[0].int() - 60 * mask.int()).abs() > 1
        assert wrong.float().mean() < 0.2  # the edges between the labels alone
        seen.update(mask.unique().tolist())
        sides.add((mask[0, 0].item() % 2) > (mask[0, -1].item() % 2))
    assert seen == {0, 1, 2, 3} and sides == {True, False}  # both directions: it is flipped


def test_labels_stay_labels_when_a_mask_is_resized():
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:] = 200
    _, mask = TrainView(32, 64, (0.7, 0.7), 1.0, False)(Image.fromarray(labels), labels, 1)
    assert set(mask.unique().tolist()) <= {0, 200}


def test_what_is_missing_to_a_full_crop_is_ignored_and_mean_grey():
    image, mask = TrainView(32, 16, **PLAIN)(Image.new("RGB", (24, 16), (1, 2, 3)), np.ones((16, 24), np.uint8), 0)
    assert (mask[:16, :24] == 1).all() and (mask[16:] == IGNORED).all() and (mask[:, 24:] == IGNORED).all()
    assert image[:, 0, 0].tolist() == [1, 2, 3] and image[:, 31, 31].tolist() == [124, 116, 104]


def test_a_crop_of_one_class_is_drawn_again():
    labels = np.zeros((64, 64), np.uint8)
    labels[:20, :20] = 1
    labels[40:] = IGNORED  # counts for nothing

    def shares(limit: float) -> np.ndarray:
        view = TrainView(24, 64, max_class_share=limit, **PLAIN)
        masks = [view(Image.fromarray(labels), labels, key)[1] for key in range(60)]
        return np.array([(m == 0).sum().item() / max((m != IGNORED).sum().item(), 1) for m in masks])

    assert (shares(0.75) < 0.75).mean() > 2 * (shares(1.0) < 0.75).mean() > 0


def test_colours_change_and_the_mask_does_not():
    labels = np.zeros((32, 32), np.uint8)
    image = Image.new("RGB", (32, 32), (120, 90, 60))
    pairs = [TrainView(32, 32, (1.0, 1.0))(image, labels, key) for key in range(40)]
    colours = {tuple(picture[:, 0, 0].tolist()) for picture, _ in pairs}
    assert len(colours) > 20 and (120, 90, 60) in colours and all((mask == 0).all() for _, mask in pairs)


def folder(tmp_path: Path, **values) -> SegmentationFolder:
    generator = np.random.default_rng(0)
    for name in "abcdef":
        labels = generator.integers(0, 3, (40, 48)).astype(np.uint8)
        for kind, pixels in (("images", np.stack([80 * labels] * 3, 2)), ("masks", labels)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{name}.png")
    view = values.pop("view", TrainView(32, 40))
    return SegmentationFolder(
        find_images(tmp_path / "images"), found(tmp_path), label_table((2,), False), view, **values
    )


def test_a_crop_follows_from_seed_epoch_and_index_alone(tmp_path):
    plain, kept = folder(tmp_path), folder(tmp_path, in_memory=True)
    keys = [(0, 1), (3, 1), (0, 4)]
    torch.manual_seed(5)
    state, batch = torch.get_rng_state(), plain.__getitems__(keys)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    for other in (kept.__getitems__(keys), {n: torch.cat([plain.__getitems__([k])[n] for k in keys]) for n in batch}):
        assert all(torch.equal(batch[name], other[name]) for name in batch)
    assert not torch.equal(batch["image"][0], batch["image"][1])
    other_seed = folder(tmp_path, seed=1).__getitems__(keys)
    assert not torch.equal(batch["image"], other_seed["image"])
    assert set(batch["mask"].unique().tolist()) <= {0, 1, IGNORED}


def test_workers_and_ranks_change_no_pixel(tmp_path):
    data = folder(tmp_path)

    def batches(**values) -> list[dict[str, torch.Tensor]]:
        return list(train_loader(data, total_steps=3, **values))

    one, worker = batches(batch_size=4), batches(batch_size=4, workers=1)
    ranks = [batches(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    both = [{n: torch.cat([a[n], b[n]]) for n in a} for a, b in zip(*ranks, strict=True)]
    for step in range(3):
        for name in ("image", "mask", "index"):
            assert torch.equal(one[step][name], worker[step][name]) and torch.equal(one[step][name], both[step][name])
    assert len(EpochSampler(len(data), batch_size=4, total_steps=3)) == 3


def test_a_mask_that_vanishes_after_the_check_is_named(tmp_path):
    data = folder(tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png could be read when it was checked"):
        data.__getitems__([(0, 0)])


def test_the_cache_names_every_file(tmp_path):
    folder(tmp_path)
    assert sorted(json.loads((tmp_path / "cache.json").read_text())["files"]) == [f"{n}.png" for n in "abcdef"]
