"""How a command starts: ranks wait for a slow one, loading takes a rank's cores, and what failed leaves no folder."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from beitv2_fast import distributed
from beitv2_fast.config.options import RunConfig
from beitv2_fast.config.training import TrainConfig
from beitv2_fast.data.images import ImageFolder, ImageList
from beitv2_fast.data.loaders import eval_loader
from beitv2_fast.data.views import EvalView
from beitv2_fast.errors import UserError
from beitv2_fast.runs import folder
from beitv2_fast.training import images as images_of_trainings
from beitv2_fast.training.optim import TorchBackend, parameter_groups

from ..support.training import TINY, call, write_images
from .test_interruption import free_port


def wait_for_rank_0(rank: int, port: str, told) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=0.1)  # torch's own: half an hour, ten minutes of NCCL
    world = distributed.start("cpu")
    alone = dist.new_group(timeout=timedelta(seconds=0.5))

    def find() -> str:
        try:
            dist.barrier(alone)  # to which nobody else comes
        except RuntimeError as error:
            return type(error).__name__
        return "was not alone"

    told.put((rank, world.from_rank_0(find), world.gather_objects(rank)))
    world.leave()


def by_ranks(work: Callable, count: int) -> list:
    """What ``work(rank, port, told)`` puts into ``told``, in forked processes that all end with code 0."""
    context = multiprocessing.get_context("fork")
    told, port = context.SimpleQueue(), free_port()
    ranks = [context.Process(target=work, args=(rank, port, told)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * count
    return [told.get() for _ in ranks]


def test_a_rank_0_that_is_slower_than_torch_s_patience_kills_nobody():
    assert sorted(by_ranks(wait_for_rank_0, 2)) == [(rank, "RuntimeError", [0, 1]) for rank in range(2)]


def test_a_port_that_another_training_holds_is_named_with_the_option_that_chooses_one(monkeypatch):
    monkeypatch.setattr(distributed, "end_with_launcher", lambda: None)
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"^Port {port} is taken, .* --master_port"):
            distributed.start("cpu")


@pytest.mark.parametrize(("cores", "ranks", "own"), [(12, "4", 3), (12, "8", 1), (2, "4", 1), (3, None, 3)])
def test_a_rank_loads_with_its_share_of_the_cores_that_the_process_may_use(monkeypatch, cores, ranks, own):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert distributed.own_cores() == own


def test_by_default_there_are_as_many_workers_as_cores_and_never_more_than_batches(tmp_path):
    assert RunConfig().workers == distributed.own_cores()
    dataset = ImageFolder(ImageList(tmp_path, [f"{i}.png" for i in range(4)]), EvalView(16))
    assert [eval_loader(dataset, 2, workers).num_workers for workers in (0, 1, 64)] == [0, 1, 2]


SMALL = [*TINY, "--weights", "none"]


@pytest.mark.parametrize("mistake", ["--data missing", "--data junk", "--batch-size 64", "--data one_class"])
def test_a_start_that_fails_leaves_no_run_folder(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_images(tmp_path / "images" / name, 2)
    write_images(tmp_path / "one_class" / "a", 4)
    for path in write_images(tmp_path / "junk" / "a", 2).iterdir():
        path.write_bytes(b"junk")
    assert call("finetune", *SMALL, "--data", "images", "--out", "runs/new", *mistake.split()) == 2
    assert not (tmp_path / "runs" / "new").exists()


@pytest.mark.parametrize("work", ["teacher_features/a.npy", "results.json", "bad_batch_step_1.safetensors"])
def test_a_start_that_fails_leaves_a_folder_with_work_in_it_and_one_that_was_there(tmp_path, monkeypatch, work):
    def fail(*_, **__):
        (tmp_path / "run" / work).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / work).write_text("{}")
        raise UserError("no")

    data = tmp_path / "images"
    for name in ("a", "b"):
        write_images(data / name, 2)
    with monkeypatch.context() as patch:
        patch.setattr(images_of_trainings, "check_images", fail)
        assert call("finetune", *SMALL, "--data", data, "--out", tmp_path / "run") == 2
    assert (tmp_path / "run" / work).exists()
    (tmp_path / "there").mkdir()
    assert call("finetune", *SMALL, "--data", tmp_path / "missing", "--out", tmp_path / "there") == 2
    assert (tmp_path / "there").exists()


def test_a_long_check_that_fails_at_its_end_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WORK_BYTES", 200)
    data = tmp_path / "images"
    for name, count in (("a", 5), ("b", 4)):
        write_images(data / name, count)
    (data / "a" / "00.png").write_bytes(b"junk")
    mistake = ["--batch-size", 9]  # than which fewer images are left
    assert call("finetune", *SMALL, "--data", data, "--out", tmp_path / "run", *mistake) == 2
    assert len((tmp_path / "run" / "images.jsonl").read_text().splitlines()) == 1 + 9


def train_and_start_again(rank: int, port: str, told) -> None:
    """Eight steps by one backend, and by two of which the second takes the first one's state after four."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world, config = distributed.start("cpu"), TrainConfig(lr=1e-3)

    def trained_weights(*starts: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(13, 13), nn.LayerNorm(13)) for _ in range(4)])
        backend, state = None, None
        for step in range(8):
            if step in starts:
                state = backend and backend.optimizer_state()
                backend = TorchBackend(model, parameter_groups(model, 0.05), config, world)
                if state:
                    backend.restore(state)
            x = torch.randn(16, 13, generator=torch.Generator().manual_seed(10 * step + rank))
            backend.backward(backend.wrapped(x).square().mean(), last=True)
            backend.step(1e-3)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    told.put(torch.equal(trained_weights(0), trained_weights(0, 4)))
    world.leave()


def test_three_ranks_that_start_again_sum_gradients_as_those_that_go_on():
    assert by_ranks(train_and_start_again, 3) == [True] * 3
