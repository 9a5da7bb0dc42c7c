"""``python -m bench.scaling``: the time of the search as N, K, D and the threads grow, beside its peers and the peak.

One axis grows at a time from the default problem. The time is processor time divided by the threads, the shortest of
several calls: what else runs on the machine lengthens it little. Writes
scaling_codebook_search.json and .png to bench/results (of a GPU: to its own folder there).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch

from bench.harness import DEVICE, OURS, Unavailable, machine, results_folder
from bench.peak import peak_rates
from bench.test_codebook_search import IMPLEMENTATIONS, problem

DEFAULT = {"N": 12_544, "K": 8192, "D": 32, "threads": torch.get_num_threads()}
AXES = {
    "N": (1, 8, 16, 32, 196, 784, 3136, 12_544, 50_176, 200_704),
    "K": (512, 2048, 8192, 32_768, 131_072),
    "D": (4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "threads": tuple(range(1, (os.cpu_count() or 1) + 1)),
}
PEERS = (OURS, "faiss IndexFlatIP", "torch normalize + matmul + argmax", "vector-quantize-pytorch eval forward")
MOST_SCORES = 1 << 29  # peers that build all scores stop at 2 GB of them
BUDGET = 3.0  # seconds; a peer whose last point took longer gets no larger one


def best_time(run: Callable[[], object], seconds: float) -> float:
    """The shortest of at least two calls after the first, for about ``seconds``."""
    run()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < seconds and len(times) < 30):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        started = _clock()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(_clock() - started)
    return min(times)


def _clock() -> float:
    return time.perf_counter() if DEVICE.type == "cuda" else time.process_time() / torch.get_num_threads()


def sweep(axis: str, seconds: float) -> dict[str, list[tuple[int, float]]]:
    """(value, seconds) of every implementation along one axis."""
    results: dict[str, list[tuple[int, float]]] = {name: [] for name in PEERS}
    for value in AXES[axis]:
        size = {**DEFAULT, axis: value}
        torch.set_num_threads(size["threads"])
        x, codebook = problem(size["N"], size["K"], size["D"])
        for name in PEERS:
            slow = results[name] and results[name][-1][1] > BUDGET
            builds_scores = name not in (OURS, "faiss IndexFlatIP")
            if slow or (builds_scores and size["N"] * size["K"] > MOST_SCORES):
                continue
            try:
                run = IMPLEMENTATIONS[name](x, codebook)
            except Unavailable as reason:
                print(f"{name} is left out: {reason}")
                continue
            results[name].append((value, best_time(run, seconds)))
            print(f"{axis} = {value:>7}  {name:<44}{results[name][-1][1] * 1e3:>10.2f} ms", flush=True)
    torch.set_num_threads(DEFAULT["threads"])
    return {name: points for name, points in results.items() if points}


def plot(results: dict[str, dict[str, list[tuple[int, float]]]], rates: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    for axes, (axis, lines) in zip(figure.subplots(2, 2).flat, results.items(), strict=True):
        for name, points in lines.items():
            values, times = zip(*points, strict=True)
            axes.plot(values, [1e3 * t for t in times], "o-", label=name, linewidth=3 if name == OURS else 1.5)
        for kind, rate in rates.items():
            sizes = [{**DEFAULT, axis: value} for value in AXES[axis]]
            floor = [1e3 * s["N"] * s["K"] * s["D"] / (rate * s["threads"]) for s in sizes]
            axes.plot(AXES[axis], floor, "k--" if kind == "fp32" else "k:", label=f"peak, {kind} multiply-adds")
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms of processor time per thread")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("codebook_search, " + ", ".join(f"{k} = {v:,}" for k, v in DEFAULT.items()) + " unless on the axis")
    figure.savefig(results_folder() / "scaling_codebook_search.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each point")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    options = parser.parse_args()
    rates = peak_rates() if DEVICE.type == "cpu" else {}
    results = {axis: sweep(axis, options.seconds) for axis in options.axes}
    content = {**machine(), "default": DEFAULT, "multiply_adds_a_second_and_core": rates, "seconds": results}
    (results_folder() / "scaling_codebook_search.json").write_text(
        json.dumps(content, indent=1) + "\n", encoding="utf-8"
    )
    if len(results) == len(AXES):
        plot(results, rates)


if __name__ == "__main__":
    main()
