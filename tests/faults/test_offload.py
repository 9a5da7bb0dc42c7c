"""ZeRO with the optimizer, and under stage 3 the weights, in the CPU's memory: slow where everything is the CPU's."""

from __future__ import annotations

import pytest

from ..training.test_distributed import (
    LOSS,
    OPTIONS,
    STEPS,
    STILL,
    Folder,
    assert_close_weights,
    assert_moved,
    assert_same_codes,
    assert_same_state,
    hashes,
    losses,
    make_runs,
)

pytestmark = pytest.mark.faults
pytest.importorskip("deepspeed")
CONFIGS = ("zero1_offload", "zero2_offload", "zero3_offload")
MOVES = [("torch", "zero2_offload"), ("zero1_offload", "zero3_offload"), ("zero3_offload", "torch")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Folder:
    return make_runs(tmp_path_factory.mktemp("offload"), CONFIGS, MOVES, {"still": STILL}, {})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stage", OPTIONS)
def test_offload_trains_as_torch_does(runs, stage, name):
    assert losses(runs(stage, name)) == pytest.approx(losses(runs(stage, "torch")), rel=LOSS)
    assert_close_weights(runs(stage, name), runs(stage, "torch"))


@pytest.mark.parametrize("name", CONFIGS)
def test_with_offload_the_codebook_has_one_process_s_bits_where_no_weight_moves(runs, name):
    assert_same_state(runs("tokenizer", f"{name}_still"), runs("tokenizer", "one_still"))


@pytest.mark.parametrize("name", CONFIGS)
def test_with_offload_all_vectors_choose_the_codes_of_one_process_and_all_ranks_hold_one_codebook(runs, name):
    assert_same_codes(runs("tokenizer", name), runs("tokenizer", "micro"))
    first, second = hashes(runs("tokenizer", name))
    assert first == second and len(first) == STEPS


@pytest.mark.parametrize("move", [f"{a}_to_{b}" for a, b in MOVES])
@pytest.mark.parametrize("stage", OPTIONS)
def test_a_checkpoint_moves_into_and_out_of_offload(runs, stage, move):
    assert_moved(runs(stage, move), runs(stage, "micro"))
