"""The DeepSpeed settings of train/configs train, save and resume to the same bits on one CPU process."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from beitv2_fast.backend import deepspeed_settings
from beitv2_fast.config import PretrainConfig
from beitv2_fast.errors import UserError

from .test_interruption import free_port
from .training import PRETRAIN, ROOT, TINY, TOKENIZER, assert_same_bits, call, run, write_images

CONFIGS = sorted((ROOT / "train" / "configs").glob("*.json"))
RANK = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("deepspeed")
    common = [*TINY, "--epochs", 2, "--data", write_images(folder / "images", 8), "--save-every", 2]
    assert call("tokenizer", *common, *TOKENIZER, "--out", folder / "tokenizer") == 0
    return [*common, *PRETRAIN, "--tokenizer", folder / "tokenizer"]


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_in_bf16_and_resumes_to_the_same_bits(options, tmp_path, file):
    pytest.importorskip("deepspeed")
    command = [*options, "--precision", "bf16", "--deepspeed-config", file, "--out", tmp_path / "whole"]
    whole = run("pretrain", *command, MASTER_PORT=free_port(), **RANK)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    command[-1] = tmp_path / "resumed"
    resumed = run("pretrain", *command, MASTER_PORT=free_port(), **RANK)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 2 of 4" in resumed.stdout and "bf16 autocast, DeepSpeed" in resumed.stdout
    assert_same_bits(tmp_path / "resumed", tmp_path / "whole")


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
        (json.dumps({"optimizer": {"type": "Adam"}}), "sets an optimizer"),
        (json.dumps({"gradient_clipping": 9.0}), "gradient_clipping = 9.0, the options say 3.0"),
    ],
)
def test_settings_that_contradict_the_options_are_refused(tmp_path, content, said):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=said):
        deepspeed_settings(PretrainConfig(deepspeed_config=tmp_path / "ds.json"), torch.device("cpu"))
