"""`beitv2-fast explore` as a process: it says its address, serves it, and ends by Ctrl+C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from beitv2_fast import cli
from beitv2_fast.config.show import ExploreConfig

from ...support.training import ENVIRONMENT

# A shell that starts tests in the background has them ignore SIGINT, and what they start too.
START = """import signal; from beitv2_fast.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler); main()"""


@pytest.mark.slow
def test_the_command_serves_the_page_until_ctrl_c(root):
    command = [sys.executable, "-c", START, "explore", str(root), "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", said)[0]
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert b"<canvas" in answer.read()
        with urllib.request.urlopen(f"{url}api/info", timeout=60) as answer:
            assert json.load(answer)["images"] == 8
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


def test_help_explains_what_a_run_is_and_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run_command(["explore", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and " ".join(ExploreConfig.__doc__.split()) in said
    assert all(name in said for name in ("--data", "--max-images", "--teacher", "--port", "--no-browser", "127.0.0.1"))
