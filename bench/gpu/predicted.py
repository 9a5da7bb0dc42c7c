"""What bench.gpu_model predicted of each kernel, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from bench import gpu_model
from bench.gpu.records import Records
from bench.gpu_kernels import Case

OPS = {  # an op's name in gpu_model -> in the section "kernels"
    "codebook_search": "codebook_search", "codebook_update": "quantizer step", "vector_quantize": "quantizer step",
    "masked_cross_entropy": "masked_cross_entropy",
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """us: predicted for one launch; of a kernel with several configurations the fastest one's."""

    op: str
    kernel: str
    case: str
    us: float
    bound: str


def kernel_name(case: Case) -> str:
    """The name under which a profiler knows it."""
    kernel = case.kernel
    while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel.__name__


def predictions(target: str) -> list[Prediction]:
    """Of all kernels, which are compiled for the target: half a second each."""
    found: dict[tuple[str, str], Prediction] = {}
    for case in gpu_model.cases(target, peers=False):
        if isinstance(case, str):
            continue
        estimate = gpu_model.estimate(case, target)
        one = Prediction(case.op, kernel_name(case), case.name, 1e6 * estimate.seconds[estimate.bound], estimate.bound)
        known = found.get((one.op, one.kernel))
        if known is None or one.us < known.us:
            found[one.op, one.kernel] = one
    return list(found.values())


def target_of(records: Records) -> str | None:
    """gpu_model's name of the card; None if it does not know it."""
    name = f"sm_{(records.machine.get('capability') or '').replace('.', '')}"
    return name if name in gpu_model.GPUS else None


def table(records: Records) -> list[str]:
    """Markdown lines; none where the card is not modeled or no kernel was measured."""
    target = target_of(records)
    if target is None or not records.of("kernels"):
        return []
    lines = [
        "| op | kernel | predicted us | bound by | measured us | measured / predicted |",
        "|---|---|---|---|---|---|",
    ]
    for one in predictions(target):
        measured = [
            r for r in records.of("kernels", op=OPS.get(one.op, one.op)) if "ms" in r and r["what"] == one.kernel
        ]
        us = 1e3 * sum(r["ms"] for r in measured) / sum(r["launches"] for r in measured) if measured else None
        seen = f"{us:.1f} | {us / one.us:.2f}" if us is not None else "not launched | "
        lines.append(f"| {one.op} | {one.kernel} ({one.case}) | {one.us:.1f} | {one.bound} | {seen} |")
    return lines
