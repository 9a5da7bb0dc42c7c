"""codebook_search on a real GPU, whichever is there."""

from __future__ import annotations

import pytest
import torch
from beitv2_fast.kernels import codebook_search
from torch.nn.functional import normalize

from .test_codebook_search_triton import assert_lowest_of_equals, assert_nearest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
DEVICE = "cuda"  # ROCm answers to the same name


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(12_544, 8192, 32), (507, 123, 3), (1, 1, 1), (3000, 1000, 768)])
def test_every_dtype_and_shape_finds_the_nearest(n: int, k: int, d: int, dtype: torch.dtype, metric: str) -> None:
    x = torch.randn(n, d, device=DEVICE).to(dtype)
    codebook = normalize(torch.randn(k, d, device=DEVICE), dim=-1)
    found = codebook_search(
        x, codebook, metric=metric, return_normalized=True, return_codes=True, return_distances=True
    )
    assert_nearest(x, codebook, metric, found.indices)
    assert torch.equal(found.codes, codebook[found.indices])
    expected = normalize(x.float(), dim=-1) if metric == "cosine" else x.float()
    torch.testing.assert_close(found.normalized, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.distances, (expected - found.codes).square().sum(-1), rtol=1e-4, atol=1e-5)


def test_near_ties_and_duplicates_on_the_tensor_cores() -> None:
    base = normalize(torch.randn(64, 32, device=DEVICE), dim=-1)
    codebook = base.repeat(64, 1)
    codebook += (torch.randint(-2, 3, codebook.shape, device=DEVICE) * 2.0**-24) * codebook
    codebook[2048:] = codebook[:2048].clone()
    x = base.repeat(8, 1) + 0.01 * torch.randn(512, 32, device=DEVICE)
    indices = codebook_search(x, codebook).indices
    assert_nearest(x, codebook, "cosine", indices)
    assert_lowest_of_equals(codebook.cpu(), indices.cpu())


def test_offsets_beyond_31_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * 2**30:
        pytest.skip(f"needs 14 GiB of GPU memory, {free / 2**30:.0f} are free")
    x = torch.randn(2**31 // 32 + 1000, 32, device=DEVICE, dtype=torch.bfloat16)
    codebook = torch.randn(1000, 32, device=DEVICE)
    indices = codebook_search(x, codebook).indices
    assert_nearest(x[-5000:], codebook, "cosine", indices[-5000:])


def test_no_memory_grows_with_n_times_k() -> None:
    x, codebook = torch.randn(200_000, 32, device=DEVICE), torch.randn(8192, 32, device=DEVICE)
    codebook_search(x, codebook)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    codebook_search(x, codebook)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * 200_000 * 8192
