"""Converted models give the features and logits of timm's own classes, on random weights, to 1e-5."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.weights import convert

from ..support.weights import DEPTH, DIM, HEADS, PATCH, SIZE, classifier, images, randomized, student

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def timm_model(position: str, **values) -> torch.nn.Module:
    timm_beit = pytest.importorskip("timm.models.beit")
    return timm_beit.Beit(
        img_size=SIZE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, init_values=0.5,
        use_abs_pos_emb=position == "absolute", use_rel_pos_bias=position == "relative",
        use_shared_rel_pos_bias=position == "shared_relative", **values,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("position", ("relative", "shared_relative", "absolute"))
@torch.no_grad()
def test_a_classifier_gives_timms_logits(position):
    ours, theirs = classifier(position), timm_model(position, num_classes=7)
    theirs.load_state_dict(convert(ours.state_dict(), "timm"))  # strict
    torch.testing.assert_close(theirs(images()), ours(images()), **TOLERANCE)


@pytest.mark.parametrize("position", ("shared_relative", "relative", "absolute"))
@torch.no_grad()
def test_a_student_gives_timms_features(position):
    ours, theirs = student(position), timm_model(position, num_classes=0, global_pool="token")
    theirs.load_state_dict(convert(ours.state_dict(), "timm"))
    expected = ours.norm(ours.encode(images())[0])
    torch.testing.assert_close(theirs.forward_features(images()), expected, **TOLERANCE)


@torch.no_grad()
def test_timms_own_weights_give_its_logits_here():
    theirs, ours = randomized(timm_model("relative", num_classes=7)), classifier()
    ours.load_state_dict(convert(theirs.state_dict(), "beitv2_fast"))
    torch.testing.assert_close(ours(images()), theirs(images()), **TOLERANCE)
