"""python -m bench.host_time finds the launches of a step, and the implementations that make them, and repeats them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ..support.training import ENVIRONMENT, ROOT

pytest.importorskip("triton")
SHOW = """
import json
from collections import Counter
from triton.runtime.jit import JITFunction
from bench import host_time
made, launch = Counter(), JITFunction.run
def count(self, *arguments, **options):
    made[self.__name__] += 1
    return launch(self, *arguments, **options)
JITFunction.run = count
host_time.pretend()
for call in [*host_time.steps().values(), *host_time.heads().values()]:
    made.clear()
    call()
    print(json.dumps(made))
"""


def test_each_row_makes_the_launches_of_a_step():
    command = [sys.executable, "-c", SHOW]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    module, ops, implementations, launches, reference, *heads = map(json.loads, done.stdout.splitlines())
    assert len(module) == 8 and {*module.values()} == {1}
    assert implementations == launches == module and reference == {}
    assert {**ops, "counts_kernel": 1} == module  # the module keeps ``usage()``
    head = {"normalize_rows": 2, "softmax_rows": 1, "normalize_rows_backward": 2, "weigh": 1, "scatter_rows_kernel": 2}
    assert heads == [head, head, {}]
