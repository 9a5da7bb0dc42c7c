"""A run folder says which command made it; one written before it did is recognized."""

from __future__ import annotations

import json

import pytest

from beitv2_fast.config import downstream, show, training
from beitv2_fast.config.downstream import ProbeConfig
from beitv2_fast.config.options import RunConfig, to_json
from beitv2_fast.config.training import PretrainConfig, TokenizerConfig
from beitv2_fast.errors import UserError
from beitv2_fast.runs.folder import RunFolder, read_config, stored_config

CONFIGS = {
    value.stage: value
    for module in (training, downstream, show)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, RunConfig) and value.stage
}


def test_every_command_has_a_stage():
    assert CONFIGS.keys() == {
        "tokenizer", "pretrain", "finetune", "segment", "probe", "evaluate", "tokenizer_quality", "report"
    }  # fmt: skip


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_config_is_read_with_its_stage_also_one_written_before(tmp_path, stage):
    config = CONFIGS[stage](seed=5)
    values = to_json(config)
    assert values.pop("stage") == stage
    for written in (values, {"stage": stage, **values}):
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert stored_config(tmp_path)["stage"] == stage
        assert read_config(CONFIGS[stage], tmp_path) == config


def test_an_option_is_read_under_its_earlier_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"neighbours": [7]}))  # codespell:ignore neighbours
    assert read_config(ProbeConfig, tmp_path).neighbors == (7,)


def test_a_run_folder_of_another_stage_is_refused(tmp_path):
    RunFolder(PretrainConfig(out=tmp_path))
    (tmp_path / "results.json").touch()
    with pytest.raises(UserError, match=r"\(stage: pretrain there, tokenizer now\)"):
        RunFolder(TokenizerConfig(out=tmp_path))
    with pytest.raises(UserError, match="a run folder of pretrain, but tokenizer's is needed"):
        read_config(TokenizerConfig, tmp_path)
