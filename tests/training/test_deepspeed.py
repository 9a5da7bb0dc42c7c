"""The DeepSpeed settings of train/configs train, save and resume to the same bits on one CPU process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.distributed import PRECISIONS
from beitv2_fast.errors import UserError
from beitv2_fast.training import optim
from beitv2_fast.training.deepspeed import deepspeed_settings

from ..support.small_runs import small_tokenizer
from ..support.training import (
    ENVIRONMENT,
    PRETRAIN,
    ROOT,
    TINY,
    assert_resumed,
    call,
    last_weights,
    losses,
    run_jobs,
    write_images,
)
from .test_interruption import free_port

CONFIGS = sorted((ROOT / "train" / "configs").glob("*.json"))
STAGES = (0, 1, 3)
START_SCALE = 2.0**20  # so large that fp16's first steps overflow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with whole runs, CONFIG, and such that resumed at half, CONFIG_resumed: one rank, bf16; and likewise
    with each ZeRO stage in fp16 fp16_STAGE, and fp16_torch."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    common = [*TINY, "--epochs", 2, "--data", write_images(folder / "images", 8), "--save-every", 2]
    command = [*common, *PRETRAIN, "--tokenizer", small_tokenizer(folder / "tokenizer"), "--precision", "bf16"]
    in_fp16 = [*command, "--precision", "fp16", "--log-every", 1, "--epochs", 3]
    jobs = []
    for file in CONFIGS:
        whole, resumed = folder / file.stem, folder / f"{file.stem}_resumed"
        jobs += [("pretrain", [*command, "--deepspeed-config", file, "--out", whole]), ("copy", [whole, resumed, 2])]
        jobs += [("pretrain", [*command, "--deepspeed-config", file, "--out", resumed])]
    jobs.append(("start_scale", [START_SCALE]))
    for stage in STAGES:
        whole, resumed, file = folder / f"fp16_{stage}", folder / f"fp16_{stage}_resumed", folder / f"{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        jobs += [("pretrain", [*in_fp16, "--deepspeed-config", file, "--out", whole]), ("copy", [whole, resumed, 4])]
        jobs += [("pretrain", [*in_fp16, "--deepspeed-config", file, "--out", resumed])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "START_SCALE", START_SCALE)
        assert call("pretrain", *in_fp16, "--out", folder / "fp16_torch") == 0
    rank = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    run_jobs(folder, jobs, [sys.executable], **rank)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_in_bf16_and_resumes_to_the_same_bits(runs, file):
    log = (runs / f"{file.stem}_resumed" / "log.txt").read_text()
    stage = json.loads(file.read_text())["zero_optimization"]["stage"]
    assert f"bf16 autocast, DeepSpeed ZeRO {stage}, " in log
    assert_resumed(runs / f"{file.stem}_resumed", runs / file.stem, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_in_fp16_every_zero_stage_has_torch_s_loss_scale_and_resumes_to_the_same_bits(runs, stage):
    ours, torchs = last_weights(runs / f"fp16_{stage}", "optimizer"), last_weights(runs / "fp16_torch", "optimizer")
    assert 1 < ours["loss_scale"][0] < START_SCALE and ours["step"] < 6
    for name in ("loss_scale", "step"):
        assert torch.equal(ours[name], torchs[name])
    assert losses(runs / f"fp16_{stage}") == pytest.approx(losses(runs / "fp16_torch"), rel=1e-3)
    assert "in all)" not in (runs / f"fp16_{stage}" / "log.txt").read_text()
    assert_resumed(runs / f"fp16_{stage}_resumed", runs / f"fp16_{stage}", 4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("file", [None, *CONFIGS])
def test_deepspeed_s_autocast_is_that_of_the_precision_option(file, precision):
    config = PretrainConfig(deepspeed_config=file, precision=precision)
    settings = deepspeed_settings(config, torch.device("cpu"))
    assert settings["torch_autocast"]["enabled"] == (precision != "fp32")
    assert precision == "fp32" or getattr(torch, settings["torch_autocast"]["dtype"]) == PRECISIONS[precision]
    assert settings["train_micro_batch_size_per_gpu"] == config.batch_size


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object"),
        (json.dumps({"bf16": {"enabled": True}}), "enables bf16"),
        (json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}), "offload_param to nvme"),
        (json.dumps({"optimizer": {"type": "Adam"}}), "sets an optimizer"),
        (json.dumps({"gradient_clipping": 9.0}), "gradient_clipping = 9.0, the options say 3.0"),
        (json.dumps({"gradient_accumulation_steps": 2}), "gradient_accumulation_steps = 2, the options say 1"),
    ],
)
def test_settings_that_contradict_the_options_are_refused(tmp_path, content, said):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=said):
        deepspeed_settings(PretrainConfig(deepspeed_config=tmp_path / "ds.json"), torch.device("cpu"))


@pytest.mark.slow
def test_of_a_process_that_the_launcher_starts_a_mistake_is_the_only_thing_said(tmp_path):
    """No warning of DeepSpeed's that it found no GPU."""
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "beitv2_fast.train.tokenizer", "--local_rank=0", "--preset", "demo"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--data", str(tmp_path / "none")], capture_output=True, text=True, timeout=120,
        env={k: v for k, v in ENVIRONMENT.items() if k != "DS_ACCELERATOR"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("\nerror: The image folder") and done.stderr.count("\n") == 2
