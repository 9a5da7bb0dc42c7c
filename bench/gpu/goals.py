"""What a GPU should reach, as rows: the goal, what was measured, whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.gpu.records import Record, Records, device_ms
from bench.harness import OURS

REFERENCE = "reference implementation's structure"
STEP = "B/16, 256 images, bf16"
SEARCH, QUANTIZER = "N=12544 K=8192 D=32", "step, N=12544 K=8192 D=32"
HEAD = "M=9600 C=768 V=8192, bf16 autocast"
ATTENTION = "B=64 H=12 N=197 d=64 bf16, forward and backward, gradient of the bias"
HARD_FACTOR, COLLAPSED_MS = 2.0, 0.5


@dataclass(frozen=True)
class Row:
    """measured: with its unit; met: None where nothing was measured."""

    what: str
    goal: str
    measured: str
    met: bool | None


def rows(records: Records) -> list[Row]:
    return [*_steps(records), *_attention(records), *_head(records), *_quantizer(records), *_search(records)]


def _row(what: str, goal: float, value: float | None, unit: str, *, least: bool = False) -> Row:
    """``least``: the goal is a lower bound, else an upper one."""
    text = f"at {'least' if least else 'most'} {goal:g} {unit}"
    if value is None:
        return Row(what, text, "—", None)
    return Row(what, text, f"{value:.4g} {unit}", value >= goal if least else value <= goal)


def _ratio(over: Record | None, under: Record | None, of: Callable[[Record], float | None]) -> float | None:
    if over is None or under is None or not of(over) or not of(under):
        return None
    return of(over) / of(under)


def _value(record: Record | None, of: Callable[[Record], float | None]) -> float | None:
    return None if record is None else of(record)


def _speed(record: Record) -> float:
    return record["images_s"]


def _peak(record: Record) -> float | None:
    return record.get("peak_bytes")


def _steps(records: Records) -> Iterator[Row]:
    name = f"pre-training {STEP}"
    ours, other = (records.find("steps", who, group=name) for who in (OURS, REFERENCE))
    yield _row("pre-training B/16 with its tokenizer, 256 images", 2400, _value(ours, _speed), "images/s", least=True)
    yield _row("that against the reference's structure", 2, _ratio(ours, other, _speed), "times", least=True)
    yield _row("its memory against the reference's structure", 0.6, _ratio(ours, other, _peak), "times")
    vq = records.find("steps", OURS, group=f"VQ-KD {STEP}")
    yield _row("VQ-KD B/16 without its teacher, 256 images", 2800, _value(vq, _speed), "images/s", least=True)
    large = records.find("steps", OURS, group="pre-training L/16, 64 images, bf16")
    yield _row("pre-training L/16, 64 images", 900, _value(large, _speed), "images/s", least=True)
    small = records.find("steps", OURS, group="pre-training B/16, 64 images, bf16")
    host = _value(small, lambda r: r["host_ms"])
    row = _row("host time of a B/16 step, 64 images (or below the GPU's)", 10, host, "ms")
    if small is not None and small.get("gpu_ms") and host < small["gpu_ms"]:
        row = Row(row.what, row.goal, f"{row.measured}, GPU {small['gpu_ms']:.4g} ms", True)
    yield row
    for stage in ("pre-training", "VQ-KD"):
        waits = _value(records.find("steps", "host waits", group=stage), lambda r: float(r["count"]))
        yield _row(f"host waits in a {stage} step", 0, waits, "waits")


def _attention(records: Records) -> Iterator[Row]:
    found = records.find("attention", records.base("attention"), group=ATTENTION)
    yield _row("attention, forward and backward with the bias's gradient", 0.30, _value(found, device_ms), "ms")


def _head(records: Records) -> Iterator[Row]:
    ours, compiled, eager = (records.find("head", who, group=HEAD) for who in (OURS, "torch.compile", "eager"))
    yield _row("masked-token head, forward and backward", 0.9, _value(ours, device_ms), "ms")
    yield _row("that against torch.compile", 1, _ratio(compiled, ours, device_ms), "times", least=True)
    yield _row("its memory against eager's", 1 / 8, _ratio(ours, eager, _peak), "times")


def _quantizer(records: Records) -> Iterator[Row]:
    ours, peer = (records.find("quantizer", who, group=QUANTIZER) for who in (OURS, "vector-quantize-pytorch"))
    yield _row("quantizer step, GPU", 0.08, _value(ours, device_ms), "ms")
    yield _row("quantizer step, host", 0.3, _value(ours, lambda r: r["host_ms"]), "ms")
    yield _row("that against vector-quantize-pytorch", 10, _ratio(peer, ours, device_ms), "times", least=True)


def _search(records: Records) -> Iterator[Row]:
    ours = records.find("search", OURS, group=SEARCH)
    yield _row("search, GPU", 0.03, _value(ours, device_ms), "ms")
    torchs = "torch normalize + matmul + argmax, "
    for peer, least in (("flash-kmeans assignment, bf16", 3), (f"{torchs}fp32", 10), (f"{torchs}bf16", 5)):
        ratio = _ratio(records.find("search", peer, group=SEARCH), ours, device_ms)
        yield _row(f"search against {peer}", least, ratio, "times", least=True)
    wrong = [r["not_nearest"] for s in ("search", "vectors") for r in records.of(s) if "not_nearest" in r]
    yield _row("search, rows that are not nearest in float64", 0, float(sum(wrong)) if wrong else None, "rows")
    easy = records.find("vectors", "Gaussian", group=SEARCH)
    for case in records.of("vectors", group=SEARCH):
        if "wall_ms" not in case or case["what"] == "Gaussian":
            continue
        if case["what"] == "a collapsed codebook":
            yield _row(f"search on {case['what']}", COLLAPSED_MS, device_ms(case), "ms")
        else:
            slower = _ratio(case, easy, device_ms)
            yield _row(f"search on {case['what']}, against Gaussian vectors", HARD_FACTOR, slower, "times")
