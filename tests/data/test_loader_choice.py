"""Without DALI the other loader is taken, and asking for DALI says what to install."""

from __future__ import annotations

import sys

import pytest

from beitv2_fast.data.loaders import choose_loader
from beitv2_fast.errors import UserError


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # importing it fails


def test_without_dali_torchvision_is_chosen_and_the_reason_given(no_dali):
    assert choose_loader("auto") == ("torchvision", "DALI is not installed")


def test_asking_for_dali_without_it_names_the_extra(no_dali):
    with pytest.raises(UserError, match=r"pip install 'beitv2-fast\[dali\]'"):
        choose_loader("dali")
