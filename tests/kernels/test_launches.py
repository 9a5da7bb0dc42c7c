"""Every Triton kernel launched by its host code as the JIT would specialize it, for GPUs that are not here.

Compiled ahead of time (test_*_aot.py), a kernel has the signature that the test wrote down; here it has the one that
its arguments give it: sizes of 1, strides, absent tensors, addresses that are no multiples of 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beitv2_fast import FusedVectorQuantizer
from beitv2_fast.kernels.codebook_search.ops import codebook_search_op
from beitv2_fast.kernels.codebook_update import ops as update_ops
from beitv2_fast.kernels.masked_cross_entropy import ops as head_ops
from beitv2_fast.kernels.masked_cross_entropy.chunked import Head, Wanted
from beitv2_fast.kernels.registration import Op
from beitv2_fast.kernels.vector_quantize import ops as quantize_ops
from beitv2_fast.quantize import collapse

from ..support.dispatched import READS, Dispatched
from ..support.launches import Launch, launching
from ..support.masked_problem import problem

pytest.importorskip("triton")
from triton.runtime import driver

from beitv2_fast.kernels.attention import triton as attention
from beitv2_fast.kernels.block_masks.triton import block_masks_triton
from beitv2_fast.kernels.codebook_search import triton as search
from beitv2_fast.kernels.codebook_update import triton as update
from beitv2_fast.kernels.gelu.triton import gelu_and_gradient_triton
from beitv2_fast.kernels.gpu import target_name
from beitv2_fast.kernels.masked_cross_entropy import triton as head
from beitv2_fast.kernels.residual_norm import triton as residual
from beitv2_fast.kernels.vector_quantize import triton as quantize

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
METRICS = ("cosine", "euclidean")


@pytest.fixture(params=["sm_90", "gfx942"])
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def launches(target: str) -> Iterator[list[Launch]]:
    search.autotuned.cache_clear()
    with launching(target) as launches:
        yield launches
    search.autotuned.cache_clear()  # what it timed here is nothing
    assert launches and not [launch for launch in launches if not launch.fits]


@pytest.mark.parametrize("name", ["sm_90", "sm_100", "gfx942"])
def test_the_driver_is_asked_for_its_gpu_once(name, monkeypatch) -> None:
    with launching(name):
        assert target_name() == name
        monkeypatch.setattr(driver.active, "target", None)
        assert target_name() == name


def find(x: Tensor, codebook: Tensor, metric: str, split: int | None = None, outputs: bool = True) -> None:
    search.codebook_search_triton(x, codebook, metric, outputs, outputs, outputs, split=split)


@pytest.mark.parametrize(
    ("n", "k", "d", "dtype", "split", "metric"),
    [
        (1, 1, 1, FP32, 1, "euclidean"),
        (1, 300, 33, BF16, 2, "cosine"),
        (12_544, 8192, 768, FP16, 1, "cosine"),
        (300, 20_000, 1000, BF16, 8, "cosine"),
        (300, 20_000, 1000, BF16, 8, "euclidean"),
    ],
)
def test_the_search_fits(n: int, k: int, d: int, dtype: torch.dtype, split: int, metric: str, launches, target) -> None:
    find(torch.empty(n, d, dtype=dtype), torch.empty(k, d), metric, split)
    tried = {(launch.kernel, launch.num_warps) for launch in launches}
    assert {("screen", config.num_warps) for config in search.PLANS[target].configs_for(d)} < tried


def test_the_search_fits_whatever_is_one_or_strided(launches) -> None:
    find(torch.empty(70, 33), torch.empty(1, 33), "euclidean")
    find(torch.empty(70, 1, dtype=FP16), torch.empty(300, 1, dtype=FP16), "cosine", outputs=False)
    find(torch.empty(64, 80).T[:, ::2], torch.empty(40, 200).T.unflatten(0, (4, 50))[..., :32], "cosine")
    find(torch.empty(1, 2048).expand(5, -1), torch.empty(30, 2049, dtype=BF16)[:, 1:], "euclidean")


@pytest.mark.parametrize(("k", "d", "dtype", "metric"), [(1, 1, FP32, "cosine"), (64, 1000, BF16, "euclidean")])
def test_the_k_nearest_fit(k: int, d: int, dtype: torch.dtype, metric: str, launches) -> None:
    search.nearest_codes_triton(torch.empty(70, 2 * d, dtype=dtype)[:, ::2], torch.empty(d, 300).T, metric, k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d", "dtype"), [(1, 1, 1, FP32), (77, 300, 33, FP16), (12_544, 8192, 768, FP32)])
def test_the_draws_fit(n: int, k: int, d: int, dtype: torch.dtype, metric: str, launches) -> None:
    x, keys = torch.empty(d, n, dtype=dtype).T, torch.empty(n, dtype=torch.int64)
    for temperature in (0.7, 1.0):
        search.draw_codes_triton(x, torch.empty(k, d), metric, temperature, keys)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d", "dtype"), [(1, 1, 1, FP32), (1, 300, 33, FP16), (77, 5, 2048, FP32)])
def test_the_update_and_the_gradient_fit(n: int, k: int, d: int, dtype: torch.dtype, metric: str, launches) -> None:
    x, indices = torch.empty(n, d, dtype=dtype), torch.empty(n, dtype=torch.int64)
    statistics = update.codebook_statistics_triton(x, indices, k, metric)
    update.count_uses_triton(*torch.empty(3, 2, k, dtype=torch.int64), torch.tensor(0))
    update.count_uses_triton(*torch.empty(2, k, dtype=torch.int64), None, None)
    for average in (None, torch.empty(k, d)) if metric == "cosine" else (torch.empty(k, d),):
        update.apply_statistics_triton(statistics, torch.empty(k, d), torch.empty(k), average, 0.99, metric, 1e-5)
    quantized, loss = torch.empty(n, d), torch.ones(())
    for grad, grad_loss in ((quantized, loss), (None, loss), (loss.expand(n, d), None)):
        quantize.vector_quantize_backward_triton(x, quantized, grad, grad_loss, 1.0, metric)


@pytest.mark.parametrize("groups", [1, 4])
def test_an_update_is_two_kernels_and_one_more_with_averages(groups, launches) -> None:
    x, indices, codebook = torch.empty(40, 8), torch.empty(40, dtype=torch.int64), torch.empty(groups, 9, 8)
    statistics = update.codebook_statistics_triton(x, indices, 9, "cosine", groups)
    for average in (None, codebook):
        update.apply_statistics_triton(statistics, codebook, codebook[..., 0].clone(), average, 0.99, "cosine", 1e-5)
    names = [launch.kernel for launch in launches]
    assert names == ["statistics_kernel", "codes_kernel", "sizes_kernel", "codes_kernel"]


def within(ops: tuple[Op, ...], monkeypatch) -> Dispatched:
    """Sees what a GPU's implementations of the ops ask torch for."""
    seen = Dispatched()
    for op in ops:
        for device, own in tuple(op._backend_fns.items()):
            monkeypatch.setitem(op._backend_fns, device, seen.within(op._backend_fns.get("cuda", own)))
    return seen


