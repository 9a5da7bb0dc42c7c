"""masked_gather on a GPU: the rows of plain indexing, exactly, and their gradient."""

from __future__ import annotations

import pytest
import torch

from beitv2_fast.kernels import masked_gather

from ..support.gpu import DRY, HERE, no_waiting
from .test_masked_gather import DTYPES, block_mask

pytestmark = pytest.mark.gpu


def problem(images: int, patches: int, num_masked: int, dim: int, dtype: torch.dtype = torch.float32):
    tokens = torch.randn(images, 1 + patches, dim, device=HERE).mul(10).to(dtype)
    return tokens, block_mask(images, patches, num_masked).to(HERE)


@pytest.mark.parametrize("known", [True, False], ids=["known count", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "patches", "num_masked", "dim"), [(5, 49, 20, 96), (1, 1, 1, 1), (1, 9, 0, 8)])
def test_rows_are_those_under_the_mask(images, patches, num_masked, dim, dtype, known):
    tokens, mask = problem(images, patches, num_masked, dim, dtype)
    if not known and num_masked:
        mask[0] = False
    for branch in (tokens[:, 1:], tokens[:, 1:].mT.contiguous().mT, tokens[:, 1:].flip(0)):
        rows = masked_gather(branch, mask, num_masked=num_masked if known else None)
        assert torch.equal(rows, branch[mask]) and rows.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_is_scattered_into_zeros(dtype):
    tokens, mask = problem(4, 30, 11, 24, dtype)
    tokens.requires_grad_()
    for upstream in (torch.randn(44, 24, device=HERE).to(dtype), torch.ones(1, 1, device=HERE, dtype=dtype)):
        upstream = upstream.expand(44, 24)
        (ours,) = torch.autograd.grad(masked_gather(tokens[:, 1:], mask, num_masked=11), tokens, upstream)
        (theirs,) = torch.autograd.grad(tokens[:, 1:][mask], tokens, upstream)
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(DRY, reason="on the CPU such a mask is an error")
def test_surplus_positions_are_left_out_and_missing_ones_read_the_last_token():
    tokens, mask = problem(3, 9, 4, 5)
    assert torch.equal(masked_gather(tokens[:, 1:], mask, num_masked=3), tokens[:, 1:][mask][:9])
    missing = masked_gather(tokens[:, 1:], mask, num_masked=5)
    assert torch.equal(missing[:12], tokens[:, 1:][mask]) and torch.equal(missing[12:], tokens[-1, -1].expand(3, 5))


def test_with_a_known_count_the_host_waits_for_nothing():
    tokens, mask = problem(3, 9, 4, 5)
    tokens.requires_grad_()
    with no_waiting():
        rows = masked_gather(tokens[:, 1:], mask, num_masked=4)
        rows.sum().backward()
    assert torch.equal(rows, tokens[:, 1:][mask])
    assert torch.equal(tokens.grad[:, 1:], mask[..., None].expand(3, 9, 5).float())
