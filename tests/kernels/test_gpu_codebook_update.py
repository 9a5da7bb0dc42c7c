"""codebook_update and vector_quantize on a GPU: the bits of the CPU, the gradients of the definition."""

from __future__ import annotations

import pytest
import torch
from beitv2_fast.kernels import vector_quantize
from beitv2_fast.kernels.codebook_update.ops import codebook_statistics
from beitv2_fast.kernels.vector_quantize.reference import vector_quantize_reference

from .codebook_states import METRICS, State, make_batch, make_state, update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def on_gpu(state: State) -> State:
    tensors = (state.codebook, state.cluster_size, state.embed_avg, state.idle)
    return State(*(None if tensor is None else tensor.cuda() for tensor in tensors))


def on_cpu(state: State) -> State:
    tensors = (state.codebook, state.cluster_size, state.embed_avg, state.idle)
    return State(*(None if tensor is None else tensor.cpu() for tensor in tensors))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "num_codes", "dim"), [(5000, 300, 32), (777, 1, 33), (1000, 50, 256), (0, 4, 8)])
def test_five_steps_have_the_bits_of_the_cpu(count, num_codes, dim, dtype, metric):
    here = make_state(num_codes, dim, average=metric == "euclidean")
    there = on_gpu(here)
    for step in range(5):
        x, indices = make_batch(count, num_codes, dim, seed=step)
        x, restart = x.to(dtype), dict(dead_below=0.5, dead_after=9000, restart_seed=step if step == 3 else None)
        bins = update(here, x, indices, metric=metric, **restart)
        assert torch.equal(update(there, x.cuda(), indices.cuda(), metric=metric, **restart).cpu(), bins)
        assert on_cpu(there).same_bits(here)


def test_a_popular_code_has_the_bits_of_the_cpu():
    x, indices = make_batch(20_000, 300, 32)
    indices = torch.where(torch.arange(20_000) % 10 > 0, 7, indices)
    actual = codebook_statistics(x.cuda(), indices.cuda(), 300, "cosine")
    assert torch.equal(actual.cpu(), codebook_statistics(x, indices, 300, "cosine"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codebook_weight", [0.0, 0.5])
def test_gradients_of_vector_quantize_agree_with_the_definition(metric, codebook_weight):
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, 32, generator=generator).cuda() for n in (1000, 50))
    gradients = []
    for op in (vector_quantize, vector_quantize_reference):
        leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        if op is vector_quantize:
            options = dict(metric=metric, commitment_weight=0.25, codebook_weight=codebook_weight)
            quantized, _, loss, _ = op(*leaves, **options)
        else:
            quantized, _, loss, _ = op(*leaves, metric, 0.25, codebook_weight)
        (loss + quantized.square().mean()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
