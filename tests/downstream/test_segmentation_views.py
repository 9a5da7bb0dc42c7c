"""Images and their masks are scaled, cut and flipped together, and every pixel follows from seed, epoch and index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitv2_fast.data.draws import EpochSampler
from beitv2_fast.data.find import find_images
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.downstream.segmentation import views
from beitv2_fast.downstream.segmentation.masks import IGNORED, find_masks, label_table
from beitv2_fast.downstream.segmentation.views import SegmentationFolder, TrainView, scaled_size
from beitv2_fast.errors import DataError

PLAIN = dict(scale_range=(1.0, 1.0), distortion=False)


def test_a_scaled_image_keeps_its_shape_and_its_longer_side_within_four_times_the_base():
    assert scaled_size((512, 683), 512) == (512, 683)
    assert scaled_size((683, 512), 256, 0.5) == (171, 128)
    assert scaled_size((100, 1000), 512) == (205, 2048)


def quadrants(size: int = 64) -> tuple[Image.Image, np.ndarray]:
    """A picture whose gray value is 60 times the label, four labels."""
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


def test_what_is_missing_to_a_full_crop_is_ignored_and_mean_gray():
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


def test_colors_change_and_the_mask_does_not():
    labels = np.zeros((32, 32), np.uint8)
    image = Image.new("RGB", (32, 32), (120, 90, 60))
    pairs = [TrainView(32, 32, (1.0, 1.0))(image, labels, key) for key in range(40)]
    colors = {tuple(picture[:, 0, 0].tolist()) for picture, _ in pairs}
    assert len(colors) > 20 and (120, 90, 60) in colors and all((mask == 0).all() for _, mask in pairs)


def folder(tmp_path: Path, **values) -> SegmentationFolder:
    generator = np.random.default_rng(0)
    for name in "abcdef":
        labels = generator.integers(0, 3, (40, 48)).astype(np.uint8)
        for kind, pixels in (("images", np.stack([80 * labels] * 3, 2)), ("masks", labels)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{name}.png")
    view = values.pop("view", TrainView(32, 40))
    images = find_images(tmp_path / "images")
    return SegmentationFolder(
        images, find_masks(images, tmp_path / "masks", None, 0), label_table((2,), False), view, **values
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


def test_brightness_is_added_and_contrast_multiplied_as_the_reference_does(monkeypatch):
    """Levels are cut off at 0 and 255 and at whole numbers after each."""
    values = {(-32.0, 32.0): 20.5, (0.5, 1.5): 1.5, (-0.05, 0.05): 0.0}
    monkeypatch.setattr(views, "_uniform", lambda low, high: values[(low, high)])
    draws = iter([0.9, 0.1, 0.1, 0.9, 0.9])  # contrast comes second; brightness and it happen, no other does
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(next(draws)))
    picture = torch.tensor([0, 100, 150, 250], dtype=torch.uint8).expand(3, 1, 4)
    expected = [30, 180, 255, 255]  # 1.5 x (0 + 20), (100 + 20), (150 + 20), 255
    assert views._distort(picture)[0, 0].tolist() == expected
