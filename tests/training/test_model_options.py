"""The models' options on the command line: what they change in a training, and what they leave to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ..support.small_runs import small_tokenizer
from ..support.training import PRETRAIN, TINY, assert_same_bits, call, last_weights, losses, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("runs") / "tokenizer")


@pytest.fixture
def pretrain(images, tokenizer, tmp_path):
    def run(name: str, *options: object) -> Path:
        out = tmp_path / name
        shared = [*TINY, *PRETRAIN, "--data", images, "--tokenizer", tokenizer, "--out", out]
        assert call("pretrain", *shared, *options) == 0
        return out

    return run


def test_checkpointing_trains_to_the_same_bits_with_drop_path(pretrain):
    assert_same_bits(pretrain("kept"), pretrain("computed_again", "--checkpointing"))


def test_an_option_forces_what_computes_attention_the_log_says_it_and_all_train_alike(pretrain):
    trained = []
    for option, name in (("auto", "native|math"), ("math", "math"), ("sdpa", "sdpa")):
        run = pretrain(option, "--attention", option)
        started = next(line for line in (run / "log.txt").read_text().splitlines() if "pretrain: " in line)
        assert any(f"attention {one}," in started for one in name.split("|"))
        trained.append(losses(run))
    for other in trained[1:]:
        assert other == pytest.approx(trained[0], rel=1e-4)  # rounding of fp32 sums over nine steps of AdamW


@pytest.mark.parametrize(
    ("position", "expected"),
    [("relative", "blocks.0.attn.relative_position_bias_table"), ("absolute", "pos_embed")],
)
def test_positions_and_objective_are_options(pretrain, position, expected):
    weights = last_weights(pretrain(position, "--position", position, "--aggregation-depth", 0))
    assert expected in weights and not any("rel_pos_bias" in name or "cls_pt" in name for name in weights)


def test_a_student_with_other_patches_reads_the_tokenizer_at_another_size(pretrain, tokenizer):
    options = ["--image-size", 30, "--patch-size", 6, "--tokenizer-image-size", 40]  # 5 x 5 patches; training had 4 x 4
    weights = last_weights(pretrain("other_grid", *options))
    assert weights["rel_pos_bias.relative_position_bias_table"].shape[0] == 9 * 9 + 3
    stored = load_file(sorted((tokenizer / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert stored["encoder.pos_embed"].shape[1] == 17
