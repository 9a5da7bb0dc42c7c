"""masked_gather: the rows under the mask, from any strides and dtype, and their gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beitv2_fast.kernels import masked_gather
from beitv2_fast.kernels.masked_cross_entropy.ops import gather_rows, masked_positions, scatter_rows
from beitv2_fast.kernels.masked_cross_entropy.reference import masked_gather_reference

from ..support.counting import allocations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]


def block_mask(images: int, patches: int, num_masked: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(images, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < num_masked


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_are_those_under_the_mask_for_any_shape_stride_and_dtype(data):
    images, patches, dim = (data.draw(st.integers(low, high)) for low, high in ((0, 4), (1, 9), (0, 5)))
    dtype = data.draw(st.sampled_from(DTYPES))
    whole = torch.randn(images, 1 + patches, 2 * dim).mul(10).to(dtype)
    tokens = data.draw(
        st.sampled_from([whole[:, 1:, :dim], whole[:, 1:, ::2], whole[:, 1:].flip(0), whole[:, 1:].mT.contiguous().mT])
    )
    mask = torch.rand(images, patches) < data.draw(st.floats(0, 1))
    gathered = masked_gather(tokens, mask)
    assert torch.equal(gathered, tokens[mask]) and gathered.is_contiguous()
    assert torch.equal(gathered, masked_gather_reference(tokens, mask, None))


def test_known_count_gives_the_same_rows():
    tokens, mask = torch.randn(3, 12, 5)[:, 1:], block_mask(3, 11, 4)
    assert torch.equal(masked_gather(tokens, mask, num_masked=4), tokens[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_scattered_into_zeros(dtype):
    tokens, mask = torch.randn(3, 12, 5, dtype=dtype, requires_grad=True), block_mask(3, 11, 4)
    upstream = torch.randn(12, 5).to(dtype)
    (ours,) = torch.autograd.grad(masked_gather(tokens[:, 1:], mask, num_masked=4), tokens, upstream)
    (theirs,) = torch.autograd.grad(tokens[:, 1:][mask], tokens, upstream)
    assert torch.equal(ours, theirs)


def test_differentiable_twice():
    tokens, mask = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), block_mask(2, 5, 2)
    assert torch.autograd.gradcheck(lambda t: masked_gather(t, mask), tokens)
    assert torch.autograd.gradgradcheck(lambda t: masked_gather(t, mask), tokens)


def test_a_slice_is_not_copied():
    tokens, mask = torch.randn(16, 101, 64), block_mask(16, 100, 10)
    peak, _, _ = allocations(lambda: masked_gather(tokens[:, 1:], mask, num_masked=10))
    assert peak < 3 * 160 * 64 * 4 < tokens.numel() * 4


def test_mask_that_disagrees_with_the_count_is_named():
    mask = block_mask(3, 11, 4)
    mask[1, :] = False
    with pytest.raises(ValueError, match=r"num_masked = 4, but image 1 .* has 0 masked patches \(1 of 3"):
        masked_gather(torch.randn(3, 11, 5), mask, num_masked=4)


@pytest.mark.parametrize("mask", [torch.ones(3, 11), torch.ones(33, dtype=torch.bool)])
def test_wrong_masks_are_refused(mask):
    with pytest.raises(ValueError, match="mask must be bool"):
        masked_gather(torch.randn(3, 11, 5), mask)


def test_tokens_with_the_class_token_are_refused():
    with pytest.raises(ValueError, match="Leave the CLS token out"):
        masked_gather(torch.randn(3, 12, 5), block_mask(3, 11, 4))


def test_ops_pass_opcheck():
    tokens, mask = torch.randn(2, 6, 3, requires_grad=True), block_mask(2, 6, 2)
    positions = masked_positions(mask, 2)
    torch.library.opcheck(masked_positions, (mask, 2))
    torch.library.opcheck(masked_positions, (mask, None))
    torch.library.opcheck(gather_rows, (tokens, positions))
    torch.library.opcheck(scatter_rows, (torch.randn(4, 3, requires_grad=True), positions, 2, 6))


@pytest.mark.parametrize("num_masked", [2, None])
def test_compiles_without_a_graph_break(monkeypatch, tmp_path, num_masked):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tokens, mask = torch.randn(2, 7, 3, requires_grad=True), block_mask(2, 6, 2)

    def run(tokens):
        return masked_gather(tokens[:, 1:], mask, num_masked=num_masked).square().sum()

    compiled = torch.compile(run, fullgraph=True)
    (ours,), (theirs,) = (torch.autograd.grad(f(tokens), tokens) for f in (compiled, run))
    assert torch.equal(ours, theirs)
