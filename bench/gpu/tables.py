"""The tables of a report: each function turns the results of some sections into Markdown lines."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu import goals
from bench.gpu.records import Record, Records, device_ms

TIMED = {
    "search": "codebook_search", "vectors": "The search on vectors as they are", "quantizer": "The quantizer",
    "forms": "Other forms of the quantizer", "head": "The masked-token head", "norm": "Residual and LayerNorm",
    "masks": "Masks", "attention": "Attention",
}  # fmt: skip
LEAST_SHARE = 0.01  # of a call's time: kernels that take less are left out


def number(value: float | None, digits: int = 4) -> str:
    return "—" if value is None else f"{value:.{digits}g}"


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def header(*titles: str) -> list[str]:
    return [row(*titles), "|" + "---|" * len(titles)]


def machine(records: Records) -> Iterator[str]:
    m = records.machine
    yield from header("", "")
    for title, key in (
        ("device", "device"), ("driver", "driver"), ("CUDA", "cuda"), ("torch", "torch"), ("Triton", "triton"),
        ("cuDNN", "cudnn"), ("Python", "python"), ("multiprocessors", "processors"),
    ):  # fmt: skip
        if m.get(key) is not None:
            yield row(title, m[key])
    yield from (row("command", f"`{command}`") for command in records.commands)


def goal_rows(records: Records) -> Iterator[str]:
    yield from header("what", "goal", "measured", "met")
    found = goals.rows(records)
    yield from (row(r.what, r.goal, r.measured, "yes" if r.met else "**no**") for r in found if r.met is not None)
    if missing := "; ".join(f"{r.what} (goal: {r.goal})" for r in found if r.met is None):
        yield f"\nNot measured: {missing}."


def ceilings(records: Records) -> Iterator[str]:
    if records.of("env"):
        yield from header("what", "shape", "reached")
    for r in records.of("env"):
        if "tbs" in r:
            yield row(r["what"], "", f"{r['tbs']:.4g} TB/s")
        elif "tflops" in r:
            yield row(r["what"], r.get("shape", ""), f"{r['tflops']:.4g} TFLOP/s")
    kept = records.find("env", "bits that a tensor core keeps")
    if kept:
        shares = ", ".join(f"2^-{j}: {share:.2f}" for j, share in kept["kept_beside_1"].items())
        yield f"\nBeside a product of 1 a tensor core keeps of 15 products of: {shares}."


def rates(records: Records, r: Record) -> tuple[str, str]:
    """TB/s and TFLOP/s of a result, with the share of what the card reached in a copy and in a square product."""
    copy = records.find("env", "copy on the device")
    product = next((p for p in records.of("env", what="product bf16") if "tflops" in p), None)
    cells = []
    for key, ceiling in (("tbs", copy), ("tflops", product)):
        value, best = r.get(key), (ceiling or {}).get(key)
        share = f" ({value / best:.0%})" if value and best else ""
        cells.append(f"{number(value, 3)}{share}" if value else "")
    return cells[0], cells[1]


def timed(records: Records, section: str) -> Iterator[str]:
    """A table for each group of a section."""
    for group in records.groups(section):
        found = [r for r in records.of(section, group=group) if "wall_ms" in r]
        base = next((device_ms(r) for r in found if r["what"] == records.base(section)), None)
        yield f"\n**{group}**\n"
        yield from header(
            "", "GPU ms", "graph ms", "host ms", "wall ms", "ratio", "peak MB", "TB/s (of the copy)",
            "TFLOP/s (of the product)",
        )  # fmt: skip
        for r in sorted(found, key=device_ms):
            ratio = f"{device_ms(r) / base:.2f}" if base else ""
            peak = number(r["peak_bytes"] / 1e6, 4) if r.get("peak_bytes") is not None else "—"
            graph = "no" if r.get("graph_error") else number(r.get("graph_ms"))
            clock = "*" if r.get("gpu_clock") == "profiler" else ""
            times = (f"{number(r.get('gpu_ms'))}{clock}", graph, number(r["host_ms"]), number(r["wall_ms"]))
            yield row(r["what"], *times, ratio, peak, *rates(records, r))
    wrong = {r["what"]: r["not_nearest"] for r in records.of(section) if "not_nearest" in r}
    if wrong:
        bad = ", ".join(f"{name}: {count}" for name, count in wrong.items() if count)
        yield f"\nRows whose code is not a nearest one in float64: {bad or 'none'}."


def correctness(records: Records) -> Iterator[str]:
    students = [r for r in records.of("correct", what="student") if "right" in r]
    if students:
        yield from header("student: attention", "images", "precision", "worst gradient", "relative difference", "right")
        for r in students:
            right = "yes" if r["right"] else "**no**"
            yield row(r["attention"], r["batch"], r["precision"], r["worst"], f"{r['difference']:.1e}", right)
    steps = [r for r in records.of("correct", what="tokenizer") if "step" in r]
    if steps:
        yield ""
        yield from header("tokenizer, step", "codes within 1e-4", "same bits", "worst gradient's difference")
        for r in steps:
            yield row(r["step"], f"{r['codes_within_1e_4']:.1%}", r["bits_of_the_codebook"], f"{r['difference']:.1e}")
    for r in records.of("tests"):
        if "counts" in r:
            counts = ", ".join(f"{n} {kind}" for kind, n in r["counts"].items()) or r["last"]
            yield f"\n`pytest -m gpu`: {counts}, {r['seconds_of_tests']:.0f} s."
            yield from (f"- {line.split(' - ')[0]}" for line in r["failed"])
    for r in records.of("sanitizer"):
        if "found" in r:
            yield f"\ncompute-sanitizer, {r['what']}: {r['found']} found."


def steps(records: Records) -> Iterator[str]:
    for section in ("steps", "compiled"):
        found = [r for r in records.of(section) if "images_s" in r]
        if not found:
            continue
        title = "Training steps" if section == "steps" else "Training steps under torch.compile"
        yield f"\n**{title}**\n"
        yield from header("step", "", "images/s", "ms per step", "GPU ms", "host ms", "wall ms", "peak GB", "first s")
        for r in found:
            peak = number(r["peak_bytes"] / 1e9, 3) if r.get("peak_bytes") is not None else "—"
            times = (number(r["pipelined_ms"]), number(r.get("gpu_ms")), number(r["host_ms"]), number(r["wall_ms"]))
            yield row(r["group"], r["what"], number(r["images_s"]), *times, peak, number(r["first_s"], 3))


def profile(records: Records) -> Iterator[str]:
    for r in (r for r in records.of("profile") if "parts_ms" in r):
        parts = "; ".join(f"{part} {ms:.4g}" for part, ms in r["parts_ms"].items())
        yield f"- {r['group']}, {r['what']}, ms: {parts}"
    model = records.find("profile", "model of the cost")
    if model:
        predicted = ", ".join(f"{name} {ms:.3g}" for name, ms in model["predicted_ms"].items())
        yield f"\nPredicted by bench.model_cost for an H100 and 64 images, ms (a model): {predicted}."
    kernels = [r for r in records.of("profile") if "launches" in r]
    if kernels:
        yield ""
        yield from header("step", "kernel", "ms", "launches")
        yield from (row(r["group"], f"`{r['what'][:80]}`", number(r["ms"]), r["launches"]) for r in kernels)


def kernels(records: Records) -> Iterator[str]:
    calls: dict[str, list[Record]] = {}
    for r in records.of("kernels"):
        if "launches" in r:
            calls.setdefault(r["op"], []).append(r)
    if calls:
        yield f"Those that take {LEAST_SHARE:.0%} of their call's 30 longest and more.\n"
        yield from header("call", "kernel", "us", "launches")
    for op, found in calls.items():
        least = LEAST_SHARE * sum(r["ms"] for r in found)
        yield from (
            row(op, f"`{r['what'][:80]}`", number(1e3 * r["ms"]), r["launches"]) for r in found if r["ms"] >= least
        )


def trainings(records: Records) -> Iterator[str]:
    found = [r for s in ("files", "deepspeed") for r in records.of(s) if "images_s" in r]
    if found:
        yield from header("training", "loader or ZeRO stage", "images/s", "seconds", "losses", "ended")
        for r in found:
            how = r.get("loader") or f"ZeRO {r.get('zero')}"
            losses = " ".join(f"{loss:.3g}" for loss in r["losses"])
            yield row(
                r["what"], how, number(r["images_s"]), r["seconds"], losses, "well" if r["code"] == 0 else "**no**"
            )
    for r in records.of("dali", what="loader"):
        if "images_s" in r:
            yield f"\nLoading by {r['loader']} on {r['device']}: {r['images_s']:.0f} images/s."
    for r in records.of("dali", what="pixels against torchvision's"):
        mean, most = f"{r['mean_levels']:.3g}", f"{r['most']:.3g}"
        how = " on ".join(r["kind"])
        yield f"\nPixels by {how} against torchvision's: {mean} levels of 255 in the mean, {most} at most."
    for r in records.of("demo"):
        if "seconds" in r and "on" in r:
            yield f"\ntrain/demo.py on {r['on']}: {r['seconds']:.0f} s, code {r['code']}; probe {r['probe']}."


def learning(records: Records) -> Iterator[str]:
    for table in ("tokenizer", "backbones"):
        found = [r for r in records.of("learn") if r.get("table") == table]
        fields = ("section", "what", "table", "at_s")
        keys = list(dict.fromkeys(key for r in found for key in r if key not in fields))
        if keys:
            yield ""
            yield from header(table, *keys)
            yield from (row(r["what"], *(number(r.get(key)) for key in keys)) for r in found)
    cut = [r["what"] for r in records.of("learn") if "error" in r and "/pretrain" in r["what"]]
    if cut:
        yield f"\nCut short by the time, and judged as they were: {', '.join(cut)}.\n"
    lines = records.find("learn", "orderings")
    yield from (f"- {line}" for line in (lines or {}).get("lines", ()))
    plan = records.find("learn", "plan")
    if plan:
        scale = ", ".join(f"{key} {value}" for key, value in plan["scale"].items())
        yield f"\nOne seed; {scale}."


def left_out(records: Records) -> Iterator[str]:
    places: dict[str, list[str]] = {}  # by reason: many are of one peer that is not there
    for r in records.all:
        if reason := r.get("skipped") or r.get("error"):
            kind = "failed" if "error" in r else "skipped"
            where = ", ".join(str(r[key]) for key in ("group", "axis", "attention", "loader", "zero") if key in r)
            text = " ".join(str(reason).split())[-200:]
            places.setdefault(f"{r['section']}: {r['what']}: {kind}: {text}", []).extend([where] if where else [])
    for line, where in places.items():
        yield f"- {line}" + (f" ({'; '.join(where)})" if where else "")
