"""Tests of Triton kernels without a GPU: modules marked ``interpreted`` run in a process with TRITON_INTERPRET=1.

A process is either interpreted or not, from the moment it imports triton. So the first test of a marked module starts
one child process, which runs all marked tests of the session in order and sends back pytest's own reports: failures
read as if they had happened here. A test that kills the child (a read behind a guard page) fails with the child's
last words, and the next one gets a new child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

CAPABILITIES = ("portable", "avx2", "avx512", "avx512_vnni")
CHILD = os.environ.get("TRITON_INTERPRET") == "1"
REPORTS = "BEITV2_FAST_INTERPRETED_REPORTS"  # file descriptor on which the child writes one report per line


def pytest_configure(config: pytest.Config) -> None:
    if CHILD:
        from ..support.triton_tools import correct_bfloat16, correct_scalars

        correct_bfloat16()
        correct_scalars()


class InterpretedChild:
    """A pytest process with TRITON_INTERPRET=1 that runs ``node_ids`` and hands over their reports."""

    def __init__(self, config: pytest.Config, node_ids: list[str]) -> None:
        self.config = config
        self.output = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed by close())
        read_end, write_end = os.pipe()
        environment = {**os.environ, "TRITON_INTERPRET": "1", REPORTS: str(write_end)}
        flags = ["-p", "no:cacheprovider", "--rootdir", str(config.rootpath), "--override-ini", "addopts="]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *flags, *node_ids],
            cwd=config.rootpath,
            env=environment,
            pass_fds=[write_end],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        os.close(write_end)
        self.reports = os.fdopen(read_end, encoding="utf-8")

    def run(self, node_id: str) -> Iterator[pytest.TestReport]:
        """Reports of one test (set-up, call, tear-down); ends early when the process has died."""
        for line in self.reports:
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
            if report.skipped and isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # (file, line, reason): JSON knows no tuples
            assert report.nodeid == node_id, f"the interpreted process ran {report.nodeid} in place of {node_id}"
            yield report
            if report.when == "teardown":
                return

    def last_words(self) -> str:
        code = self.process.wait()
        self.output.seek(0)
        text = self.output.read()
        crash = text[text.find("Fatal Python error") :] if "Fatal Python error" in text else text[-4000:]
        lines = [line for line in crash.splitlines() if "site-packages/_pytest" not in line and "pluggy" not in line]
        return "\n".join([f"the interpreted process ended with code {code}", *lines[:40]])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reports.close()
        self.output.close()


_CHILD_KEY = pytest.StashKey[InterpretedChild]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if CHILD or item.get_closest_marker("interpreted") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    if _CHILD_KEY not in item.session.stash:
        marked = [other.nodeid for other in item.session.items if other.get_closest_marker("interpreted")]
        item.session.stash[_CHILD_KEY] = InterpretedChild(item.config, marked[marked.index(item.nodeid) :])
    child = item.session.stash[_CHILD_KEY]
    finished = False
    for report in child.run(item.nodeid):
        item.ihook.pytest_runtest_logreport(report=report)
        finished = report.when == "teardown"
    if not finished:
        words = child.last_words()
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", words, "call")
        item.ihook.pytest_runtest_logreport(report=report)
        del item.session.stash[_CHILD_KEY]
        child.close()
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # of the folders and modules that the tests before have set up
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if CHILD and REPORTS in os.environ:
        config = _session_config[0]
        line = json.dumps(config.hook.pytest_report_to_serializable(config=config, report=report)) + "\n"
        os.write(int(os.environ[REPORTS]), line.encode())


_session_config: list[pytest.Config] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    _session_config.append(session.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _CHILD_KEY in session.stash:
        session.stash[_CHILD_KEY].close()


@pytest.fixture(params=(*CAPABILITIES, "reference"))
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each version of the search that runs on a CPU: the C++ op on each instruction set of this machine, and the
    reference."""
    from beitv2_fast.kernels.codebook_search import ops

    if request.param == "reference":
        monkeypatch.setattr(ops, "native_ops", lambda: False)
        yield request.param
        return
    if not ops.native_ops():
        pytest.skip("the C++ ops are not compiled")
    available = torch.ops.beitv2_fast_cpu.available_capabilities()
    if request.param not in available:
        pytest.skip(f"this machine has only {', '.join(available)}")
    torch.ops.beitv2_fast_cpu.use_capability(request.param)
    yield request.param
    torch.ops.beitv2_fast_cpu.use_capability("")
