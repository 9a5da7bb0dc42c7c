"""The tensors of a TorchScript archive (OpenAI's CLIP files are such), read without running the code in it.

torch.jit.load compiles and may run what the archive's code/ says. Here only ``data.pkl``, which says where each tensor
lies, is read, by an unpickler that knows tensors and plain modules and nothing else.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip archive with code in it, as torch.jit.save writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The state dict of the module in a TorchScript archive; none of its code is run.

    Raises:
        CheckpointError: the archive is damaged, compressed, or its data.pkl names anything but tensors and modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = (name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"])
            with archive.open(data) as stream:
                module = _Unpickler(stream, archive, data.removesuffix(".pkl")).load()
        if not isinstance(module, _Module):
            raise ValueError(f"data.pkl holds a {type(module).__name__}, not a module")
        return dict(module.tensors())
    except Exception as error:  # a hostile or cut file may raise nearly anything
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as a TorchScript archive of plain tensors ({reason}): it is damaged or holds more "
            "than a network's weights. Use an intact file, or one with only the state dict (.safetensors, .pth)."
        ) from error


class _Module:
    """Stands for every class of the archive: what it was given is kept, nothing is done with it."""

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.values = dict(values)

    def tensors(self, prefix: str = "") -> list[tuple[str, Tensor]]:
        found = []
        for name, value in self.values.items():
            if isinstance(value, Tensor):
                found.append((prefix + name, value))
            elif isinstance(value, _Module):
                found += value.tensors(f"{prefix}{name}.")
        return found


class _Unpickler(pickle.Unpickler):
    """Knows the names below; any other is an error, so no function of the machine can be reached from the file."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str):
        super().__init__(stream)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return list
        raise pickle.UnpicklingError(f"data.pkl asks for {module}.{name}")

    def persistent_load(self, key: tuple[Any, ...]) -> Tensor:
        kind, dtype, name, _device, length = key
        info = self.archive.getinfo(f"{self.folder}/{name}")
        if kind != "storage" or info.compress_type != zipfile.ZIP_STORED:  # torch stores; a small bomb would inflate
            raise pickle.UnpicklingError(f"{info.filename} is no plain storage")
        if info.file_size < length * dtype.itemsize:
            raise pickle.UnpicklingError(f"{info.filename} has {info.file_size} bytes, too few for {length} {dtype}")
        if length == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self.archive.read(info)), dtype=dtype, count=length)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage, which as_strided keeps inside of it."""
    if math.prod(size) == 0:
        return storage.new_empty(size)
    return storage.as_strided(size, stride, offset)
