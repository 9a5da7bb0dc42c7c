"""Weights of teachers in TorchScript archives and pickles: tensors are read, code in them is not run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from beitv2_fast.errors import UserError
from beitv2_fast.teachers import create_teacher
from beitv2_fast.teachers.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")


def rewritten(source: Path, target: Path, data: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive with another data.pkl, or compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, data if data and name.endswith("/data.pkl") else old.read(name))
    return target


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm_was_done"),)


def test_hostile_torchscript_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.trace(nn.Linear(64, 64), torch.zeros(1, 64)), "good.pt")
    good = Path("good.pt")
    assert is_torchscript(good) and read_torchscript(good)["weight"].shape == (64, 64)
    data = zipfile.ZipFile(good).read("good/data.pkl")
    outside = data.replace(b"K\x00(K@K@t", b"K\x07(K@K@t")  # an offset that reaches beyond the storage
    assert outside != data
    files = {
        "asks for": rewritten(good, Path("code.pt"), pickle.dumps(Harmful(), 2)),
        "is no plain storage": rewritten(good, Path("bomb.pt"), compression=zipfile.ZIP_DEFLATED),
        "not a module": rewritten(good, Path("list.pt"), pickle.dumps([1], 2)),
        "out of bounds": rewritten(good, Path("outside.pt"), outside),
    }
    for said, file in files.items():
        with pytest.raises(UserError, match=said):
            read_torchscript(file)
    assert not Path("harm_was_done").exists()


def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed (extra: teachers)")
    monkeypatch.chdir(tmp_path)
    Path("teacher.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"teacher\.pth cannot be read as a checkpoint"):
        create_teacher("dino", (14, 14), "teacher.pth")
    assert not Path("harm_was_done").exists()
