"""Section head: the masked-token head, forward and backward, beside its peers; and by the size of its chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu.peers import HEADS
from bench.gpu.run import Run
from bench.harness import DEVICE, OURS
from bench.test_masked_cross_entropy import IMPLEMENTATIONS, Head, problem

TINY_HEAD = (2, 16, 5, 64, 128)  # images, patches, masked ones, width, vocabulary
CHUNKS = (24, 25)  # log2 of the logits that are built at once, beside the default
PRECISIONS = {"bf16 autocast": torch.bfloat16, "fp32": torch.float32, "fp32, TF32 products": torch.float32}


def backward(name: str, p: Head, dtype: torch.dtype, tf32: bool = False) -> Callable[[], object]:
    """A forward and backward of an implementation: gradients of all leaves."""
    implementation = {**IMPLEMENTATIONS, **HEADS}[name]

    def run() -> object:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return torch.autograd.grad(_forward(implementation, p, dtype), p.leaves, allow_unused=True)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def head(run: Run) -> None:
    from beitv2_fast.kernels.masked_cross_entropy import triton as host

    p = problem(*TINY_HEAD) if run.tiny else problem()
    rows, (vocabulary, width) = 2 * len(p.labels), p.weight.shape
    group = f"M={rows} C={width} V={vocabulary}"
    work = {"flops": 6.0 * rows * width * vocabulary}
    for precision, dtype in PRECISIONS.items():
        peers = {**IMPLEMENTATIONS, **(HEADS if dtype == torch.bfloat16 else {})}
        for name in peers:
            if name == "torch.compile" and run.tiny:
                continue  # compiles for half a minute
            make = partial(backward, name, p, dtype, "TF32" in precision)
            run.time(name, make, group=f"{group}, {precision}", **work)
        with run.item("agreement", group=f"{group}, {precision}"), torch.no_grad():
            losses = {name: float(_forward(peers[name], p, dtype)) for name in (OURS, "eager")}
            run.say("agreement", group=f"{group}, {precision}", losses=losses)
    with run.item("no gradient", group=group):
        call = torch.no_grad()(partial(_forward, IMPLEMENTATIONS[OURS], p, torch.bfloat16))
        run.time_call(f"{OURS}, no gradient", call, group=f"{group}, bf16 autocast", flops=work["flops"] / 3)
    for bits in CHUNKS[:1] if run.tiny else CHUNKS:
        with patch.object(host, "CHUNK_BYTES", torch.bfloat16.itemsize << bits):
            make = partial(backward, OURS, p, torch.bfloat16)
            run.time(f"{OURS}, chunks of 2^{bits} logits", make, group=f"{group}, bf16 autocast", **work)


def _forward(implementation: Callable[[Head], Tensor], p: Head, dtype: torch.dtype) -> Tensor:
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
        return implementation(p)
