"""Stands for bench.gpu.worker in tests of the runner: sections that hang, die or lose the GPU, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.runner import MARK


def say(**record: object) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(record)}\n")
    sys.stdout.flush()


say(section="run", what="machine", kind="cpu", tiny=True)
for line in sys.stdin:
    name = json.loads(line)["section"]
    print("what a library says is no result", flush=True)
    if name == "env":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["CHILD"]).write_text(str(child.pid))
        time.sleep(600)
    if name == "search":
        os._exit(3)
    say(section=name, what="result", process=os.getpid())
    say(section=name, what="section", seconds=0.1, replace=name == "head")
