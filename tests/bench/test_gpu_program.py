"""python -m bench.gpu: every section runs on a CPU at tiny sizes, one that is lost leaves the others, the plan fits."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beitv2_fast.train.experiments import downstream
from beitv2_fast.train.experiments.runner import is_done, record_file
from bench import harness, test_masks
from bench.gpu import checks, clocks, learning, ops, plan, run, runner, tune
from bench.gpu.__main__ import main
from bench.gpu.plan import BY_NAME, SECTIONS

from ..support.downstream import write_colors
from ..support.launches import launching
from ..train.test_downstream import run_here

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The results of all sections at tiny sizes."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "bench.gpu", "--all", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "results.jsonl"


@pytest.mark.slow
def test_every_section_runs_tiny_without_a_gpu(tiny):
    records = read(tiny)
    ends = {r["section"]: r for r in records if r["what"] == "section"}
    assert ends.keys() == BY_NAME.keys()
    assert not {name: end["error"] for name, end in ends.items() if "error" in end}
    assert not [r for r in records if "error" in r]
    for section in SECTIONS:  # each leaves a result, or says why it has none
        mine = [r for r in records if r["section"] == section.name and r["what"] != "section"]
        assert mine, section.name
    assert sum(r.get("not_nearest", 0) for r in records) == 0
    assert all(r["right"] for r in records if "right" in r)
    skipped = {r["section"]: r["skipped"] for r in records if "skipped" in r}
    assert "GPU" in skipped["sanitizer"] and "no kernel for cpu" in skipped["attention"]


@pytest.mark.slow
def test_the_report_of_tiny_results_says_so_and_leaves_docs_alone(tiny):
    page = ROOT / "docs" / "gpu.md"
    before = page.read_bytes() if page.exists() else None
    command = [sys.executable, "-m", "bench.gpu", "report", str(tiny)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = (tiny.parent / "gpu.md").read_text()
    assert text.split("\n")[2].startswith("> **NOT A MEASUREMENT.**") and " on a CPU" in text
    assert (page.read_bytes() if page.exists() else None) == before
    for title in ("Goals", "codebook_search", "Attention", "Whole steps", "Trainings from files", "Does it learn"):
        assert f"\n## {title}\n" in text, title
    assert "python -m bench.gpu --all --tiny" in text
    for plot in ("ops.png", "steps.png", "scaling.png"):
        assert (tiny.parent / "gpu" / plot).stat().st_size > 10_000
    # The kept results are enough to write the same page again.
    again = [*command[:-1], str(tiny.parent / "gpu" / "results.jsonl"), "--out", str(tiny.parent / "again.md")]
    assert subprocess.run(again, cwd=ROOT, env=ENVIRONMENT, timeout=300).returncode == 0
    assert (tiny.parent / "again.md").read_text().replace("again/", "gpu/") == text


def sections(*names: str) -> list[plan.Section]:
    return [BY_NAME[name] for name in names]


@pytest.fixture
def results(tmp_path, monkeypatch) -> runner.Results:
    monkeypatch.setattr(runner, "WORKER", (sys.executable, "-m", "tests.support.gpu_worker"))
    monkeypatch.setattr(runner, "OVERRUN", 1.0)
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    return runner.Results(tmp_path / "results.jsonl", {"command": "test"})


def run_them(results: runner.Results, tmp_path: Path, *names: str, **options) -> tuple[list[str], list[dict], str]:
    log = (tmp_path / "log").open("w+")
    given = {"minutes": 60.0, "tiny": True, "data": None} | options
    lost = runner.run_sections(sections(*names), results, log, **given)
    log.seek(0)
    return lost, read(tmp_path / "results.jsonl"), log.read()


def test_a_section_that_hangs_or_dies_leaves_the_others(results, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "TINY_SECONDS", 2.0)
    lost, records, log = run_them(results, tmp_path, "env", "correct", "search", "quantizer")
    assert lost == ["env", "search"]
    ends = {r["section"]: r.get("error") for r in records if r["what"] == "section"}
    assert ends == {
        "env": "lost: it did not end in its time", "correct": None, "search": "lost: its process ended with code 3",
        "quantizer": None,
    }  # fmt: skip
    assert [r["section"] for r in records if r["what"] == "result"] == ["correct", "quantizer"]
    assert "what a library says" in log
    with contextlib.suppress(ProcessLookupError):  # what the section that hung had started is gone with it
        child = os.pidfd_open(int((tmp_path / "child").read_text()))
        assert select.select([child], [], [], 30)[0], "a process that a section had started outlived it"
        os.close(child)


def test_a_program_that_is_asked_to_end_takes_what_it_started_along(tmp_path):
    starts = (
        "import sys; from bench.gpu import runner; runner.WORKER = (sys.executable, '-m', 'tests.support.gpu_worker');"
        "from bench.gpu.__main__ import main; main(['env', '--out', sys.argv[1]])"
    )
    child = tmp_path / "child"
    environment = {**ENVIRONMENT, "CHILD": str(child)}
    program = subprocess.Popen([sys.executable, "-c", starts, str(tmp_path)], cwd=ROOT, env=environment)
    while not (child.exists() and child.read_text()):
        assert program.poll() is None
    held = os.pidfd_open(int(child.read_text()))
    program.terminate()
    assert program.wait(30) == 128 + signal.SIGTERM
    assert select.select([held], [], [], 30)[0], "a process that a section had started outlived the program"
    os.close(held)
    results = tmp_path / "results.jsonl"
    assert read(results)[0]["command"] == f"python -m bench.gpu env --out {tmp_path.name}", "it names a folder"


def test_a_worker_that_lost_the_gpu_is_replaced_and_others_are_kept(results, tmp_path):
    _, records, _ = run_them(results, tmp_path, "correct", "vectors", "head", "quantizer")
    process = {r["section"]: r["process"] for r in records if r["what"] == "result"}
    assert process["correct"] == process["vectors"] == process["head"] != process["quantizer"]


def test_what_does_not_fit_in_the_minutes_is_said_and_what_fits_runs(results, tmp_path, monkeypatch):
    _, records, _ = run_them(results, tmp_path, "masks", tiny=False, minutes=1.0)
    monkeypatch.setattr(plan, "LEAST_SECONDS", 100.0)
    run_them(results, tmp_path, "tests", tiny=False, minutes=1.0)
    ends = {r["section"]: r.get("skipped", "ran") for r in read(tmp_path / "results.jsonl") if r["what"] == "section"}
    assert ends == {"masks": "ran", "tests": "no time: 60 s are left"}
    assert records[0]["what"] == "plan" and records[0]["sections"] == ["masks"]


def test_sections_run_in_the_order_of_their_names_and_each_can_be_loaded():
    assert [s.name for s in plan.chosen(["steps", "env"])] == ["steps", "env"]
    assert len(BY_NAME) == len(SECTIONS)
    for section in SECTIONS:
        assert callable(section.load()), section.name
        assert plan.limit_of(section, 1e6, False) == (section.limit or 1e6) and plan.limit_of(section, 9.0, False) == 9


def test_results_of_programs_side_by_side_are_whole_lines_of_one_file(tmp_path):
    both = [runner.Results(tmp_path / "r.jsonl", {}) for _ in range(2)]
    sizes = [100_000, 3]
    for result, size in zip(both * 2, sizes * 2, strict=True):
        result.say("learn", "curve", curve="x" * size)
    assert [len(r["curve"]) for r in read(tmp_path / "r.jsonl")] == sizes * 2


def test_results_name_no_folder_of_the_machine(tmp_path):
    tail = f'File "{ROOT}/train/pretrain.py", in {sys.prefix}/lib/torch.py'
    runner.Results(tmp_path / "r.jsonl", {}).say("deepspeed", "pretrain", tail=tail)
    assert read(tmp_path / "r.jsonl")[0]["tail"] == 'File "train/pretrain.py", in lib/torch.py'


def test_an_unknown_section_is_named_beside_those_that_there_are(capsys, tmp_path):
    assert main(["serch", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "serch" in said and "codebook_search" not in said and "quantizer" in said


def test_the_files_of_gpu_tests_are_those_with_the_mark():
    mark = "pytest.mark." + "gpu"  # not in this file
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if mark in file.read_text(encoding="utf-8")]
    assert {ROOT / file for file in checks.gpu_tests()} == set(marked)


def spoken(capsys) -> list[dict]:
    return [json.loads(line[1:]) for line in capsys.readouterr().out.splitlines() if line.startswith(runner.MARK)]


@pytest.mark.parametrize(
    ("problem", "key", "text"),
    [
        (harness.Unavailable("no such package"), "skipped", "no such package"),
        (ImportError("No module named 'liger_kernel'"), "skipped", "liger_kernel"),
        (ZeroDivisionError("by zero"), "error", "ZeroDivisionError: by zero"),
    ],
)
def test_what_fails_in_an_item_is_written_down_and_the_section_goes_on(problem, key, text, capsys):
    section = run.Run("search", True, time.monotonic() + 60)
    with section.item("a peer", group="g"):
        raise problem
    with section.item("pytest's own skip"):
        pytest.skip("this torch has none")
    first, second = spoken(capsys)
    assert first["what"] == "a peer" and first["group"] == "g" and text in first[key]
    assert second["skipped"] == "this torch has none"


def test_without_time_left_items_are_skipped(capsys):
    section = run.Run("search", True, time.monotonic() - 1)
    section.time_call("a peer", lambda: pytest.fail("it ran"))
    assert spoken(capsys)[0]["skipped"] == "no time is left in this section"


def test_an_error_that_took_the_gpu_ends_the_section(monkeypatch):
    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    section = run.Run("search", True, time.monotonic() + 60)
    with pytest.raises(run.LostContext, match="illegal memory access"), section.item("ours"):
        raise RuntimeError("CUDA error")


def test_a_command_that_does_not_end_is_ended(capsys):
    section = run.Run("files", True, time.monotonic() + 60)
    waits = "import time; print('begun', flush=True); time.sleep(600)"
    assert section.command("training", [sys.executable, "-c", waits], limit=3, loader="x") is None
    (record,) = spoken(capsys)
    assert record["error"] == "ended after 3 s" and record["tail"].startswith("begun\n") and record["loader"] == "x"


def test_rates_are_those_of_the_device_s_time():
    times = clocks.Times(gpu=2.0, graph=1.0, host=5.0, wall=7.0, peak=3)
    found = times.numbers(flops=4e9, moved=6e9)
    assert (found["tflops"], found["tbs"]) == (2.0, 3.0)
    assert clocks.Times(None, None, 5.0, 8.0, None).numbers(flops=16e9)["tflops"] == 2.0


def test_calls_that_fit_in_the_queue_are_timed_by_events_and_others_by_their_kernels(monkeypatch):
    ticks, slept = itertools.count(), []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(ticks)

        def elapsed_time(self, end: Event) -> int:
            return end.at - self.at

        def query(self) -> bool:
            return waits

    waits = False
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    calls = []

    def call() -> None:
        assert slept, "the queue has to be filled while the device sleeps"
        calls.append(next(ticks))

    assert clocks.gpu_time(call, host_ms=0.3) == (2, "events")
    assert len(calls) == 10  # of 75 launches each, as 0.3 ms on the host may be: 750 of the queue's 1024
    assert slept == [pytest.approx((1.5 * 10 * 0.3e-3 + 1e-3) * clocks.CLOCK, rel=1e-6)]
    monkeypatch.setattr(clocks, "kernel_times", lambda call: {"gemm": (3.0, 900), "softmax": (1.0, 400)})
    assert clocks.gpu_time(call, host_ms=30.0) == (4.0, "profiler")
    waits = True  # the device had gone on before all calls were queued: the time between two events may be the host's
    assert clocks.gpu_time(call, host_ms=0.3) == (4.0, "profiler")


@pytest.mark.parametrize(("device", "on_device"), [("cpu", True), ("cuda", False)])
def test_what_runs_on_the_cpu_has_only_the_clocks_of_the_host(device, on_device, monkeypatch):
    monkeypatch.setattr(clocks, "DEVICE", torch.device(device))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # a second a look
    found = clocks.all_times(lambda: None, on_device=on_device)
    assert found == clocks.Times(gpu=None, graph=None, host=1e3, wall=2e3, peak=None)


def test_of_the_block_masks_those_of_the_cpu_have_no_time_on_the_device(monkeypatch):
    timed = []
    monkeypatch.setattr(run.Run, "time_call", lambda self, name, call, **options: timed.append((name, options)))
    ops.masks(run.Run("masks", True, time.monotonic() + 60))
    blocks = {name: options["on_device"] for name, options in timed if options["group"] == test_masks.GROUP}
    assert [name for name, there in blocks.items() if there] == [harness.OURS, test_masks.BATCHED] and len(blocks) == 4


def test_the_fastest_launch_shape_is_one_whose_results_are_right(monkeypatch, capsys):
    host = SimpleNamespace(BLOCK=1, WARPS=4)
    times = {1: 3.0, 2: 2.0, 3: 1.0, 4: 9.0}

    def call() -> list[torch.Tensor]:
        if host.BLOCK == 5:
            raise RuntimeError("out of resource: shared memory")
        return [torch.tensor([8.0, 7.0 if host.BLOCK == 3 else 4.0]), torch.empty(0)]

    shapes = {str(block): [(host, "BLOCK", block), (host, "WARPS", 8)] for block in (2, 3, 4, 5)}
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tune, "target_name", lambda: tune.TARGET)
    monkeypatch.setattr(run.Run, "on_gpu", True)
    monkeypatch.setattr(run.Run, "tidy", lambda self: None)
    monkeypatch.setattr(tune, "tunings", lambda device: [tune.Tuning("a kernel", call, shapes)])
    monkeypatch.setattr(clocks, "all_times", lambda *_, **__: clocks.Times(times[host.BLOCK], None, 1.0, 1.0, 0))
    tune.tune(run.Run("tune", False, time.monotonic() + 60))
    *tried, fastest = spoken(capsys)
    assert {r["what"]: (r.get("gpu_ms"), r.get("right"), r.get("difference")) for r in tried} == {
        tune.DEFAULT: (3.0, True, 0.0), "2": (2.0, True, 0.0), "3": (1.0, False, 0.375), "4": (9.0, True, 0.0),
        "5": (None, None, None),
    }  # fmt: skip
    assert "out of resource" in tried[-1]["error"] and all(r["group"] == "a kernel" for r in tried)
    assert (fastest["what"], fastest["shape"], fastest["gpu_ms"], fastest["default_ms"]) == ("fastest", "2", 2.0, 3.0)
    assert (host.BLOCK, host.WARPS) == (1, 4)


@pytest.mark.parametrize("kernel", ["residual_norm", "gelu_and_gradient"])
def test_every_launch_shape_to_try_is_another_than_the_kernel_s(kernel, monkeypatch):
    monkeypatch.setattr(tune, "IMAGES", 4)
    with launching(tune.TARGET) as launches:
        (each,) = [t for t in tune.row_tunings(torch.device("cpu")) if t.kernel == kernel]
        tried = []
        for patches in ((), *each.candidates.values()):
            launches.clear()
            with tune.patched(patches):
                each.call()
            assert all(launch.fits for launch in launches)
            tried.append([(launch.num_warps, launch.grid, launch.registers) for launch in launches])
    assert len({str(shape) for shape in tried}) == len(tried) > 2


def test_results_of_a_gpu_lie_beside_the_cpu_s(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert harness.results_folder() == tmp_path
    monkeypatch.setattr(harness, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert harness.results_folder() == tmp_path / "nvidia_h100_80gb_hbm3"
    assert harness.results_folder().is_dir()


def test_the_epochs_are_those_that_fit_in_the_time_and_stay_what_they_were(tmp_path):
    short = learning.scale_of(tmp_path / "a", 120.0)
    for field, rate in learning.EPOCHS_PER_MINUTE.items():
        assert getattr(short, field) == round(2 * rate)
    students = learning.scale_of(tmp_path / "a", learning.STUDENT_START + 100.0, images=20_000)
    assert students == dataclasses.replace(short, pretrain_epochs=round(100 * learning.STUDENT_RATE / 20_000))
    assert learning.scale_of(tmp_path / "a", 9e9, images=1) == students
    assert learning.scale_of(tmp_path / "b", 1.0, images=40_000).pretrain_epochs == 1


def test_trainings_that_are_cut_short_are_judged_as_they_are_and_again_when_they_have_gone_on(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "data" / "train" / "class").mkdir(parents=True)
    (tmp_path / "data" / "train" / "class" / "0.jpg").touch()
    asked: list[list[str]] = []
    whole = ["finetune_tokenizer", "finetune_pretrain"]
    started = ["tokenizer", "pretrain", *whole]

    def run_some(seconds, steps, root, jobs):
        """A checkpoint of each that is started, whose record says whether it is whole."""
        waiting = [step for step in steps if not is_done(root, step)]
        asked.append([step.name.removeprefix("seed0/") for step in waiting])
        for step, name in zip(waiting, asked[-1], strict=True):
            if name in started:
                (root / step.name / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)
                about = {"command": list(step.command), "done": name in whole, "attempts": []}
                record_file(root, step.name).parent.mkdir(parents=True, exist_ok=True)
                record_file(root, step.name).write_text(json.dumps(about))

    monkeypatch.setattr(learning, "run_until", run_some)
    monkeypatch.setattr(learning, "say_tables", lambda *_: None)
    section = run.Run("learn", False, time.monotonic() + 540, tmp_path / "data")
    learning.learn(section)
    of_tokenizer = ["finetune_tokenizer", "probe_tokenizer", "tokenizer_quality"]
    assert asked == [["tokenizer", "finetune_random"], of_tokenizer]
    asked.clear()
    whole.append("tokenizer")
    learning.learn(section)
    judges = ["finetune_tokenizer", "finetune_pretrain", "probe_tokenizer", "probe_pretrain", "probe_random",
              "tokenizer_quality"]  # fmt: skip
    assert asked == [["tokenizer", "finetune_random"], ["finetune_random", "pretrain", "pretrain_plain"], judges]
    result = tmp_path / "data_learned" / "runs" / "seed0" / "finetune_pretrain"
    assert result.is_dir()
    asked.clear()
    whole.append("pretrain")
    learning.learn(section)
    assert "finetune_pretrain" in asked[2], "its result is of the student before"
    asked.clear()
    learning.learn(section)
    assert "pretrain" not in asked[1] and "finetune_pretrain" not in asked[2]


@pytest.mark.slow
def test_every_step_of_the_learning_ends_in_the_tables(tmp_path, capsys, monkeypatch):
    for split, count in (("train", 8), ("val", 3)):
        write_colors(tmp_path / "images" / split, count)
    monkeypatch.setattr(learning, "SCALE", learning.TINY_SCALE)
    monkeypatch.setattr(learning, "run_until", lambda seconds, steps, root, jobs: run_here(steps, root))
    learning.learn(run.Run("learn", False, time.monotonic() + 50, tmp_path / "images"))
    said = spoken(capsys)
    rows = {r["what"]: r.keys() for r in said if r.get("table") == "backbones"}
    everything = {"probe_cls", "probe_mean", "knn_cls", "knn_mean", "finetune"}
    for row in (downstream.STUDENT, downstream.PLAIN, downstream.ENCODER, downstream.RANDOM):
        assert everything <= rows[row], row
    assert {"used_codes", "perplexity", "similarity"} <= next(r for r in said if r["what"] == "VQ-KD").keys()
    (lines,) = [r["lines"] for r in said if r["what"] == "orderings"]
    assert sum("not measured" in line for line in lines) == 1  # segmentation
    curves = {r["what"]: r["curve"] for r in said if "curve" in r}
    assert len(curves) == 7 and all(points[-1]["loss"] > 0 for points in curves.values())
    assert not [r for r in said if "error" in r]


def test_large_batches_have_a_learning_rate_that_is_meant_for_them():
    for step in itertools.chain(*learning.phases_of(Path("root"), Path("data"), learning.SCALE)):
        command = list(step.command)
        if "--lr" in command:
            assert command[command.index("--lr-batch") + 1] == command[command.index("--batch-size") + 1] == "512"


def test_a_table_is_short_on_the_terminal():
    text = runner.short({"section": "search", "what": "ours", "gpu_ms": 0.123456, "at_s": 3, "tail": "x\n" * 500})
    assert text.startswith("search: ours  gpu_ms=0.1235 tail=x x") and len(text) == 240 and "\n" not in text


def test_results_are_on_disk_at_once(tmp_path):
    results = runner.Results(tmp_path / "r.jsonl", {})
    results.say("search", "ours", gpu_ms=1.0)
    assert read(tmp_path / "r.jsonl") == [{"section": "search", "what": "ours", "gpu_ms": 1.0}]
