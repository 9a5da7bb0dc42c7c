"""A tiny run and its page's server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from beitv2_fast.config.show import ExploreConfig
from beitv2_fast.show.explore.answers import Answers
from beitv2_fast.show.explore.server import Server
from beitv2_fast.show.index import build_index
from beitv2_fast.show.runs import open_runs

from ...support.small_runs import small_runs


@pytest.fixture(scope="package")
def root(tmp_path_factory) -> Path:
    return small_runs(tmp_path_factory.mktemp("runs"))


def answers_of(run: Path, **options) -> Answers:
    config = ExploreConfig(device="cpu", **options)
    runs = open_runs(run, config)
    return Answers(runs, build_index(runs, config))


@pytest.fixture(scope="package")
def answers(root) -> Answers:
    return answers_of(root)


@pytest.fixture
def server(answers) -> Iterator[Server]:
    yield from serving(answers)


def serving(answers: Answers) -> Iterator[Server]:
    with Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
