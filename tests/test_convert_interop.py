"""Converted models give the features and logits of timm's and transformers' own classes, on random weights, to 1e-5."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from beitv2_fast.convert import convert

from .training import ENVIRONMENT, ROOT
from .weights import DEPTH, DIM, HEADS, PATCH, SIZE, classifier, images, randomised, student

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
    theirs, ours = randomised(timm_model("relative", num_classes=7)), classifier()
    ours.load_state_dict(convert(theirs.state_dict(), "beitv2_fast"))
    torch.testing.assert_close(ours(images()), theirs(images()), **TOLERANCE)


@pytest.mark.slow
def test_transformers_own_classes_agree():
    """tests/interop_transformers.py, in a process of its own for the reason that it gives."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "tests/interop_transformers.py"]
    result = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    assert len(re.findall(r"^\.+", result.stdout, re.MULTILINE)[0]) == 14  # none was skipped
