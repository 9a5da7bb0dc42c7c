"""The Triton kernels of masked_cross_entropy, interpreted, against the steps in plain PyTorch; behind guard pages."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels.masked_cross_entropy import chunked
from beitv2_fast.kernels.masked_cross_entropy.chunked import Device, Head, Wanted, head_losses
from beitv2_fast.kernels.masked_cross_entropy.ops import masked_positions

from ..support.masked_problem import problem
from ..support.triton_tools import guarded

pytest.importorskip("triton")
from beitv2_fast.kernels.masked_cross_entropy import triton as gpu

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One rounding to the dtype, of values that fp32 arithmetic in another order may put on the other side of a tie.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape
    scale = max(exact.double().abs().max().item(), 1e-3) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def rows_problem(dim: int, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens [3, 5, dim] of the layout; positions of 9 of them; LayerNorm weight and bias as rows of one tensor."""
    whole = torch.randn(3, 6, dim).mul(3).add(1).to(dtype)
    tokens = {"slice": guarded(whole)[:, 1:], "columns first": whole[:, 1:].mT.contiguous().mT}[layout]
    return tokens, guarded(torch.tensor([0, 2, 3, 4, 7, 9, 10, 13, 14])), torch.randn(2, dim)


@pytest.mark.parametrize("layout", ["slice", "columns first"])
@pytest.mark.parametrize("dim", [1, 24, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_norm(dtype, dim, layout):
    tokens, positions, (weight, bias) = rows_problem(dim, dtype, layout)
    weight, bias = guarded(weight), guarded(bias)
    ours = gpu.normalize_triton([tokens], positions, weight, bias, 1e-6, dtype)
    exact = chunked.normalize(tokens.double(), positions, weight.double(), bias.double(), 1e-6, torch.float64)
    assert ours.hidden.dtype == dtype
    assert_close(ours.hidden, exact.hidden, dtype)
    assert_close(ours.mean, exact.mean.flatten(), torch.float32)


@pytest.mark.parametrize("wanted", ["rows", "norm", "both"])
@pytest.mark.parametrize("dim", [24, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_gather_and_norm(dtype, dim, wanted):
    tokens, positions, (weight, bias) = rows_problem(dim, dtype, "slice")
    upstream = torch.randn(9, dim).to(dtype)
    exact_norm, exact_rows = torch.zeros(2, dim).double(), torch.zeros(9, dim).double()
    exact = chunked.normalize(tokens.double(), positions, weight.double(), bias.double(), 1e-6, torch.float64)
    chunked.normalize_backward(
        upstream.double(), tokens.double(), positions, exact, weight.double(), exact_rows, exact_norm
    )
    ours = gpu.normalize_triton([tokens], positions, weight, bias, 1e-6, dtype)
    rows = [guarded(torch.full((9, dim), torch.nan))] if wanted != "norm" else []
    norm = torch.full((1, 2, dim), torch.nan) if wanted != "rows" else None
    gpu.normalize_backward_triton(guarded(upstream), [tokens], positions, ours, guarded(weight), rows, norm)
    if rows:
        assert_close(rows[0], exact_rows, torch.float32)
    if norm is not None:
        assert_close(norm[0], exact_norm, torch.float32)


def test_a_missing_position_reads_the_last_token():
    tokens, _, (weight, bias) = rows_problem(24, torch.float32, "slice")
    last, missing = (gpu.normalize_triton([tokens], torch.tensor([p]), weight, bias, 1e-6, torch.float32).hidden
                     for p in (14, -1))  # fmt: skip
    assert torch.equal(last, missing)


def softmax_problem(rows: int, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = guarded((torch.randn(rows, classes) * 4).to(dtype))
    labels = torch.randint(classes, (rows,))
    labels[0] = logits[0].argmax()
    return logits, guarded(torch.randn(classes)), guarded(labels)


@pytest.mark.parametrize("whole", [True, False], ids=["rows in registers", "rows block by block"])
@pytest.mark.parametrize("classes", [1, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_in_place(monkeypatch, dtype, classes, whole):
    monkeypatch.setattr(gpu, "SOFTMAX_BLOCK", 64)
    if not whole:
        monkeypatch.setattr(gpu, "WHOLE_ROW", 0)
    for bias_given in (True, False):
        logits, bias, labels = softmax_problem(9, classes, dtype)
        bias = bias if bias_given else None
        exact, exact_sums = logits.double(), torch.zeros(classes).double()
        losses, correct = guarded(torch.zeros(9)), guarded(torch.zeros(9, dtype=torch.bool))
        exact_losses, exact_correct = torch.zeros(9).double(), torch.zeros_like(correct)
        sums = guarded(torch.full_like(gpu.bias_sums(logits, 1, 9), torch.nan))
        assert sums.shape == (1, 2 if whole else 1, classes)
        chunked.softmax_(exact, bias, labels, exact_losses, exact_correct, True, exact_sums)
        before = logits.clone()
        gpu.softmax_triton_(logits, bias, labels, losses, correct, False, None)
        assert torch.equal(logits, before)
        assert_close(losses, exact_losses, torch.float32)
        assert torch.equal(correct, exact_correct)
        for chunks in (1, 2):  # sums start with the first rows and go on with the second
            logits.copy_(before)
            gpu.softmax_triton_(logits, bias, labels, losses, correct, True, sums, start=9 * (chunks - 1))
            assert_close(losses, exact_losses, torch.float32)
            assert_close(logits, exact, dtype)
            assert_close(sums.sum((0, 1)), chunks * exact_sums, dtype)


def test_softmax_of_two_branches_that_share_their_labels():
    logits, bias, labels = softmax_problem(6, 70, torch.float32)
    labels, sums = guarded(labels[:3]), gpu.bias_sums(logits, 2, 3)
    losses, correct = torch.zeros(6), torch.zeros(6, dtype=torch.bool)
    exact, exact_sums = logits.double(), torch.zeros(2, 70).double()
    exact_losses, exact_correct = torch.zeros(6).double(), torch.zeros_like(correct)
    for b, at in enumerate((slice(0, 3), slice(3, 6))):
        chunked.softmax_(exact[at], bias, labels, exact_losses[at], exact_correct[at], True, exact_sums[b])
    gpu.softmax_triton_(logits, bias, labels, losses, correct, True, sums)
    assert torch.equal(correct, exact_correct)
    for ours, theirs in ((losses, exact_losses), (logits, exact), (sums.sum(1), exact_sums)):
        assert_close(ours, theirs, torch.float32)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_without_logits(dtype, even):
    rows, classes, dim = (64, 256, 32) if even else (37, 333, 27)
    hidden, weight = guarded(torch.randn(rows, dim).to(dtype)), guarded(torch.randn(classes, dim).to(dtype))
    for bias in (guarded(torch.randn(classes)), None):
        labels = guarded(torch.randint(classes, (rows,)))
        losses, correct = guarded(torch.zeros(rows)), guarded(torch.zeros(rows, dtype=torch.bool))
        exact_losses, exact_correct = torch.zeros(rows).double(), torch.zeros_like(correct)
        chunked.softmax_(hidden.double() @ weight.double().T, bias, labels, exact_losses, exact_correct, False, None)
        gpu.loss_triton(hidden, weight, bias, labels, losses, correct)
        assert_close(losses, exact_losses, torch.float32)  # products of a low dtype are exact in fp32
        assert torch.equal(correct, exact_correct)


def both_losses(logits: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor):
    """(losses, correct) by the softmax of logits [R, V] and by the loss of an identity layer with those logits."""
    for fused in (False, True):
        losses, correct = torch.zeros(len(labels)), torch.zeros(len(labels), dtype=torch.bool)
        if fused:
            weight = logits.t().contiguous()  # [V, R]: logits = I weight^T
            gpu.loss_triton(torch.eye(len(labels)), weight, bias, labels, losses, correct)
        else:
            gpu.softmax_triton_(logits.clone(), bias, labels, losses, correct, False, None)
        yield losses, correct


def test_ties_excluded_classes_huge_logits_and_labels_outside():
    logits = torch.zeros(6, 150)
    logits[1, 100] = 1e38
    bias = torch.zeros(150)
    bias[:64] = -torch.inf  # a whole block is excluded
    labels = torch.tensor([64, 100, 65, 3, 150, -1])
    for losses, correct in both_losses(logits, bias, labels):
        uniform = torch.tensor(86.0).log()
        torch.testing.assert_close(losses[:3], torch.tensor([uniform, 0.0, uniform]))
        assert losses[3] == torch.inf and losses[4:].isnan().all()
        assert correct.tolist() == [True, True, False, False, False, False]


def test_nan_logits_are_a_nan_loss_and_never_correct():
    logits = torch.zeros(2, 70)
    logits[0, 66] = torch.nan
    losses, correct = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    gpu.softmax_triton_(logits, None, torch.zeros(2, dtype=torch.int64), losses, correct, True, None)
    assert losses.isnan().tolist() == [True, False] and correct.tolist() == [False, True]
    gpu.loss_triton(
        torch.tensor([[torch.nan], [1.0]]), torch.zeros(70, 1), None, torch.zeros(2, dtype=torch.int64), losses, correct
    )
    assert losses.isnan().tolist() == [True, False] and correct.tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("wanted", "chunk", "images"),
    [
        ((True, True, True), 1, 26),  # 130 tokens per branch: two chunks
        ((True, True, True), 1 << 22, 3),  # both branches in one
        ((False, False, True), 1 << 22, 3),
        ((False, True, False), 1 << 22, 3),
        ((False, False, False), 1, 3),
    ],
)
def test_the_whole_op(monkeypatch, dtype, wanted, chunk, images):
    monkeypatch.setattr(gpu, "CHUNK_BYTES", chunk)
    p = problem(images, 11, 5, dim=24, classes=83).to(torch.float32)
    p.labels, p.bias = p.labels.repeat_interleave(2)[::2], p.bias.repeat_interleave(2)[::2]  # kernels know no strides
    head = Head(p.norm_weight, p.norm_bias, 1e-6, p.weight, p.bias)
    with torch.no_grad():
        positions = masked_positions(p.mask, p.num_masked)
        labels = p.labels.repeat_interleave(2)[::2]
        ours = gpu.head_losses_triton(p.branches, positions, labels, head, dtype, Wanted(*wanted))
        plain = head_losses(p.branches, positions, p.labels, head, dtype, Wanted(*wanted), Device(1 << 22))
    assert torch.equal(ours.correct, plain.correct)
    floats = [[r.losses, *r.grad_rows, r.grad_norm, r.grad_weight, r.grad_bias] for r in (ours, plain)]
    for a, b in zip(*floats, strict=True):
        assert_close(a, b, dtype)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 4800), (torch.float16, 4800), (torch.float32, 2432)])
def test_a_chunk_of_the_default_problem_is_a_branch_in_low_precision_and_half_of_it_in_fp32(dtype, rows):
    assert gpu.chunk_rows(4800, 8192, dtype) == rows
    assert rows * 8192 * dtype.itemsize <= gpu.CHUNK_BYTES
    assert gpu.chunk_rows(4800, 1 << 24, dtype) == 128  # of as many classes as it may be
    assert gpu.chunk_rows(9, 100, dtype) == 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 24, 65])
@pytest.mark.parametrize("positions", [[], [0], [13], [0, 1, 5, 6, 13], [2, 3, -1], list(range(14))])
def test_rows_are_scattered_among_zeros(positions, dim, dtype):
    rows, at = torch.randn(len(positions), dim).to(dtype), torch.tensor(positions, dtype=torch.int64)
    expected = torch.zeros(14, dim, dtype=dtype)
    expected[at] = rows
    ours = gpu.scatter_rows_triton(guarded(rows), guarded(at), 2, 7)
    assert torch.equal(ours, expected.view(2, 7, dim))
    for factor in (guarded(torch.randn(1)), torch.randn(1, dtype=torch.float64).to(dtype)):
        ours = gpu.scatter_rows_triton(guarded(rows), guarded(at), 2, 7, factor, 0.3, torch.float16)
        assert torch.equal(ours, (expected.float() * (factor.float() * 0.3)).half().view(2, 7, dim))
    overflown = gpu.scatter_rows_triton(rows, at, 2, 7, torch.tensor([torch.inf]), 0.3, torch.float32).view(14, dim)
    kept = torch.ones(14, dtype=torch.bool).index_fill(0, at, False)
    assert not overflown[kept].any() and not overflown[at].isfinite().any()


def test_of_several_missing_positions_the_last_row_stays():
    rows = torch.randn(4, 8)
    ours = gpu.scatter_rows_triton(rows, torch.tensor([1, -1, -1, -1]), 1, 5)
    assert torch.equal(ours[0, [1, 4]], rows[[0, 3]]) and not ours[0, [0, 2, 3]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_known_gradients_times_the_upstream_one(dtype):
    gradient = torch.randn(2, 3, 1000)
    for upstream in (torch.randn(2), torch.ones(1).expand(2), torch.randn(2).to(torch.float16), torch.randn(4)[::2]):
        for known in (guarded(gradient), gradient[:, 1], gradient[:1]):
            ours = gpu.weigh_triton(upstream[: len(known)], known, 7, dtype)
            exact = sum(u.double() / 7 * g.double() for u, g in zip(upstream, known, strict=False))
            assert ours.dtype == dtype
            assert_close(ours, exact, dtype)
