"""codebook_search's GPU kernels in Triton's interpreter, against exact scores in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from beitv2_fast.kernels.codebook_search.reference import codebook_search_reference

from ..support.search_oracle import in_turn
from ..support.triton_tools import guarded

host = pytest.importorskip(
    "beitv2_fast.kernels.codebook_search.triton", reason="triton is not installed", exc_type=ImportError
)

pytestmark = pytest.mark.interpreted

METRICS = ("cosine", "euclidean")
# fp32 results of the same formula: three roundings of a norm, D of a sum.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def search(x: Tensor, codebook: Tensor, metric: str = "cosine", outputs: bool = False, **options) -> tuple[Tensor, ...]:
    return host.codebook_search_triton(x, codebook, metric, outputs, outputs, outputs, **options)


def exact_scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    x, codebook = x.double(), codebook.double()
    return x @ codebook.T if metric == "cosine" else 2 * x @ codebook.T - codebook.square().sum(-1)


def assert_nearest(x: Tensor, codebook: Tensor, metric: str, indices: Tensor) -> None:
    """The exact score of every chosen code is the best one, up to the rounding of float64 itself."""
    scores = exact_scores(x, codebook, metric)
    rounding = 1e-14 * (1 + x.shape[1]) * scores.abs().amax(1)
    chosen = scores.gather(1, indices[:, None])[:, 0]
    assert indices.dtype == torch.int64 and (chosen >= scores.amax(1) - rounding).all()


def assert_lowest_of_equals(codebook: Tensor, indices: Tensor) -> None:
    """Of codes with the same bits the first is chosen."""
    _, group = codebook.unique(dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), codebook.shape[0]).scatter_reduce(
        0, group, torch.arange(codebook.shape[0]), "amin"
    )
    assert torch.equal(indices, first[group[indices]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(252, 1000, 32), (507, 123, 3), (1, 1, 1), (100, 300, 100)])
def test_index_and_outputs_are_the_references(n: int, k: int, d: int, dtype: torch.dtype, metric: str) -> None:
    x = torch.randn(n, d).to(dtype)
    codebook = normalize(torch.randn(k, d), dim=-1).to(torch.float32 if dtype == torch.float16 else dtype)
    indices, normalized, codes, distances = search(x, codebook, metric, outputs=True, split=2)
    assert_nearest(x, codebook, metric, indices)
    _, compared = codebook_search_reference(x, codebook, metric)
    torch.testing.assert_close(normalized, compared, **TOLERANCE)
    assert codes.dtype == codebook.dtype and torch.equal(codes, codebook[indices])
    torch.testing.assert_close(distances, (compared - codebook[indices].float()).square().sum(-1), **TOLERANCE)


@pytest.mark.parametrize("plan", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_every_plan_and_split_finds_the_nearest(plan: str, split: int, metric: str) -> None:
    x, codebook = torch.randn(130, 16), torch.randn(700, 16) * torch.logspace(-1, 1, 700)[:, None]
    assert_nearest(x, codebook, metric, search(x, codebook, metric, plan=plan, split=split)[0])


@pytest.mark.parametrize("metric", METRICS)
def test_wide_rows_are_read_in_chunks(metric: str) -> None:
    x, codebook = torch.randn(33, 300), torch.randn(150, 300)
    indices, normalized, codes, _ = search(x, codebook, metric, outputs=True)
    assert_nearest(x, codebook, metric, indices)
    torch.testing.assert_close(normalized, codebook_search_reference(x, codebook, metric)[1], **TOLERANCE)
    assert torch.equal(codes, codebook[indices])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e8, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_scales_far_from_one_change_nothing(scale: float, metric: str) -> None:
    x, codebook = torch.randn(64, 8), torch.randn(130, 8)
    assert_nearest(x * scale, codebook, metric, search(x * scale, codebook, metric)[0])
    assert_nearest(x, codebook * scale, metric, search(x, codebook * scale, metric)[0])


@pytest.mark.parametrize("plan", ["sm_90", "gfx942"])
@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_differ_in_their_last_bits_are_told_apart(plan: str, metric: str) -> None:
    base = normalize(torch.randn(3, 32), dim=-1)
    codebook = base.repeat(200, 1)  # 5 blocks, in all of which every lane has a near tie: more than are kept
    codebook += (torch.randint(-2, 3, codebook.shape) * 2.0**-24) * codebook
    x = base.repeat(4, 1) + 0.01 * torch.randn(12, 32)
    assert_nearest(x, codebook, metric, search(x, codebook, metric, plan=plan)[0])


@pytest.mark.parametrize("copies", [2, 3, 40])
@pytest.mark.parametrize("metric", METRICS)
def test_of_equal_codes_the_first_wins(copies: int, metric: str) -> None:
    codebook = normalize(torch.randn(300, 8), dim=-1)[torch.randint(300 // copies, (300,))]
    x = torch.randn(70, 8)
    indices = search(x, codebook, metric, split=2)[0]
    assert_nearest(x, codebook, metric, indices)
    assert_lowest_of_equals(codebook, indices)


@pytest.mark.parametrize("metric", METRICS)
def test_clustered_rows_and_codes(metric: str) -> None:
    centers = normalize(torch.randn(20, 32), dim=-1)
    codebook = normalize(centers.repeat(30, 1) + 1e-3 * torch.randn(600, 32), dim=-1)
    x = (centers + 1e-2 * torch.randn(20, 32)).bfloat16()
    assert_nearest(x, codebook, metric, search(x, codebook, metric)[0])


def undecided(x: Tensor, codebook: Tensor, metric: str, monkeypatch) -> int:
    """How many rows the screening leaves to ``scan``; all rows' indices are compared with exact scores."""
    scan, counts = host.scan, []

    class Counting:
        def __getitem__(self, grid):
            def launch(*args, **options):
                counts.append(int(args[2][len(x)]))
                scan[grid](*args, **options)

            return launch

    monkeypatch.setattr(host, "scan", Counting())
    assert_nearest(x, codebook, metric, search(x, codebook, metric, plan="sm_90", split=2)[0])
    return counts[0]


