"""How a training starts: its config, its ranks and what makes its steps, from the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from ..config.options import parse
from ..config.training import TrainConfig
from ..distributed import World, start
from ..models.attention import choose_attention
from ..runs.checkpoints import Checkpoints
from ..runs.folder import RunFolder
from .capture import check_capture
from .deepspeed import DeepSpeedBackend
from .optim import TorchBackend
from .task import AfterEpoch

Own = TypeVar("Own", bound=TrainConfig)
Backend = type[TorchBackend] | type[DeepSpeedBackend]


def launched(cls: type[Own], presets: Mapping[str, Own], argv: Sequence[str] | None) -> tuple[Own, World, Backend]:
    """The config, this rank among the others, and the backend: DeepSpeed if its launcher started this process or its
    JSON is given; else torch, with DDP where there are several ranks."""
    config, local_rank = parse(cls, presets, argv)
    world = start(config.device)
    deepspeed = local_rank is not None or config.deepspeed_config is not None
    return config, world, DeepSpeedBackend if deepspeed else TorchBackend


def open_run(config: TrainConfig, world: World, backend: Backend) -> RunFolder:
    """The run folder of a training, once the options that need no images are seen to work here."""
    choose_attention(config.attention, world.device.type)
    backend.check(config, world.device)
    check_capture(config, world, backend is DeepSpeedBackend)
    return RunFolder(config, world.rank)


def evaluate_newest(
    config: TrainConfig, world: World, models: Mapping[str, nn.Module], validation: Callable[[RunFolder], AfterEpoch]
) -> int:
    """--evaluate: what ``validation`` does after an epoch, for the models of the newest checkpoint (step 0: there is
    none); the exit code."""
    run = RunFolder(config, world.rank)
    step = max((int(file.name.removeprefix("step_")) for file in Checkpoints(run.checkpoints).all()), default=0)
    validation(run)(step, {name: model.to(world.device) for name, model in models.items()}, lambda: None)
    run.close()
    return 0
