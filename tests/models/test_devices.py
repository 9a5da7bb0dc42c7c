"""Everything a GPU would run, on a GPU that is not there: no tensor is left behind on the CPU, in whole commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from beitv2_fast import FusedVectorQuantizer, ResidualVectorQuantizer
from beitv2_fast.cli import encode
from beitv2_fast.cli.encode import EncodeConfig, encode_folder
from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.distributed import World
from beitv2_fast.downstream import classification as finetuning
from beitv2_fast.downstream.probes import features as probe_features
from beitv2_fast.training import launch, loop
from beitv2_fast.training.optim import TorchBackend, parameter_groups

from ..quantize.test_quantizer_gpu import EMA, RULES
from ..support.downstream import SMALL, write_scenes
from ..support.model_cases import CASES
from ..support.pretend_gpu import GPU, Placing, pretend_gpu
from ..support.training import MODULES, call, last_weights
from ..training import test_train_gpu as commands
from .test_models import gradients

WORLD = World(0, 1, GPU)
CUDA = ["--device", "cuda"]
SMALL_VIT = {"dim": 48, "depth": 2}


@pytest.fixture
def gpu(monkeypatch) -> Iterator[None]:
    """The commands start on it, too. DALI would ask for the driver."""
    for module in (launch, *(module for module in MODULES.values() if hasattr(module, "start"))):
        monkeypatch.setattr(module, "start", lambda device: WORLD)
    for module in (probe_features, finetuning, MODULES["tokenizer_quality"]):
        monkeypatch.setattr(module, "choose_loader", lambda *_, **__: ("torchvision", "no driver"))
    with pretend_gpu():
        yield


def there(batch: tuple) -> tuple:
    return tuple(value.to(GPU) if isinstance(value, Tensor) else value for value in batch)


def test_tensors_of_two_devices_do_not_mix(gpu):
    x, y = torch.ones(3, 3, device=GPU), torch.ones(3, 3)
    rows = torch.tensor([1, 2], device="cuda")
    assert x.device == (x @ x.to(y).to("cuda")).device == torch.zeros_like(x).device == x[y[0].long()].device == GPU
    assert x.cpu().device.type == (y * 2).device.type == "cpu"
    for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: y[rows], lambda: torch.where(x > 0, x, y)):
        with pytest.raises(RuntimeError, match="two devices"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert x.sum().item() == 9 and (x.sum() + torch.tensor(1.0)).device == GPU  # a number of the CPU's may come along


@pytest.mark.parametrize("name", CASES)
def test_a_model_s_training_step_stays_on_the_device_and_is_the_cpu_s(gpu, name):
    case = CASES[name]
    ours, theirs = case.build(**SMALL_VIT).to(GPU), case.build(**SMALL_VIT)
    loss, exact = case.loss(ours, *there(case.batch(3))), case.loss(theirs, *case.batch(3))
    assert loss.device == GPU
    torch.testing.assert_close(loss.cpu(), exact, rtol=1e-5, atol=0)
    found, expected = gradients(ours, loss), gradients(theirs, exact)
    floor = 1e-3 * max(g.norm() for g in expected.values())
    assert all((found[n].cpu() - g).norm() < 1e-3 * (g.norm() + floor) for n, g in expected.items())
    backend = TorchBackend(ours, parameter_groups(ours, 0.05), PretrainConfig(), WORLD)
    assert backend.step(1e-3).isfinite()
    assert all(value.device == GPU for value in (*ours.state_dict().values(), *backend.optimizer_state().values()))
    backend.restore({name: value.cpu() for name, value in backend.optimizer_state().items()})


@pytest.mark.parametrize(("metric", "learning"), RULES)
def test_a_quantizer_s_steps_stay_on_the_device_and_are_the_cpu_s(gpu, metric, learning):
    options = dict(metric=metric, learning=learning, dead_after=1.0, restart_below=0.9, restart_after=4)
    ours, theirs = (FusedVectorQuantizer(20, 8, **options).train() for _ in range(2))
    ours.to(GPU)
    for step in range(9):
        x = torch.randn(4, 15, 8, generator=torch.Generator().manual_seed(step))
        mask = x[..., 0] > -1
        out, expected = ours(x.to(GPU), mask.to(GPU)), theirs(x, mask)
        assert out.quantized.device == out.counts.device == GPU and torch.equal(out.indices.cpu(), expected.indices)
    assert ours.usage(reset=True) == pytest.approx(theirs.usage(reset=True))
    codes = ours.encode(x.to(GPU), mask.to(GPU))
    assert ours.decode(codes).device == GPU and torch.equal(codes.cpu(), theirs.encode(x, mask))
    ours.load_state_dict(theirs.state_dict())
    ours(x.to(GPU))


@pytest.mark.parametrize("learning", [rule for metric, rule in EMA if metric == "euclidean"])
def test_residual_stages_stay_on_the_device(gpu, learning):
    quantizer = ResidualVectorQuantizer(20, 8, 3, dropout=0.5, learning=learning).train().to(GPU)
    out = quantizer(torch.randn(4, 15, 8, device=GPU), torch.rand(4, 15, device=GPU) < 0.8)
    assert quantizer.decode(quantizer.encode(torch.randn(5, 8, device=GPU))).device == out.loss.device == GPU


@pytest.fixture
def waits(gpu, monkeypatch) -> list[list[str]]:
    """For each step of a training: what the host waits for in forward and backward."""
    found, gradient = [], loop.gradient

    def watched(*arguments):
        before = len(Placing.waits)
        result = gradient(*arguments)
        found.append(Placing.waits[before:])
        return result

    monkeypatch.setattr(loop, "gradient", watched)
    return found


def assert_only_the_first_waits(waits: list[list[str]]) -> None:
    """In the first step a quantizer looks whether its codebook was started."""
    assert len(waits) > 1 and waits[1:] == [[]] * (len(waits) - 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Trainings on the CPU, to go on from."""
    return commands.make_runs(tmp_path_factory.mktemp("devices"), "--device", "cpu")


