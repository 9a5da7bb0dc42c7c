"""Processes that are forked keep their hands off the garbage of their parent."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from beitv2_fast.data.forks import kept_from_the_collector
from beitv2_fast.data.torch_loader import TorchLoader


class Destroyed:
    """In a cycle, so that only the garbage collector destroys it; tells in which process."""

    def __init__(self, file: Path) -> None:
        self.file, self.itself = file, self

    def __del__(self) -> None:
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")


def leave_garbage_and_fork(file: Path) -> list[int]:
    """The processes that destroyed it: the fork's collector runs first, then this process's."""
    Destroyed(file)
    if not (child := os.fork()):
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    gc.collect()
    return [int(process) for process in file.read_text().split()]


def test_a_fork_leaves_alone_what_became_garbage_just_before_it_and_later_forks_collect_again(tmp_path):
    gc.disable()
    try:
        with kept_from_the_collector():
            assert leave_garbage_and_fork(tmp_path / "within") == [os.getpid()]
        child, parent = leave_garbage_and_fork(tmp_path / "after")
        assert parent == os.getpid() != child
    finally:
        gc.enable()


@pytest.mark.parametrize("frozen_before", (True, False))
def test_what_the_parent_froze_stays_frozen_and_nothing_else(frozen_before):
    """Python 3.12 freezes immortal objects whenever it collects."""
    gc.collect()
    try:
        if frozen_before:
            gc.freeze()
        before, younger = gc.get_freeze_count(), [[] for _ in range(100)]
        with kept_from_the_collector():
            pass
        gone = before - gc.get_freeze_count()  # a few, which other threads had until now
        assert 0 <= gone < len(younger)
    finally:
        if frozen_before:
            gc.unfreeze()


class Collecting:
    """A data set whose workers collect their garbage."""

    def __getitems__(self, keys):
        gc.collect()
        return {"image": torch.zeros(len(keys))}


def test_no_worker_destroys_what_its_parent_left_to_the_garbage_collector(tmp_path):
    """A DALI pipeline waits in its destructor for threads that a fork does not take along."""
    gc.disable()
    try:
        Destroyed(tmp_path / "by")
        assert len(list(TorchLoader(Collecting(), [[0], [1]], workers=1))) == 2
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "by").read_text().split() == [str(os.getpid())]
