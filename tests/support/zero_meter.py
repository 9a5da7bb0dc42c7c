"""`torchrun zero_meter.py CONFIG...`: what a rank holds and sends in a step under DeepSpeed settings, counted, as JSON.

Bytes sent: those of each call's tensor, times 2 (n-1)/n for an all-reduce, else (n-1)/n, as a ring of n ranks sends.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import nn

sent: Counter = Counter()


def count(name: str, passes: int, tensor_at: int, keyword: str) -> None:
    call = getattr(dist, name)

    def counting(*args, **kwargs):
        tensor = kwargs[keyword] if keyword in kwargs else args[tensor_at]
        ranks = dist.get_world_size()
        sent[name] += passes * tensor.numel() * tensor.element_size() * (ranks - 1) / ranks
        return call(*args, **kwargs)

    setattr(dist, name, counting)


# Before DeepSpeed is imported, which keeps references. Of a gather the whole is the output, of a scatter the input.
OPERATIONS = [
    ("all_reduce", 2, 0, "tensor"),
    ("reduce", 1, 0, "tensor"),
    ("broadcast", 1, 0, "tensor"),
    ("all_gather_into_tensor", 1, 0, "output_tensor"),
    ("reduce_scatter_tensor", 1, 1, "input"),
]
for operation in OPERATIONS:
    count(*operation)

from beitv2_fast.config.training import PretrainConfig  # noqa: E402
from beitv2_fast.distributed import run_main, start  # noqa: E402
from beitv2_fast.training.deepspeed import DeepSpeedBackend  # noqa: E402

WIDTH, DEPTH = 64, 6


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def measure(file: str, accumulate: int) -> dict:
    world = start("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])
    config = PretrainConfig(deepspeed_config=Path(file), accumulate=accumulate, precision="fp32")
    backend = DeepSpeedBackend(model, [{"params": list(model.parameters()), "weight_decay": 0.0}], config, world)
    parameters, optimizer = list(model.parameters()), backend.optimizer
    for _ in range(2):  # the first step of ZeRO 3 records the order of the modules
        sent.clear()
        for i in range(accumulate):
            backend.backward(backend.wrapped(torch.randn(3, WIDTH)).square().mean(), i + 1 == accumulate)
        gradients = size(p.grad for p in parameters)
        if backend.stage in (1, 2):
            counted = {p.grad.data_ptr() for p in parameters if p.grad is not None}
            kept = {t.data_ptr(): t for part in optimizer.averaged_gradients.values() for t in part or []}
            gradients += size(tensor for address, tensor in kept.items() if address not in counted)
        if backend.stage == 3:
            gradients += size([optimizer.grad_partitions_flat_buffer])
        backend.step(1e-3)
    masters = optimizer.single_partition_of_fp32_groups if backend.stage in (1, 2) else []
    return {
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "weights": size(getattr(p, "ds_tensor", p) for p in parameters),
        "gradients": gradients,
        "moments": size(own[key] for own in backend.base.state.values() for key in ("exp_avg", "exp_avg_sq")),
        "master": size(masters),
        "sent": sum(sent.values()),
    }


def main() -> None:
    files = sys.argv[1:]
    results = {f"{Path(f).stem} x{a}": measure(f, a) for f in files for a in (1, 2)}
    if dist.get_rank() == 0:
        print("\nRESULTS " + json.dumps(results), flush=True)


run_main(main)
