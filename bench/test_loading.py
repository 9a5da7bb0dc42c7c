"""Pre-training's batches from JPEG files: both loaders beside torchvision's DataLoader with the reference's transforms.

Images per second with two workers, the time of each stage, and how long a step waits for its batch.
"""

from __future__ import annotations

import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import functional as F

from beitv2_fast.data.find import find_images
from beitv2_fast.data.images import ImageFolder
from beitv2_fast.data.loaders import train_loader
from beitv2_fast.data.views import PretrainView
from beitv2_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD
from bench.harness import OURS, machine, results_folder
from bench.test_masks import reference_structure

WORKERS, BATCH, FILES, BATCHES, ROUNDS = 2, 64, 256, 16, 2
VIEW = PretrainView(224, 224, (14, 14), 75)
Stages = dict[str, float]  # seconds of processor time
_rows: dict[str, dict[str, Any]] = defaultdict(dict)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """256 JPEGs of 500x375 with the 1/f spectrum of photographs, about 100 kB each, as ImageNet's are."""
    root, generator = tmp_path_factory.mktemp("loading"), np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    frequency[0, 0] = 1
    for i in range(FILES):
        channels = [np.fft.irfft2(np.fft.rfft2(generator.normal(size=(375, 500))) / frequency) for _ in range(3)]
        gray = channels[0]
        pixels = np.stack([gray + 0.3 * channel for channel in channels], -1)
        pixels = 127 + 55 * (pixels - pixels.mean()) / pixels.std() + generator.normal(0, 3, pixels.shape)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / f"{i:03}.jpg", quality=93)
    return root


