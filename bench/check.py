"""Have search, update, head or attention become slower beside a peer of plain PyTorch? ``make bench-check``.

Each is timed in turn with its peer, on one thread and in processor time, which other programs lengthen the least. The
ratio of the medians may be ``FACTOR`` times the committed one, of ratios.json, at most. Ratios are of a processor: for
one that is not in the file, ``--write`` measures and adds them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from beitv2_fast.kernels import codebook_search
from bench import test_attention as attention
from bench import test_codebook_search as search
from bench import test_codebook_update as update
from bench import test_masked_cross_entropy as head
from bench.harness import DEVICE, OURS

FACTOR = 1.3
ROUNDS, SECONDS = 5, 0.1  # of each implementation; of a round, at least
FILE = Path(__file__).with_name("ratios.json")
Run = Callable[[], object]


def pairs() -> Iterator[tuple[str, Run, Run]]:
    """What is timed: the name, ours, the peer."""
    x, codebook = search.problem()
    peer = "torch normalize + matmul + argmax"
    yield f"search / {peer}", search.ours(x, codebook), search.IMPLEMENTATIONS[peer](x, codebook)
    one = search.problem(1, d=1024)
    yield f"search of one wide vector / {peer}", search.ours(*one), search.IMPLEMENTATIONS[peer](*one)

    indices, peer = codebook_search(x, codebook).indices, "torch bincount + index_add_"
    state = (codebook.clone(), torch.zeros(len(codebook)), x, indices)
    yield f"update / {peer}", lambda: update.ours(*state), lambda: update.IMPLEMENTATIONS[peer](*state)

    p = head.problem()
    runs = [lambda loss=loss: torch.autograd.grad(loss(p), p.leaves) for loss in (head.ours, head.eager)]
    yield "head, forward and backward / eager", *runs

    B, N, H, D = attention.B, attention.N, attention.H, attention.D
    qkv, bias = torch.randn(B, N, 3, H, D, requires_grad=True), torch.randn(1, H, N, N, requires_grad=True)
    grad = torch.randn(B, N, H * D)
    both = (attention.ours, attention.sdpa)
    runs = [lambda attend=attend: torch.autograd.grad(attend(qkv, bias), (qkv, bias), grad) for attend in both]
    yield "attention, forward and backward / F.scaled_dot_product_attention", *runs


def ratio(ours: Run, peer: Run) -> float:
    """Processor time of ours by the peer's, medians of rounds in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    runs = [(run, max(1, round(SECONDS / (timed(run, 1) and timed(run, 1))))) for run in (ours, peer)]
    for _ in range(ROUNDS):
        for (run, calls), found in zip(runs, times, strict=True):
            found.append(timed(run, calls))
    return statistics.median(times[0]) / statistics.median(times[1])


def timed(run: Run, calls: int) -> float:
    """Processor seconds per call."""
    started = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - started) / calls


def slower(measured: Mapping[str, float], committed: Mapping[str, float]) -> list[str]:
    """What is beyond FACTOR times its committed ratio, or has none, in words."""
    problems = [f"{name}: measured, but not committed" for name in measured.keys() - committed.keys()]
    problems += [f"{name}: committed, but not measured" for name in committed.keys() - measured.keys()]
    for name in measured.keys() & committed.keys():
        grown = measured[name] / committed[name]
        if not grown <= FACTOR:
            problems.append(f"{name}: {measured[name]:.3f}, {grown:.2f} times the committed {committed[name]:.3f}")
    return sorted(problems)


def processor() -> str:
    """Its name, and the instruction set that torch uses of it."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{found[1] if found else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="commit what is measured now, for this processor")
    write = parser.parse_args(argv).write
    if DEVICE.type != "cpu":
        sys.exit("bench.check is of the CPU: start it with CUDA_VISIBLE_DEVICES= (python -m bench.gpu is of a GPU).")
    torch.set_num_threads(1)
    committed = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known = committed.get(processor(), {}).get("ratios")
    if known is None and not write:
        sys.exit(f"{FILE.name} has no ratios of this processor, {processor()}. Add them: python -m bench.check --write")
    measured = {}
    for name, *runs in pairs():
        measured[name] = round(ratio(*runs), 4)
        before = f"  committed {known[name]:.4f}" if known and name in known else ""
        print(f"{OURS} {name}: {measured[name]:.4f}{before}", flush=True)
    if write:
        committed[processor()] = {"torch": torch.__version__, "ratios": measured}
        FILE.write_text(json.dumps(committed, indent=1) + "\n", encoding="utf-8")
        return 0
    problems = slower(measured, known)
    print("\n".join(problems) or f"none is slower than {FACTOR} times its committed ratio")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
