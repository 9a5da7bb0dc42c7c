"""The scripts of examples/ do what they say, in few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from beitv2_fast import VectorQuantizeAdapter

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_vq_vae_learns_to_draw_disks_with_most_of_its_codes():
    result = load("vq_vae").main(steps=60)
    assert result["used"] > 0.8 and result["error"] < 0.5


def test_every_stage_of_the_audio_codec_makes_the_sound_better():
    errors = load("audio_codec").main(steps=60)
    assert len(errors) == 4 and errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]


def test_a_model_of_vector_quantize_pytorch_trains_on_alike_after_the_swap():
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    theirs, ours, before, after = load("swap").main()
    assert {type(layer) for layer in ours.vq.layers} == {VectorQuantizeAdapter} != {*map(type, theirs.vq.layers)}
    assert after == pytest.approx(before, rel=1e-5) and before[-1] < before[0]


def test_a_codebook_of_65536_codes_learns_through_its_map():
    result = load("large_codebook").main(steps=20)
    assert result["last"] < 0.25 * result["first"] and result["distinct"] > 0.02


def test_all_examples_are_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'load("{path.stem}")' not in text] == []
