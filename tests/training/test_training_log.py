"""What the log of a training hands to its task."""

from __future__ import annotations

import torch

from beitv2_fast.config.training import TrainConfig
from beitv2_fast.distributed import World
from beitv2_fast.runs.folder import RunFolder
from beitv2_fast.training.monitor import TrainingLog
from beitv2_fast.training.optim import Schedule


class Pictured:
    name = "pictured"

    def pictures(self, batch):
        self.batch = batch
        return {}


def test_pictures_are_made_of_one_image_on_the_device_that_trains(tmp_path):
    config = TrainConfig(out=tmp_path / "run", batch_size=4, epochs=1, log_every=100)
    task, world = Pictured(), World(0, 1, torch.device("meta"))
    with TrainingLog(task, RunFolder(config), world, Schedule.of(config, 8, 1), config, 0) as log:
        for step in (1, 2):
            assert not hasattr(task, "batch")  # only at the end of the epoch
            log.add(step, 1e-3, {}, {"image": torch.zeros(4, 3, 2, 2), "index": torch.arange(4)})
    assert {name: (value.device.type, len(value)) for name, value in task.batch.items()} == {
        "image": ("meta", 1),
        "index": ("meta", 1),
    }
