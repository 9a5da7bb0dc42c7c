"""Converted models give the features and logits of transformers' own classes, on random weights, to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from beitv2_fast.weights import convert
from beitv2_fast.weights.files import read, write

from ..support.weights import DEPTH, DIM, HEADS, PATCH, SIZE, assert_same_state, classifier, images, randomized, student

transformers = pytest.importorskip("transformers")

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def beit(cls, position: str, **values):
    config = transformers.BeitConfig(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * DIM,
        image_size=SIZE, patch_size=PATCH, layer_norm_eps=1e-6, drop_path_rate=0.0,
        use_relative_position_bias=position == "relative",
        use_absolute_position_embeddings=position == "absolute",
        use_shared_relative_position_bias=position == "shared_relative", **values,
    )  # fmt: skip
    return randomized(cls(config))


def read_by_transformers(cls, ours: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Their model from a folder that ``write`` made, every entry of which it has loaded."""
    write(folder, convert(ours.state_dict(), "transformers"), "transformers", ours.config)
    theirs, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return theirs.eval()


@pytest.mark.parametrize("position", ("relative", "shared_relative", "absolute"))
@torch.no_grad()
def test_transformers_own_weights_give_its_logits_here(position):
    theirs = beit(transformers.BeitForImageClassification, position, num_labels=7)
    ours = classifier(position)
    ours.load_state_dict(convert(theirs.state_dict(), "beitv2_fast"))
    torch.testing.assert_close(ours(images()), theirs(images()).logits, **TOLERANCE)


@torch.no_grad()
def test_transformers_own_masked_image_model_gives_its_logits_here():
    theirs = beit(transformers.BeitForMaskedImageModeling, "shared_relative", vocab_size=20, use_mask_token=True)
    ours = student(aggregation_depth=0)
    ours.load_state_dict(convert(theirs.state_dict(), "beitv2_fast"))
    mask = torch.arange(9).repeat(3, 1) % 2 == 0
    expected = theirs(images(), bool_masked_pos=mask).logits
    torch.testing.assert_close(ours.predict(images(), mask)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("position", ("relative", "shared_relative", "absolute"))
@torch.no_grad()
def test_a_folder_for_transformers_gives_the_classifiers_logits(tmp_path, position):
    ours = classifier(position)
    theirs = read_by_transformers(transformers.BeitForImageClassification, ours, tmp_path / "model")
    torch.testing.assert_close(theirs(images()).logits, ours(images()), **TOLERANCE)


@pytest.mark.parametrize("position", ("shared_relative", "relative", "absolute"))
@torch.no_grad()
def test_a_folder_for_transformers_gives_the_students_features_and_logits(tmp_path, position):
    ours = student(position)
    theirs = read_by_transformers(transformers.BeitForMaskedImageModeling, ours, tmp_path / "model")
    mask = torch.arange(9).repeat(3, 1) % 2 == 0
    found = theirs(images(), bool_masked_pos=mask).logits
    torch.testing.assert_close(found, ours.predict(images(), mask)[0], **TOLERANCE)
    features = theirs.beit(images()).last_hidden_state
    torch.testing.assert_close(features, ours.encode(images())[0], **TOLERANCE)


@torch.no_grad()
def test_modules_of_transformers_load_their_names_strictly():
    ours, theirs = classifier(), beit(transformers.BeitForImageClassification, "relative", num_labels=7)
    theirs.load_state_dict(convert(ours.state_dict(), "transformers_modules"))
    torch.testing.assert_close(theirs(images()).logits, ours(images()), **TOLERANCE)


def test_a_folder_that_transformers_wrote_is_read_with_its_config(tmp_path):
    theirs = beit(transformers.BeitForImageClassification, "absolute", num_labels=7)
    theirs.save_pretrained(tmp_path)
    loaded = read(tmp_path)
    assert loaded.config() == classifier("absolute").config
    assert_same_state(loaded.ours, convert(theirs.state_dict(), "beitv2_fast"))


def test_a_bare_beit_model_is_read():
    theirs = beit(transformers.BeitModel, "shared_relative", use_mean_pooling=False, use_mask_token=True)
    ours = convert(theirs.state_dict(), "beitv2_fast")
    assert torch.equal(ours["norm.weight"], theirs.layernorm.weight)


def test_the_image_processor_prepares_images_as_the_students_view_does(tmp_path):
    from PIL import Image

    from beitv2_fast.data.views import EvalView
    from beitv2_fast.models.vit import normalize

    ours = classifier()
    write(tmp_path / "model", convert(ours.state_dict(), "transformers"), "transformers", ours.config)
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    found = processor(images=image, return_tensors="pt")["pixel_values"][0]
    expected = normalize(EvalView(SIZE, 1.0)(image)["image"])
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / 255 / 0.22)  # two levels of the 8-bit image
