"""codebook_search on a real GPU, whichever is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from beitv2_fast.kernels import codebook_search

from ..support.gpu import DRY, HERE, cuda_only, launches, no_waiting, pick
from ..support.search_oracle import PROBLEMS, exact_indices, in_turn
from .test_codebook_search_triton import METRICS, assert_lowest_of_equals, assert_nearest, host

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLANS = {name: plan for name, plan in host.PLANS.items() if name != "interpreter"}
# One of every shape that the screening kernel is compiled for.
CONFIGS = sorted({config for plan in PLANS.values() for config in (*plan.configs, *plan.wide)}, key=str)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=HERE)


def search_by(plan: str, split: int | None, x, codebook, metric: str = "cosine") -> torch.Tensor:
    return host.codebook_search_triton(x, codebook, metric, False, False, False, plan=plan, split=split)[0]


def native_plans() -> list[str]:
    """Plans that this device can run: those of its own family's instructions, and mma's."""
    if DRY:
        return list(PLANS)
    return ["gfx942"] if torch.version.hip else list(dict.fromkeys(["sm_80", host.target_name()]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(pick(12_544, 200), pick(8192, 300), 32), (507, 123, 3), (1, 1, 1), (pick(3000, 50), 1000, 768)]
)
def test_every_dtype_and_shape_finds_the_nearest(n: int, k: int, d: int, dtype: torch.dtype, metric: str) -> None:
    x = randn(n, d).to(dtype)
    codebook = normalize(randn(k, d), dim=-1)
    found = codebook_search(
        x, codebook, metric=metric, return_normalized=True, return_codes=True, return_distances=True
    )
    assert_nearest(x, codebook, metric, found.indices)
    assert torch.equal(found.codes, codebook[found.indices])
    expected = normalize(x.float(), dim=-1) if metric == "cosine" else x.float()
    torch.testing.assert_close(found.normalized, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.distances, (expected - found.codes).square().sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "beyond double"])  # float64 is the last step
def test_the_index_is_the_one_of_exact_arithmetic(name: str, metric: str) -> None:
    x, codebook = PROBLEMS[name](torch.Generator().manual_seed(0))
    found = codebook_search(x.to(HERE), codebook.to(HERE), metric=metric)
    assert torch.equal(found.indices.cpu(), exact_indices(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_codebooks_in_turn_give_the_bits_of_each_alone(metric: str) -> None:
    x, codebook = (t.to(HERE) for t in in_turn())
    options = {"metric": metric, "return_codes": True, "return_distances": True}
    together = codebook_search(x, codebook, **options)
    for g in range(len(codebook)):
        alone = codebook_search(x[g::4], codebook[g], **options)
        assert torch.equal(together.indices[g::4], alone.indices)
        for found, expected in ((together.codes, alone.codes), (together.distances, alone.distances)):
            torch.testing.assert_close(found[g::4], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 16, 65, 128, 129, 256, 1024])
def test_every_width_of_a_row_finds_the_nearest(d: int, metric: str) -> None:
    x, codebook = randn(pick(1000, 40), d), randn(700, d)
    assert_nearest(x, codebook, metric, codebook_search(x, codebook, metric=metric).indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 2, 127, 129, pick(65_536, 1025), pick(262_144, 2049)])
def test_every_size_of_codebook_finds_the_nearest(k: int, metric: str) -> None:
    x, codebook = randn(pick(500, 30), 32), randn(k, 32)
    assert_nearest(x, codebook, metric, codebook_search(x, codebook, metric=metric).indices)


@pytest.mark.parametrize("of", ["vectors", "codes"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-10, 1e10, 1e30])
def test_scales_far_from_one_change_nothing(scale: float, of: str) -> None:
    x, codebook = randn(pick(1000, 50), 32), randn(pick(1000, 130), 32)
    x, codebook = (x * scale, codebook) if of == "vectors" else (x, codebook * scale)
    for metric in METRICS:
        assert_nearest(x, codebook, metric, codebook_search(x, codebook, metric=metric).indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", ["transposed", "slices of wider rows", "every second row", "one row repeated"])
def test_strides_are_obeyed(layout: str, metric: str) -> None:
    make = {
        "transposed": lambda n: randn(24, n).T,
        "slices of wider rows": lambda n: randn(n, 80)[:, 3:51:2],
        "every second row": lambda n: randn(2 * n, 24)[::2],
        "one row repeated": lambda n: randn(1, 24).expand(n, -1),
    }[layout]
    x, codebook = make(300), make(500)
    for a, b in ((x, codebook), (x, codebook.contiguous()), (x.contiguous(), codebook)):
        found = codebook_search(a, b, metric=metric, return_codes=True, return_distances=True)
        assert torch.equal(found.indices, codebook_search(x.contiguous(), codebook.contiguous(), metric=metric).indices)
        assert torch.equal(found.codes, codebook[found.indices])


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows_give_no_indices(metric: str) -> None:
    found = codebook_search(
        randn(0, 8), randn(5, 8), metric=metric, return_normalized=True, return_codes=True, return_distances=True
    )
    assert [tuple(t.shape) for t in found] == [(0,), (0, 8), (0, 8), (0,)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gets_index_0_and_changes_no_other(value: float, metric: str) -> None:
    x, codebook = randn(200, 32), randn(300, 32)
    clean = codebook_search(x, codebook, metric=metric).indices
    x[3, 5], x[199, 31] = value, value
    found = codebook_search(x, codebook, metric=metric, return_distances=True)
    odd = torch.tensor([3, 199], device=HERE)
    assert (found.indices[odd] == 0).all() and found.distances[odd].isnan().all()
    others = torch.ones(200, dtype=torch.bool, device=HERE).index_fill(0, odd, False)
    assert torch.equal(found.indices[others], clean[others])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_code_that_is_not_finite_is_never_chosen(value: float, metric: str) -> None:
    x, codebook = randn(100, 32), randn(300, 32)
    codebook[::3, 7] = value
    good = codebook[:, 7].isfinite().nonzero()[:, 0]
    expected = good[codebook_search(x, codebook[good], metric=metric).indices]
    assert torch.equal(codebook_search(x, codebook, metric=metric).indices, expected)
    codebook[:, 7] = value
    assert (codebook_search(x, codebook, metric=metric).indices == 0).all()


@launches
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [32, 300])
@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_every_plan_and_split_finds_the_nearest(split: int, d: int, metric: str) -> None:
    x, codebook = randn(pick(1000, 70), d), randn(pick(5000, 1200), d)
    for plan in native_plans():
        assert_nearest(x, codebook, metric, search_by(plan, split, x, codebook, metric))


@launches
@pytest.mark.parametrize("d", [32, 200])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_n}-{c.num_warps}-{c.num_stages}")
def test_every_configuration_finds_the_nearest(config, d: int, monkeypatch) -> None:
    x, codebook = randn(pick(1000, 70), d), randn(pick(5000, 300), d)
    for name in native_plans():
        plan = host.PLANS[name]
        monkeypatch.setitem(host.PLANS, name, replace(plan, configs=(config,), wide=(config,)))
        for metric in METRICS:
            assert_nearest(x, codebook, metric, search_by(name, None, x, codebook, metric))


def test_near_ties_and_duplicates_on_the_tensor_cores() -> None:
    base = normalize(randn(64, 32), dim=-1)
    codebook = base.repeat(64, 1)
    codebook += (torch.randint(-2, 3, codebook.shape, device=HERE) * 2.0**-24) * codebook
    codebook[2048:] = codebook[:2048].clone()
    x = base.repeat(8, 1) + 0.01 * randn(512, 32)
    indices = codebook_search(x, codebook).indices
    assert_nearest(x, codebook, "cosine", indices)
    assert_lowest_of_equals(codebook.cpu(), indices.cpu())


@pytest.mark.parametrize("spread", [0.1, 0.03, 0.01])
def test_a_narrow_cone_of_vectors_and_codes_is_told_apart(spread: float) -> None:
    axis = normalize(randn(1, 32), dim=-1)
    cone = normalize(axis + spread * randn(pick(4000, 300), 32) / 32**0.5, dim=-1)
    x, codebook = cone[: len(cone) // 2], cone[len(cone) // 2 :]
    assert_nearest(x, codebook, "cosine", codebook_search(x, codebook).indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_the_screening_leaves_get_the_first_of_equal_codes(dtype: torch.dtype, metric: str) -> None:
    x, three = randn(pick(4000, 70), 32).to(dtype), normalize(randn(3, 32), dim=-1)
    codebook = three.repeat(pick(2700, 700), 1)
    codebook[0, 0] = torch.nan
    found = codebook_search(x, codebook, metric=metric, return_codes=True)
    order = torch.tensor([1, 2, 3], device=HERE)  # the first of each that is whole
    expected = order[codebook_search(x, codebook[order], metric=metric).indices]
    assert torch.equal(found.indices, expected)
    assert torch.equal(found.codes, codebook[found.indices])


def test_the_host_waits_for_nothing() -> None:
    x, codebook = randn(500, 32), randn(300, 32)
    options = dict(return_normalized=True, return_codes=True, return_distances=True)
    for metric in METRICS:
        codebook_search(x, codebook, metric=metric, **options)  # compiles
        with no_waiting():
            found = codebook_search(x, codebook, metric=metric, **options)
        assert_nearest(x, codebook, metric, found.indices)


@cuda_only
@pytest.mark.parametrize("metric", METRICS)
def test_a_captured_graph_searches_what_its_inputs_hold_when_it_is_replayed(metric: str) -> None:
    x, codebook = randn(500, 32), randn(3000, 32)
    codebook_search(x, codebook, metric=metric, return_codes=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = codebook_search(x, codebook, metric=metric, return_codes=True)
    for _ in range(2):
        x.normal_()
        codebook.normal_()
        graph.replay()
        assert_nearest(x, codebook, metric, found.indices)
        assert torch.equal(found.codes, codebook[found.indices])


@cuda_only
def test_a_stream_of_its_own_is_used() -> None:
    x, codebook = randn(500, 32), randn(3000, 32)
    expected, stream = codebook_search(x, codebook).indices, torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x * 1
        indices = codebook_search(late, codebook).indices
    stream.synchronize()
    assert torch.equal(indices, expected)


@cuda_only
def test_offsets_beyond_31_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * 2**30:
        pytest.skip(f"needs 14 GiB of GPU memory, {free / 2**30:.0f} are free")
    x = torch.randn(2**31 // 32 + 1000, 32, device=HERE, dtype=torch.bfloat16)
    codebook = randn(1000, 32)
    indices = codebook_search(x, codebook).indices
    assert_nearest(x[-5000:], codebook, "cosine", indices[-5000:])


@cuda_only
def test_no_memory_grows_with_n_times_k() -> None:
    x, codebook = randn(200_000, 32), randn(8192, 32)
    codebook_search(x, codebook)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    codebook_search(x, codebook)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * 200_000 * 8192