@pytest.mark.parametrize("angle", [0.1, 0.05, 0.03, 0.01])
@pytest.mark.parametrize("metric", METRICS)
def test_a_cone_of_vectors_and_codes_is_decided_by_the_screening(metric: str, angle: float, monkeypatch) -> None:
    axis = normalize(torch.randn(1, 32), dim=-1)
    x, codebook = (normalize(axis + angle * torch.randn(n, 32) / 32**0.5, dim=-1) for n in (64, 2500))
    assert undecided(x, codebook, metric, monkeypatch) <= 3


@pytest.mark.parametrize("metric", METRICS)
def test_rows_away_from_all_codes_are_decided_by_the_screening(metric: str, monkeypatch) -> None:
    """All products are below 0, or the middle of the codes is nearer than any code: yet no row is left to ``scan``."""
    x, codebook = torch.randn(64, 32) / 4, torch.randn(1300, 32)
    if metric == "cosine":
        x, codebook = -x.abs(), codebook.abs()
    assert exact_scores(x, codebook, metric).max() < 0
    assert undecided(x, codebook, metric, monkeypatch) <= 3


@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e37])
@pytest.mark.parametrize(("plan", "d"), [("sm_90", 32), ("gfx942", 32), ("sm_90", 130)])
def test_rows_from_anywhere_meet_a_cone_of_codes(plan: str, d: int, scale: float) -> None:
    axis, noise = normalize(torch.randn(1, d), dim=-1), torch.randn(40, d)
    rows = [noise, axis + 1e-2 * noise, -axis + 1e-2 * noise, axis, -3 * axis, noise - (noise @ axis.T) * axis]
    x = torch.cat([*rows, torch.zeros(1, d)]) * torch.tensor([[scale], [1.0]])[torch.arange(163) % 2]
    codebook = (axis + 1e-2 * torch.randn(700, d)).repeat(2, 1) * scale
    codebook[::90, 0] = torch.nan
    valid = codebook.isfinite().all(1).nonzero()[:, 0]
    expected = search(x, codebook[valid], plan=plan)[0]
    assert_nearest(x, codebook[valid], "cosine", expected)
    assert_lowest_of_equals(codebook[valid], expected)
    x[-1] = axis  # a zero row has index 0, and so may meet a code that is not finite
    assert torch.equal(search(x, codebook, plan=plan)[0][:-1], valid[expected][:-1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_a_code_that_is_not_finite_leaves_the_others_to_the_screening(metric: str, value: float, monkeypatch) -> None:
    x, codebook = torch.randn(64, 16), torch.randn(1025, 16)
    codebook[5, 0], codebook[1024, 3] = value, value  # the last one is alone in its block
    good = codebook.isfinite().all(1).nonzero()[:, 0]
    expected = good[search(x, codebook[good], metric)[0]]
    assert torch.equal(search(x, codebook, metric)[0], expected)
    monkeypatch.setitem(globals(), "assert_nearest", lambda *_: None)  # NaN among the exact scores
    assert undecided(x, codebook, metric, monkeypatch) <= 3


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_meet_the_codebook_in_parts_get_the_first_of_equal_codes(metric: str) -> None:
    x, codebook = torch.randn(70, 8), normalize(torch.randn(3, 8), dim=-1).repeat(1100, 1)
    assert host.scan_parts(len(codebook), 2) > 1
    indices, _, codes, _ = search(x, codebook, metric, outputs=True, split=2)
    assert_nearest(x, codebook, metric, indices)
    assert_lowest_of_equals(codebook, indices)
    assert torch.equal(codes, codebook[indices])


@pytest.mark.parametrize("metric", METRICS)
def test_strides_are_obeyed(metric: str) -> None:
    x = torch.randn(16, 2, 90).transpose(0, 2)[:, 1, :12]  # [90, 12]
    codebook = torch.randn(12, 200).T[::2]
    indices, _, codes, _ = search(x, codebook, metric, outputs=True)
    assert_nearest(x, codebook, metric, indices)
    assert torch.equal(codes, codebook[indices])
    row = torch.randn(1, 12).expand(5, 12)
    assert_nearest(row, codebook, metric, search(row, codebook, metric)[0])


def test_no_rows_give_no_indices() -> None:
    outputs = search(torch.empty(0, 8), torch.randn(5, 8), outputs=True)
    assert [tuple(t.shape) for t in outputs] == [(0,), (0, 8), (0, 8), (0,)]


@pytest.mark.parametrize("metric", METRICS)
def test_zero_nan_and_inf_rows(metric: str) -> None:
    x, codebook = torch.randn(8, 6), torch.randn(140, 6)
    x[1], x[3, 2], x[5, 0], x[6, 5] = 0, torch.nan, torch.inf, -torch.inf
    indices, _, _, distances = search(x, codebook, metric, outputs=True)
    odd = torch.tensor([3, 5, 6])
    assert (indices[odd] == 0).all() and distances[odd].isnan().all()
    good = torch.tensor([0, 2, 4, 7])
    assert_nearest(x[good], codebook, metric, indices[good])
    assert distances[good].isfinite().all()
    assert indices[1] == (0 if metric == "cosine" else codebook.double().square().sum(-1).argmin())


@pytest.mark.parametrize("metric", METRICS)
def test_a_code_with_nan_or_inf_is_never_chosen(metric: str) -> None:
    x, codebook = torch.randn(9, 6), torch.randn(140, 6)
    codebook[0, 1], codebook[7, 0], codebook[139, 5] = torch.nan, torch.inf, -torch.inf
    x[4] = 0
    good = codebook.isfinite().all(1).nonzero()[:, 0]
    indices = search(x, codebook, metric)[0]
    local = (good[None, :] == indices[:, None]).int().argmax(1)
    assert torch.equal(good[local], indices)
    assert_nearest(x, codebook[good], metric, local)
    assert metric == "euclidean" or indices[4] == 1
    assert (search(x, torch.full((3, 6), torch.nan), metric)[0] == 0).all()


@pytest.mark.parametrize(("metric", "plan"), [("cosine", "sm_90"), ("euclidean", "gfx942")])
def test_codebooks_in_turn_give_the_bits_of_each_alone(metric: str, plan: str) -> None:
    x, codebook = in_turn()
    together = search(x, codebook, metric, outputs=True, plan=plan, split=2)
    for g, codes in enumerate(codebook):
        alone = search(x[g::4], codes, metric, outputs=True, plan=plan, split=2)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[g::4], expected, rtol=0, atol=0, equal_nan=True)


def test_codebooks_in_turn_may_be_strided_and_met_in_parts() -> None:
    x = torch.randn(2, 16)[:, ::4].repeat(35, 1)  # [70, 4]
    codebook = normalize(torch.randn(4, 3, 2), dim=0).repeat(1, 700, 1).permute(2, 1, 0)  # [2, 2100, 4], near ties only
    assert host.scan_parts(2100, 2) > 1
    indices, *_ = search(x, codebook, "cosine", split=2)
    for g in range(2):
        assert_nearest(x[g::2], codebook[g], "cosine", indices[g::2])
        assert_lowest_of_equals(codebook[g], indices[g::2])


@pytest.mark.parametrize(("n", "k", "d"), [(77, 131, 5), (3, 1, 129)])
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_outside_the_tensors_is_touched(n: int, k: int, d: int, metric: str, monkeypatch) -> None:
    """Every tensor, the outputs too, ends at a page that kills the process when it is touched."""
    x, codebook = guarded(torch.randn(2 * n, d)), guarded(torch.randn(2, k, d))
    for method in ("new_empty", "new_zeros"):
        original = getattr(Tensor, method)
        monkeypatch.setattr(Tensor, method, lambda *a, original=original, **kw: guarded(original(*a, **kw)))
    outputs = search(x, codebook, metric, outputs=True, split=2)
    monkeypatch.undo()
    for g in range(2):
        assert_nearest(x[g::2], codebook[g], metric, outputs[0][g::2])
