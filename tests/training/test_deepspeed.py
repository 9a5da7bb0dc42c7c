"""The DeepSpeed settings of train/configs train, save and resume to the same bits on one CPU process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from beitv2_fast.config.training import PretrainConfig
from beitv2_fast.errors import UserError
from beitv2_fast.training.deepspeed import deepspeed_settings

from ..support.training import PRETRAIN, ROOT, TINY, TOKENIZER, assert_resumed, call, run_jobs, write_images
from .test_interruption import free_port

CONFIGS = sorted((ROOT / "train" / "configs").glob("*.json"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with whole runs, CONFIG, and such that resumed at half, CONFIG_resumed: one rank, bf16."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    common = [*TINY, "--epochs", 2, "--data", write_images(folder / "images", 8), "--save-every", 2]
    assert call("tokenizer", *common, *TOKENIZER, "--out", folder / "tokenizer") == 0
    command = [*common, *PRETRAIN, "--tokenizer", folder / "tokenizer", "--precision", "bf16"]
    jobs = []
    for file in CONFIGS:
        whole, resumed = folder / file.stem, folder / f"{file.stem}_resumed"
        jobs += [("pretrain", [*command, "--deepspeed-config", file, "--out", whole]), ("copy", [whole, resumed, 2])]
        jobs += [("pretrain", [*command, "--deepspeed-config", file, "--out", resumed])]
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("file", [None, *CONFIGS])
def test_deepspeed_s_autocast_is_that_of_the_precision_option(file, precision):
    config = PretrainConfig(deepspeed_config=file, precision=precision)
    settings = deepspeed_settings(config, torch.device("cpu"))
    assert settings["torch_autocast"]["enabled"] == (precision == "bf16")
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
