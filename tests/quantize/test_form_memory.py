"""No form of the quantizer allocates a tensor of N x K elements, of whatever type, in any step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from beitv2_fast import FusedVectorQuantizer, GroupedResidualVectorQuantizer, ResidualVectorQuantizer
from beitv2_fast.kernels import codebook_search, codebook_update
from beitv2_fast.kernels.codebook_search import reference
from beitv2_fast.quantize import soft
from beitv2_fast.quantize.soft import (
    code_cross_entropy,
    diversity_loss,
    entropies,
    index_backpropagation,
    soft_assignment,
)

N, K, D = 512, 2048, 16
MODULES: dict[str, Callable[[], nn.Module]] = {
    "moving average of codes": lambda: FusedVectorQuantizer(K, D, dead_after=0.1),
    "moving average of sums": lambda: FusedVectorQuantizer(K, D, metric="euclidean", dead_below=1.0),
    "learnt": lambda: FusedVectorQuantizer(K, D, learning="gradient", gradient="rotation"),
    "SimVQ": lambda: FusedVectorQuantizer(K, D, metric="euclidean", transform=nn.Linear(D, D)),
    "drawn": lambda: FusedVectorQuantizer(K, D, temperature=1.0),
    "heads": lambda: FusedVectorQuantizer(K, D, heads=2, share_codebook=True),
    "product": lambda: FusedVectorQuantizer(K, D, heads=2, restart_below=0.9, restart_after=4),
    "residual": lambda: ResidualVectorQuantizer(K, D, 2, dropout=0.5),
    "residual, one codebook": lambda: ResidualVectorQuantizer(K, D, 2, share_stages=True),
    "grouped residual": lambda: GroupedResidualVectorQuantizer(K, D, 2, groups=2),
}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "4 nearest": lambda x, codes: codebook_search(x, codes, k=4),
    "soft assignment": lambda x, codes: soft_assignment(x, codes)[1].square().sum().backward(),
    "entropies": lambda x, codes: sum(entropies(x, codes)).backward(),
    "index backpropagation": lambda x, codes: index_backpropagation(x, codes)[0].sin().sum().backward(),
    "cross entropy": lambda x, codes: code_cross_entropy(x, codes, torch.arange(N)).backward(),
    "diversity": lambda x, codes: diversity_loss(
        x.view(8, 1, -1, D), codes[None], metric="euclidean", temperature=1.0
    ).backward(),
    "diversity of one place": lambda x, codes: diversity_loss(
        x[None, None], codes[None], metric="euclidean", temperature=1.0
    ).backward(),
    "one-off update": lambda x, codes: codebook_update(codes.detach(), torch.ones(K), x.detach(), torch.arange(N)),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (reference, soft):
        monkeypatch.setattr(module, "CHUNK_SCORES", 1 << 16)


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest block that torch's allocator handed out in the call, inside the ops, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events, sizes = [*record.profiler.kineto_results.experimental_event_tree()], [0]
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            sizes.append(event.extra_fields.alloc_size)
    return max(sizes)


def vectors() -> Tensor:
    return torch.randn(4, N // 4, D, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("form", MODULES)
def test_a_module_s_steps_allocate_no_matrix_of_vectors_times_codes(form):
    """The steps of k-means, of dead codes and of a collapse among them."""
    quantizer, z = MODULES[form](), vectors()

    def run() -> None:
        for _ in range(8):
            out = quantizer(z)
            (out.loss + out.quantized.sum()).backward()
        quantizer.eval().encode(z)
        quantizer(z)

    assert N * D < largest_allocation(run) < N * K


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_allocates_no_matrix_of_vectors_times_codes(function):
    x, codes = vectors().flatten(0, 1), torch.randn(K, D, requires_grad=True)
    assert N * D < largest_allocation(lambda: FUNCTIONS[function](x, codes)) < N * K


def test_beams_hold_the_rests_of_the_sums_that_they_look_on_and_no_more():
    quantizer, beam, width = ResidualVectorQuantizer(64, 64, 3, eval_beam_size=4, kmeans_init=False).eval(), 4, 64
    z = torch.randn(N, width)
    assert largest_allocation(lambda: quantizer.encode(z)) == N * beam * width * z.itemsize


def test_distances_of_the_k_nearest_codes_hold_no_vector_for_each_of_them():
    x, codes, k = vectors().flatten(0, 1), torch.randn(K, D), 32
    assert N * k <= largest_allocation(lambda: codebook_search(x, codes, k=k, return_distances=True)) < N * k * D


def test_a_matrix_of_one_byte_for_each_pair_would_be_seen():
    x, codes = vectors().flatten(0, 1), torch.randn(K, D)
    assert largest_allocation(lambda: (x[:, None, 0] > codes[:, 0]).any()) == N * K
