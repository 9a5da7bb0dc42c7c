"""`python halting.py STEP SCRIPT OPTIONS`: a training command that halts at the end of STEP until it reads a line.

So that a test can send it a signal at a known moment. With several ranks all of them halt, or the one of HALTED_RANK.
STEP check: rank 0 halts when it has written what the first rounds of the check of images found.
"""

import os
import runpy
import sys

from beitv2_fast.data import check
from beitv2_fast.training import monitor

local_rank = [a for a in sys.argv[1:] if a.startswith("--local_rank")]  # the DeepSpeed launcher puts it first
step, script, *options = [a for a in sys.argv[1:] if a not in local_rank]
rank = os.environ.get("RANK", "0")
add, add_to_cache, rounds = monitor.TrainingLog.add, check._add_to_cache, []


def halt():
    print(f"halted at step {step}", flush=True)
    sys.stdin.readline()


def add_and_halt(self, at, *args):
    add(self, at, *args)
    if str(at) == step and os.environ.get("HALTED_RANK", rank) == rank:
        halt()


def add_to_cache_and_halt(*args):
    add_to_cache(*args)
    rounds.append(args)
    if step == "check" and len(rounds) == 3:
        halt()


monitor.TrainingLog.add, check._add_to_cache = add_and_halt, add_to_cache_and_halt
sys.argv = [script, *options, *local_rank]
runpy.run_path(script, run_name="__main__")