@pytest.mark.parametrize("options", ["--views 0", "--views 1 --accumulate 2 --batch-size 2"])
def test_a_tokenizer_trains_as_on_the_cpu(runs, waits, options, monkeypatch):
    outs = [runs / f"tokenizer_{device}{len(options)}" for device in ("cuda", "cpu")]
    assert commands.tokenizer(runs, outs[0].name, *options.split(), *CUDA) == 0
    assert_only_the_first_waits(waits)
    monkeypatch.setattr(launch, "start", lambda device: World(0, 1, torch.device("cpu")))
    assert commands.tokenizer(runs, outs[1].name, *options.split(), "--device", "cpu") == 0
    assert commands.losses(outs[0]) == pytest.approx(commands.losses(outs[1]), rel=1e-4)
    assert "1 x cuda" in commands.log(outs[0]) and all(v.isfinite().all() for v in last_weights(outs[0]).values())


@pytest.mark.parametrize("options", ["", "--masks device --precision bf16 --loss-on last"], ids=lambda o: o or "plain")
def test_a_pre_training_trains_on_the_device(runs, waits, options):
    assert commands.pretrain(runs, f"pretrain_cuda{len(options)}", *options.split(), *CUDA) == 0
    assert_only_the_first_waits(waits)


def test_a_fine_tuning_trains_augments_averages_and_is_evaluated_on_the_device(runs, waits):
    assert commands.finetune(runs, "tuned_cuda", "--ema-decay", 0.9, "--erasing", 0, *CUDA) == 0
    assert_only_the_first_waits(waits)
    options = ["--model", runs / "tuned_cuda", "--data", runs / "data" / "val", "--out", runs / "robust"]
    assert call("evaluate", *options, "--workers", 0, *CUDA) == 0


def test_a_segmentation_trains_and_is_evaluated_on_the_device(runs, waits):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra: segment)")
    write_scenes(runs / "scenes" / "train", 8)
    write_scenes(runs / "scenes" / "val", 2, 1)
    options = [*SMALL, "--loader", "torchvision", "--epochs", 1, "--data", runs / "scenes", "--scales", 1, 1.5]
    options += ["--weights", runs / "pretrain", "--out", runs / "segment_cuda", "--multi-scale"]
    assert call("segment", *options, *CUDA) == 0
    assert_only_the_first_waits(waits)


def test_the_pretended_gpu_tells_what_would_be_waited_for(gpu):
    x, before = torch.ones(3, device=GPU), len(Placing.waits)
    _ = x[x > 0], x.sum().item(), x.new_tensor([1.0]), x.to("cpu"), bool(x.all()), x.cpu()
    _ = x[1:] + 1, torch.ones(3).to(GPU, non_blocking=True)
    assert Placing.waits[before:] == ["__getitem__", "item", "new_tensor", "to", "__bool__", "cpu"]


@pytest.mark.parametrize("backbone", ["trained", "untrained", "teacher"])
def test_a_probe_reads_its_features_on_the_device(runs, gpu, backbone):
    options = f"--preset demo --no-exact --workers 0 --seeds 1 --epochs 2 --shots 1 --backbone {backbone}".split()
    options += ["--run", runs / "pretrain", "--data", runs / "data", "--tokenizer", runs / "tokenizer"]
    out = runs / f"probe_{backbone}"
    assert call("linear_probe", *options, *CUDA, "--out", out) == 0
    assert json.loads((out / "results.json").read_text())["rows"]


def test_a_folder_is_encoded_and_a_tokenizer_judged_on_the_device(runs, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "devices_of", lambda device: [GPU])
    config = EncodeConfig(runs / "tokenizer", tmp_path / "codes.npz", batch_size=5, precision="fp32", workers=0)
    assert encode_folder(runs / "images", config) == (12, [])
    assert np.load(tmp_path / "codes.npz")["codes"].shape == (12, 4, 4)
    options = ["--run", runs / "tokenizer", "--data", runs / "images", "--out", tmp_path / "quality"]
    assert call("tokenizer_quality", *options, *CUDA) == 0