class ReferenceDataset(Dataset):
    """The reference implementation's transforms in its order: jitter and flip of the whole image, one crop resized
    twice, normalization, the mask's Python loop."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(root.iterdir())
        self.jitter = T.ColorJitter(0.4, 0.4, 0.4)
        self.stages: Stages | None = None

    def __len__(self) -> int:
        return BATCHES * BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, np.ndarray]:
        with self.paths[index % FILES].open("rb") as file:
            image = self._timed("decode", lambda: Image.open(file).convert("RGB"))
        jittered = self._timed("color jitter", lambda: self.jitter(image))
        flipped = self._timed("flip", lambda: F.hflip(jittered) if torch.rand(1) < 0.5 else jittered)
        box = T.RandomResizedCrop.get_params(flipped, [0.2, 1.0], [3 / 4, 4 / 3])
        bicubic = T.InterpolationMode.BICUBIC
        first, second = self._timed(
            "crop and resize", lambda: [F.resized_crop(flipped, *box, [224, 224], bicubic) for _ in range(2)]
        )
        student = self._timed("to float", lambda: F.normalize(F.to_tensor(first), IMAGENET_MEAN, IMAGENET_STD))
        tokenizer = self._timed("to float", lambda: F.to_tensor(second))
        return student, tokenizer, self._timed("mask", reference_structure)

    def _timed(self, stage: str, run: Callable[[], Any]) -> Any:
        if self.stages is None:
            return run()
        started = time.process_time()
        result = run()
        self.stages[stage] += time.process_time() - started
        return result


def ours(loader: str, device: str = "cpu") -> Callable[[Path], Iterator]:
    def make(root: Path) -> Iterator:
        if loader == "dali":
            pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra: dali)")
        dataset = ImageFolder(find_images(root), VIEW, loader=loader, device=device)
        batches = train_loader(dataset, batch_size=BATCH, total_steps=BATCHES, workers=WORKERS)
        return iter(batches.cuts if device == "cuda" else batches)

    return make


def reference(root: Path) -> Iterator:
    return iter(DataLoader(ReferenceDataset(root), BATCH, shuffle=True, num_workers=WORKERS))


LOADERS: dict[str, Callable[[Path], Iterator]] = {
    f"{OURS}, DALI": ours("dali"),
    f"{OURS}, torchvision": ours("torchvision"),
    f"{OURS}, torchvision, what a GPU is sent to finish": ours("torchvision", "cuda"),
    "torchvision DataLoader, the reference's transforms": reference,
}


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.mark.parametrize("name", LOADERS)
def test_images_a_second(benchmark, folder, name):
    """A pass over 16 batches, the start of the workers included; processor time is that of all processes."""

    def run() -> None:
        assert sum(1 for _ in LOADERS[name](folder)) == BATCHES

    run()
    started = processor_seconds()
    benchmark.group = "loading"
    benchmark.pedantic(run, rounds=ROUNDS, iterations=1)
    images = BATCHES * BATCH
    _rows[name]["images_per_second"] = images / benchmark.stats.stats.median
    _rows[name]["processor_ms"] = (processor_seconds() - started) / (ROUNDS * images) * 1e3


def _reference_stages(root: Path) -> Stages:
    dataset = ReferenceDataset(root)
    dataset.stages = defaultdict(float)
    for i in range(FILES):
        dataset[i]
    return dataset.stages


def _our_stages(loader: str) -> Callable[[Path], Stages]:
    def measured(root: Path) -> Stages:
        from beitv2_fast.data.views import color_jitter, resized_cuts, to_float
        from beitv2_fast.models.vit import normalize

        dataset, stages = ImageFolder(find_images(root), VIEW, loader=loader), defaultdict(float)

        def timed(stage: str, run: Callable, *arguments: Any) -> Any:
            started = time.process_time()
            result = run(*arguments)
            stages[stage] += time.process_time() - started
            return result

        cuts_of = _dali_cuts(dataset, timed) if loader == "dali" else _pil_cuts(dataset, timed)
        for first in range(0, FILES, BATCH):
            cuts, draws = cuts_of([(0, i) for i in range(first, first + BATCH)])
            pixels = timed("crop and resize", resized_cuts, cuts, VIEW, draws)["student"]
            jittered = timed("color jitter", color_jitter, pixels, draws["jitter_step"], draws["jitter_factor"])
            timed("to float", lambda a, b: (normalize(to_float(a)), to_float(b)), jittered, pixels)
            timed("mask", VIEW._masks, np.arange(BATCH))
        return stages

    return measured


def _pil_cuts(dataset: ImageFolder, timed: Callable) -> Callable:
    def cuts_of(keys: list) -> tuple:
        images = timed("decode", lambda: [dataset.images.open(i) for _, i in keys])
        draws = dataset.draws(keys, np.array([image.size for image in images]))
        cut = lambda: [image.crop(box) for image, box in zip(images, draws["box"].tolist(), strict=True)]  # noqa: E731
        return timed("crop and resize", cut), draws

    return cuts_of


def _dali_cuts(dataset: ImageFolder, timed: Callable) -> Callable:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra: dali)")
    from beitv2_fast.data import dali

    build = partial(dali.build, VIEW, torch.device("cpu"), BATCH, 1, whole_graph=False)
    pipeline = build()

    def cuts_of(keys: list) -> tuple:
        batch = timed("read, header, draws", lambda: dali.prepare(dataset, keys, whole_graph=False))

        def decoded() -> list:
            dali.submit(pipeline, batch)
            _, (output,) = dali.fetch(pipeline, dataset, batch, False, build)
            cuts = [Image.fromarray(np.asarray(output[i])) for i in range(len(output))]
            pipeline.release_outputs()
            return cuts

        return timed("decode", decoded), batch[2]

    return cuts_of


STAGES = {
    f"{OURS}, DALI": _our_stages("dali"),
    f"{OURS}, torchvision": _our_stages("torchvision"),
    "torchvision DataLoader, the reference's transforms": _reference_stages,
}


@pytest.mark.parametrize("name", STAGES)
def test_time_by_stage(folder, name):
    """Processor milliseconds per image in one process; the least of three passes for each stage."""
    passes = [STAGES[name](folder) for _ in range(3)]
    _rows[name]["stages_ms"] = {s: min(p[s] for p in passes) / FILES * 1e3 for s in passes[0]}


@pytest.mark.parametrize("name", list(LOADERS)[:2])
def test_a_step_does_not_wait_where_decoding_is_fast_enough(folder, name):
    """Steps that take 1.5 times as long as a batch, and leave the processors free, as a GPU's do."""
    started, batches = time.perf_counter(), 0
    for _ in LOADERS[name](folder):
        batches += 1
    step = 1.5 * (time.perf_counter() - started) / batches
    waits, frees, loader = [], [], LOADERS[name](folder)
    while True:
        started = time.perf_counter()
        batch = next(loader, None)
        waits.append(time.perf_counter() - started)
        if batch is None:
            break
        time.sleep(step)
        started = time.perf_counter()
        del batch  # 77 MB of shared memory go back to the kernel, page by page
        frees.append(time.perf_counter() - started)
    waits = waits[2:-1]  # the workers start in the first, and end in the last
    _rows[name]["step_ms"], _rows[name]["wait_ms"] = step * 1e3, float(np.median(waits)) * 1e3
    _rows[name]["longest_wait_ms"], _rows[name]["free_ms"] = max(waits) * 1e3, float(np.median(frees)) * 1e3


@pytest.fixture(scope="module", autouse=True)
def _report(request):
    yield
    write = request.config.get_terminal_writer().line
    write(f"\n\nloading, 500x375 JPEG to two 224x224 views and a mask, {WORKERS} workers ({machine()})")
    for name, row in _rows.items():
        stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in row.get("stages_ms", {}).items())
        speed, processor = row.get("images_per_second", 0), row.get("processor_ms", 0)
        write(f"  {name}: {speed:.0f} images/s, {processor:.2f} CPU ms per image")
        write(f"      CPU ms per image by stage: {stages}")
        if "wait_ms" in row:
            write(
                f"      a step of {row['step_ms']:.0f} ms waits {row['wait_ms']:.2f} ms for its batch (median; longest "
                f"{row['longest_wait_ms']:.2f}); giving its memory back takes {row['free_ms']:.1f} ms"
            )
    content = {"group": "loading", "workers": WORKERS, **machine(), "results": _rows}
    (results_folder() / "loading.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