def of_torch_alone(seen: Dispatched) -> list[str]:
    names = seen.counts.elements()
    return sorted(name for name in names if not name.startswith("beitv2_fast") and name not in READS)


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(("chunks", "most"), [(1, 16), (2, 29)])
def test_launches_of_the_head_do_not_creep_up(chunks, most, launches, monkeypatch) -> None:
    """Forward and backward in fp32; of both branches in one chunk, and of each in two."""
    seen = within((head_ops.masked_cross_entropy_op, head_ops.with_gradient_backward), monkeypatch)
    monkeypatch.setattr(head, "CHUNK_BYTES", (2 * 256 if chunks == 1 else 128) * 64 * 4)
    p = problem(2, 130, 128, dim=32, classes=64)
    p = replace(p, tokens=[branch.detach().requires_grad_() for branch in p.branches])
    monkeypatch.setattr(type(p), "branches", p.tokens)
    upstream = torch.ones(2)
    with seen:
        torch.autograd.grad(p.ours()[0], p.leaves, upstream)
    of_kernels, of_torch = [launch.kernel for launch in launches], of_torch_alone(seen)
    assert len(of_kernels) >= 8 and len(of_kernels) + len(of_torch) <= most, (of_kernels, of_torch)


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_a_training_step_of_the_quantizer_is_at_most_eleven_launches_with_any_heads(launches, monkeypatch) -> None:
    """Those of kernels, and of torch's ops, also within the package's, but for the one that counts the host's clock."""
    monkeypatch.setattr(collapse, "host_waits_for", lambda x: True)
    ops = (quantize_ops.quantize, quantize_ops.quantize_backward, collapse.replace_dead_codes, codebook_search_op,
           update_ops.codebook_statistics, update_ops.apply_statistics, update_ops.count_uses)  # fmt: skip
    seen = within(ops, monkeypatch)
    x, one, steps = torch.randn(40, 8, requires_grad=True), torch.ones(()), []
    for heads in (1, 4):
        quantizer = FusedVectorQuantizer(64, 8, heads=heads, kmeans_init=False)
        for _ in range(3):  # by then the host knows its clock, and the screening's configurations are tried
            launches.clear()
            seen.counts.clear()
            with seen:
                torch.autograd.grad(quantizer(x).loss, x, one)
        steps.append(([launch.kernel for launch in launches], of_torch_alone(seen)))
    (of_kernels, of_torch), with_heads = steps
    assert len(of_kernels) >= 8 and len(of_kernels) + len(of_torch) - 1 <= 11, (of_kernels, of_torch)
    assert with_heads == (of_kernels, of_torch)


