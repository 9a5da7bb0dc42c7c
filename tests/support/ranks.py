"""`ranks.py JOBS`: several jobs one after the other in one process group: importing torch takes longer than they do.

JOBS is a JSON list of [stage, options], the training commands, of ["copy", [run, other run, step]], which copies a run
as it was at a checkpoint, of ["poison", [rank, step]], which makes the loss NaN there in every pre-training that
follows, and of ["start_scale", [number]], with which every training in fp16 that follows starts.

Every rank writes told_by_rank_R.jsonl into the run folder: after each step a hash of all buffers that it holds, and
which images it had, as (epoch, index).
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from beitv2_fast.distributed import run_main
from beitv2_fast.train import evaluate, finetune, linear_probe, pretrain, segment, tokenizer
from beitv2_fast.training import optim
from beitv2_fast.training.monitor import TrainingLog


def copy(run: str, other: str, step: str) -> int:
    """All of a run but its checkpoints after the step."""
    later = {path.name for path in Path(run, "checkpoints").iterdir() if path.name > f"step_{int(step):08d}"}
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.copytree(run, other, ignore=lambda _, names: later & set(names))
    if dist.is_initialized():
        dist.barrier()
    return 0


def poison(rank: str, step: str) -> int:
    def loss(self, model, batch):
        result, metrics = original(self, model, batch)
        self.calls = getattr(self, "calls", 0) + 1
        return (result * float("nan") if (dist.get_rank(), self.calls) == (int(rank), int(step)) else result), metrics

    original, pretrain.PretrainTask.loss = pretrain.PretrainTask.loss, loss
    return 0


def start_scale(scale: str) -> int:
    optim.START_SCALE = float(scale)
    return 0


def add_and_tell(self, step, lr, metrics, batch):
    add(self, step, lr, metrics, batch)
    digest = hashlib.sha256()
    for name, buffer in sorted(self.task.model.named_buffers()):
        digest.update(name.encode() + buffer.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    images = list(zip(batch["view"].tolist(), batch["index"].tolist(), strict=True))
    with (self.run.path / f"told_by_rank_{self.world.rank}.jsonl").open("a") as lines:
        lines.write(json.dumps([step, digest.hexdigest(), images]) + "\n")


add, TrainingLog.add = TrainingLog.add, add_and_tell
JOBS = {
    "tokenizer": tokenizer.main,
    "pretrain": pretrain.main,
    "finetune": finetune.main,
    "evaluate": evaluate.main,
    "linear_probe": linear_probe.main,
    "segment": segment.main,
    "copy": lambda options: copy(*options),
    "poison": lambda options: poison(*options),
    "start_scale": lambda options: start_scale(*options),
}


def main() -> int:
    jobs = json.loads(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))).read_text())
    return max(abs(JOBS[name](list(map(str, options)))) for name, options in jobs)


if __name__ == "__main__":
    run_main(main)
