"""A codebook that is a parameter, under FSDP and ZeRO 3: restarts that would be lost are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from beitv2_fast import FusedVectorQuantizer

pytestmark = pytest.mark.slow
WITHOUT_RESTARTS = {"kmeans_init": False, "dead_after": 0.0}


def model(**options: object) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 8), FusedVectorQuantizer(16, 8, **options)).train()


def outcome(net: torch.nn.Module) -> str:
    """What a step ends with."""
    try:
        out = net(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
        (out.loss + out.quantized.square().sum()).backward()
    except RuntimeError as error:
        return str(error)
    return "trained"


def two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh, cpu = init_device_mesh("cpu", (2,)), torch.device("cpu")

    def fsdp2(inner: bool = False, whole: bool = False, **options: object) -> torch.nn.Module:
        net = model(**options)
        if inner:
            fully_shard(net[1], mesh=mesh)
        return fully_shard(net, mesh=mesh, ignored_params={net[1].codebook} if whole else None)

    def fsdp1(whole: bool = False, **options: object) -> torch.nn.Module:
        net = model(**options)
        ignored = [net[1].codebook] if whole else None
        return FullyShardedDataParallel(net, device_id=cpu, use_orig_params=True, ignored_states=ignored)

    gradient = {"learning": "gradient"}
    told = {
        f"{name}, {what}": outcome(shard(**options))
        for name, shard in (("fsdp2", fsdp2), ("fsdp1", fsdp1))
        for what, options in (
            ("restarts", gradient),
            ("no restarts", gradient | WITHOUT_RESTARTS),
            ("kept whole", gradient | {"whole": True}),
            ("buffer", {"learning": "sum_ema"}),
        )
    }
    told["fsdp2, restarts, own group"] = outcome(fsdp2(inner=True, **gradient))
    told["not sharded"] = outcome(model(**gradient))
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def test_restarts_of_a_sharded_codebook_are_refused_and_all_else_trains(tmp_path):
    mp.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        for name, told in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            if ", restarts" in name:
                assert "FSDP leaves only a gathered copy" in told and "sum_ema" in told, (name, told)
            else:
                assert told == "trained", (name, told)


def test_restarts_of_a_codebook_under_zero_3_are_refused():
    pytest.importorskip("deepspeed")
    net = model(learning="gradient")
    net[1].codebook.ds_id = 0  # the mark that DeepSpeed puts on each parameter of ZeRO 3
    assert "DeepSpeed ZeRO 3 leaves only a gathered copy" in outcome(net)
    net = model(learning="gradient", **WITHOUT_RESTARTS)
    net[1].codebook.ds_id = 0
    assert outcome(net) == "trained"
