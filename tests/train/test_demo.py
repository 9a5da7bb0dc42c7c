"""The demo's handling of its stages; what they compute is tested with them."""

from __future__ import annotations

import signal
import subprocess
import sys

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