def test_the_update_and_the_gradient_fit_with_strides(launches) -> None:
    x, pairs = torch.empty(40, 60, dtype=BF16).T, torch.empty(60, 2, dtype=torch.int64)
    update.codebook_statistics_triton(x[:, 1:], pairs[:, 1], 9, "cosine")
    quantize.vector_quantize_backward_triton(
        x[:, ::2], torch.empty(60, 40)[:, ::2], torch.empty(20, 60).T, None, 1.0, "cosine"
    )


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(FP32, "tokens norm head"), (FP32, ""), (BF16, "tokens norm head"), (BF16, "norm"), (FP16, "")],
)
@pytest.mark.parametrize(
    ("images", "patches", "masked", "width", "classes", "bias"),
    [
        (1, 1, 1, 32, 64, True),
        (2, 9, 1, 1, 1, False),
        (1, 49, 20, 768, 8192, True),
        (4, 49, 35, 96, 1000, True),
        (1, 9, 2, 32, 20_000, True),
    ],
)
def test_the_head_fits(images, patches, masked, width, classes, bias, dtype, wanted, launches, monkeypatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 128 * classes * dtype.itemsize)  # the last problem has two chunks
    count = images * masked
    branches = [torch.zeros(images, 1 + patches, width, dtype=dtype)[:, 1:] for _ in range(2)]
    weight = torch.zeros(classes, width, dtype=dtype)
    wanted = Wanted(*(name in wanted for name in Wanted._fields))
    layers = Head(torch.zeros(width), torch.zeros(width), 1e-6, weight, torch.zeros(classes) if bias else None)
    positions, labels = torch.zeros(2, count, dtype=torch.int64)
    head.head_losses_triton(branches, positions, labels, layers, dtype, wanted)


@pytest.mark.parametrize(("stream", "branch"), [(FP32, BF16), (FP32, FP32), (FP16, FP16)])
@pytest.mark.parametrize("width", [1, 33, 384, 2048])
@pytest.mark.parametrize(("images", "tokens"), [(1, 1), (3, 65)])
def test_residual_and_norm_fit(images, tokens, width, stream, branch, launches) -> None:
    x, row, keep = torch.empty(images, tokens, width, dtype=stream), torch.empty(width), torch.empty(images)
    narrow, statistics = x.to(branch), torch.empty(images * tokens)
    for b, gamma, kept, norm in (
        (narrow, row, keep, row),
        (narrow, row, None, None),
        (narrow, None, None, row),
        (None, None, None, row),
    ):
        residual.residual_norm_triton(x, b, gamma, kept, 0.9, norm, norm, 1e-6, stream, branch)
        normed = (None,) * 4 if norm is None else (narrow, x, statistics, statistics)
        of_branch = None if b is None else branch
        residual.residual_norm_backward_triton(x, *normed, b, gamma, kept, 0.9, norm, stream, of_branch)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("images", "patches", "masked", "width"), [(1, 1, 1, 1), (64, 196, 75, 768), (2, 9, 0, 33)])
def test_the_gradients_fit(images, patches, masked, width, dtype, launches) -> None:
    rows, upstream = torch.zeros(images * masked, width, dtype=dtype), torch.ones(1).expand(2)
    scattered = rows, torch.arange(len(rows)), images, patches
    head.scatter_rows_triton(*scattered)
    head.scatter_rows_triton(*scattered, upstream[1:], 0.1, FP32)
    head.weigh_triton(upstream, torch.zeros(2, patches, width), 7, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (64, 1536)])
def test_gelu_and_gradient_fits(shape, dtype, launches) -> None:
    x = torch.empty(shape, dtype=dtype)
    gelu_and_gradient_triton(x, x.T.contiguous().T)


@pytest.mark.parametrize(("side", "masked"), [(1, 1), (14, 75), (64, 1600)])
def test_the_masks_fit(side, masked, launches) -> None:
    block_masks_triton(torch.zeros(3, dtype=torch.int64), side, side, masked, 1, 0.3, masked)


def test_the_loss_without_logits_takes_more_tokens_than_65535_blocks(launches) -> None:
    rows = 65536 * 128
    labels, losses = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    hidden, weight = torch.empty(rows, 1, dtype=BF16), torch.empty(1, 1, dtype=BF16)
    head.loss_triton(hidden, weight, None, labels, losses, torch.empty(rows, dtype=torch.bool))


@pytest.mark.parametrize(
    ("images", "tokens", "heads", "width", "dtype"),
    [(1, 1, 1, 1, BF16), (1, 17, 1, 24, FP16), (3, 50, 2, 16, FP16), (2, 1025, 2, 128, BF16)],
)
def test_attention_fits(images, tokens, heads, width, dtype, launches) -> None:
    qkv, grad = torch.empty(images, tokens, 3, heads, width, dtype=dtype), torch.empty(images, tokens, heads, width)
    bias = torch.empty(tokens, heads, tokens).transpose(0, 1)
    for given, of_bias in ((bias, True), (bias, False), (None, False)):
        out, lse = attention.attention_triton(qkv, given, 0.5)
        attention.attention_backward_triton(grad.to(dtype), qkv, given, out, lse, 0.5, of_bias)
    assert len({launch.kernel for launch in launches}) >= 4
