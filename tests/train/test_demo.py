"""The demo's handling of its stages; what they compute is tested with them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beitv2_fast.train import demo

from ..support.training import ENVIRONMENT, ROOT, write_images

# A launcher that dies of SIGTERM at once, and the training that it started, which saves first.
TRAINING = "trap 'echo saved; exit' TERM; echo ready; tail -f /dev/null & wait"
LAUNCHER = f'bash -c "{TRAINING}" & wait'
DEMO = """
import sys
from beitv2_fast.train.demo import run_stage
print("code", run_stage(["bash", "-c", sys.argv[1]]), flush=True)
"""


def test_a_stop_signal_reaches_the_training_behind_the_launcher_and_is_waited_for():
    command = [sys.executable, "-c", DEMO, LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout.readline() == "ready\n"
        demo.send_signal(signal.SIGTERM)
        assert demo.stdout.read() == f"saved\ncode {-signal.SIGTERM}\n"


EARLY = """
import os, signal, subprocess
from beitv2_fast.train.demo import run_stage

class SignaledWhileItStarts(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)

subprocess.Popen = SignaledWhileItStarts
print("code", run_stage(["tail", "-f", "/dev/null"]), flush=True)
"""


def test_a_stop_signal_that_comes_while_a_stage_starts_is_passed_on():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"code {-signal.SIGTERM}\n"


def start(monkeypatch, *options: object, code: int = 0) -> list[str]:
    """The demo with stages that end with this code at once: the modules and programs that it ran."""
    ran = []
    monkeypatch.setattr(demo, "run_stage", lambda command: ran.append(command) or code)
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, options)])
    assert demo.main() == (code if code >= 0 else 128 - code)
    return [command[-1 if "-m" not in command else command.index("--preset") - 1].split(".")[-1] for command in ran]


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """mine/{a,b}/*.png, without a split; the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_images(tmp_path / "mine" / name, 8)
    return tmp_path


def test_only_what_the_same_command_mends_is_said_to_go_on(mine, monkeypatch, capsys):
    assert start(monkeypatch, "--data", "mine", code=2) == ["tokenizer"]
    assert "goes on from here" not in capsys.readouterr().err
    for code in (143, -15):  # of a stage that saved; of a launcher that died of the same signal
        start(monkeypatch, "--data", "mine", code=code)
        assert "the same command goes on from here" in capsys.readouterr().err


def test_images_of_one_s_own_have_a_run_folder_of_their_own(mine, monkeypatch, capsys):
    results = {
        "metric": "balanced accuracy",
        "task": "2 classes: a, b",
        "seeds": 3,
        "chance": 0.5,
        "images": {"train": 12, "test": 4},
        "error": 0.25,
        "rows": [{"features": "pre-trained", "mean": 0.75, "std": 0.05, "knn": {"10": 0.5}, "knn_std": {"10": 0.0}}],
        "notes": ["A note."],
    }
    (mine / "runs" / "mine" / "probe").mkdir(parents=True)
    (mine / "runs" / "mine" / "probe" / "results.json").write_text(json.dumps(results))
    assert start(monkeypatch, "--data", "mine") == ["tokenizer", "pretrain", "linear_probe", "report"]
    said = capsys.readouterr().out
    assert (
        said.startswith("found 16 images, 2 classes (a, b)") and "a quarter is held out, in runs/mine/data/test" in said
    )
    assert "balanced accuracy, 2 classes: a, b; 3 seeds, chance 0.50" in said and demo.MEANING in said
    table = [line.split() for line in said.splitlines()]
    assert "features linear 10-NN".split() in table and "pre-trained 0.750 ± 0.050 0.500".split() in table
    assert "standard error of up to 0.250" in said
    assert "explore runs/mine\n" in said and "--data runs/mine/data --weights runs/mine/pretrain" in said
    assert sorted(path.name for path in (mine / "runs" / "mine" / "data").iterdir()) == ["test", "train"]


def test_images_without_classes_are_not_probed(mine, monkeypatch, capsys):
    write_images(mine / "loose", 8)
    assert start(monkeypatch, "--data", "loose", "--out", "there") == ["tokenizer", "pretrain", "report"]
    said = capsys.readouterr().out
    assert "nothing to probe" in said and "== 3/3  report" in said and "there/report/report.html" in said


def test_a_seed_is_that_of_both_trainings_and_of_the_probe(tmp_path):
    stages = [command for _, command in demo.commands(tmp_path, tmp_path, labeled=True, seed=7)]
    seeds = [command[command.index("--seed") + 1] if "--seed" in command else None for command in stages]
    assert seeds == ["7", "7", "7", None]


def test_a_mistyped_option_gets_a_suggestion(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--dta", "photos"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2 and "(did you mean --data?)" in capsys.readouterr().err


def test_threads_of_the_stages_sleep_while_they_wait_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert demo.environment()["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert demo.environment()["OMP_WAIT_POLICY"] == "active"


@pytest.mark.slow
def test_a_mistake_under_the_launcher_is_one_paragraph(tmp_path):
    """No lines of DeepSpeed's before and after ours."""
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    _, (_, command), *_ = demo.commands(tmp_path, tmp_path / "images", labeled=False)
    environment = {**demo.environment(), **ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("\nerror: ") and done.stderr.count("\n") == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_installs_what_it_needs_and_hands_its_variables_over(tmp_path):
    command = ["make", "-n", "demo", f"VENV={tmp_path}", "DATA=my images", "OUT=there"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert '".[demo,deepspeed]"' in said and "6.0 GB" in said
    assert 'train/demo.py --data "my images" --out "there"' in said
