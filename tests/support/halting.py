"""`python halting.py STEP SCRIPT OPTIONS`: a training command that halts at the end of STEP until it reads a line.

So that a test can send it a signal at a known moment. With several ranks all of them halt, or the one of HALTED_RANK.
"""

import os
import runpy
import sys

from beitv2_fast.training import monitor

local_rank = [a for a in sys.argv[1:] if a.startswith("--local_rank")]  # the DeepSpeed launcher puts it first
step, script, *options = [a for a in sys.argv[1:] if a not in local_rank]
rank = os.environ.get("RANK", "0")
add = monitor.TrainingLog.add


def add_and_halt(self, at, *args):
    add(self, at, *args)
    if at == int(step) and os.environ.get("HALTED_RANK", rank) == rank:
        print(f"halted at step {step}", flush=True)
        sys.stdin.readline()


monitor.TrainingLog.add = add_and_halt
sys.argv = [script, *options, *local_rank]
runpy.run_path(script, run_name="__main__")
