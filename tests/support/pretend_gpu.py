"""A GPU that is not there: tensors that say they are on ``cuda:0`` and are computed on the CPU.

Under ``pretend_gpu()`` an operation on tensors of both devices raises as it would on a GPU, and so does ``numpy()``;
what is made on or moved to the device stays there. So a tensor that someone forgot to move is found without a GPU, in
whole commands, and the results are the CPU's. Python inside of ops is looked at where it decides by values (``OPEN``);
backward passes are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from beitv2_fast.quantize.collapse import CLOCK  # the size of a tensor that stays with the host

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES = {"to", "cuda", "cpu", "copy_", "_has_compatible_shallow_copy_type"}  # may see both devices
INDEXING = {"__getitem__", "__setitem__", "index_put_"}  # by indices that may lie on the CPU
# A GPU would be waited for: its values are asked for, or memory that is not pinned is copied in step with it.
WAITS = {
    "item",
    "tolist",
    "cpu",
    "nonzero",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "new_tensor",
}
# Python inside of ops: the host's decisions. Run in the open, so that it is looked at, too.
OPEN = ("beitv2_fast::start_codebook", "beitv2_fast::replace_dead_codes")


class OnGPU(Tensor):
    """A tensor that says it is on the GPU."""

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def grad(self) -> Tensor | None:
        found = torch.Tensor.grad.__get__(self)
        return None if found is None else found.as_subclass(OnGPU)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        torch.Tensor.grad.__set__(self, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = made = self.detach().clone().requires_grad_(self.requires_grad)
        made._is_param = getattr(self, "_is_param", False)
        return made

    def numpy(self, **_: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return performed(func, args, kwargs or {})


class Placing(TorchFunctionMode):
    """Makes tensors on the GPU where a device is named, and moves others there."""

    waits: ClassVar[list[str]] = []  # what the host would have waited for

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(getattr(func, "_schema", None), "name", None) or getattr(func, "_qualified_op_name", "")
        if name in OPEN:
            check(func, [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.numel() != CLOCK])
            with self:
                return torch._library.custom_ops.OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        return performed(func, args, kwargs or {})


def performed(func: Any, args: tuple, kwargs: dict) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        name = getattr(func, "__name__", str(func))
        there = any(isinstance(tensor, OnGPU) for tensor in tensors)
        target = wanted_device(name, args, kwargs)
        if there and target is None and name not in MOVES and torch._C._current_graph_task_id() == -1:
            check(func, tensors if name not in INDEXING or not isinstance(tensors[0], OnGPU) else tensors[:1])
        if waits(name, tensors, there, target, kwargs):
            Placing.waits.append(name)
        if name == "cuda" or name == "cpu" or (name == "to" and target is not None):
            return moved(args, kwargs, target or (GPU if name == "cuda" else CPU))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        if isinstance(func, torch._ops.OpOverload):  # its Python, if it has any, is the CPU's own
            args, kwargs = tree_map_only(OnGPU, lambda t: t.as_subclass(Tensor), (args, kwargs))
        out = func(*args, **kwargs)
        if target.type == "cuda" if target is not None else there:
            return tree_map_only(Tensor, lambda t: t if isinstance(t, OnGPU) else t.as_subclass(OnGPU), out)
        return out


def waits(name: str, tensors: list[Tensor], there: bool, target: torch.device | None, kwargs: dict) -> bool:
    crossing = target is not None and tensors != [] and (target.type == "cuda") != there
    if name in ("to", "copy_", "__setitem__") and not kwargs.get("non_blocking"):
        return crossing or len({isinstance(t, OnGPU) for t in tensors if t.dim() > 0}) > 1
    by_mask = name == "__getitem__" and any(t.dtype == torch.bool for t in tensors[1:])
    made = name == "tensor" and target is not None and target.type == "cuda"
    return made or (there and (name in WAITS or by_mask))


def wanted_device(name: str, args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call names."""
    named = kwargs.get("device")
    if name == "to" and named is None:
        named = next((a.device if isinstance(a, Tensor) else a for a in args[1:] if not is_dtype(a)), None)
    return None if named is None else torch.device(named)


def is_dtype(value: object) -> bool:
    return value is None or isinstance(value, torch.dtype | bool)


def moved(args: tuple, kwargs: dict, target: torch.device) -> Tensor:
    tensor = args[0]
    given = [a.dtype if isinstance(a, Tensor) else a for a in (*args[1:], *kwargs.values())]
    plain = tensor.to(
        next((a for a in given if isinstance(a, torch.dtype)), tensor.dtype), copy=bool(kwargs.get("copy"))
    )
    if (target.type == "cuda") == isinstance(tensor, OnGPU):
        return plain if plain is tensor else plain.as_subclass(type(tensor))
    return plain.clone().as_subclass(OnGPU if target.type == "cuda" else Tensor)


def check(func: Any, tensors: list[Tensor]) -> None:
    sides = {isinstance(tensor, OnGPU) for tensor in tensors if tensor.dim() > 0}
    if len(sides) > 1:
        shapes = [(tuple(t.shape), "cuda:0" if isinstance(t, OnGPU) else "cpu") for t in tensors]
        raise RuntimeError(f"{func}: tensors on two devices: {shapes}")


class Autocast(torch.autocast):
    """The CPU's autocast, where the GPU's is asked for."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(on_cpu(device_type), *args, **kwargs)


def on_cpu(device_type: str) -> str:
    return "cpu" if device_type == "cuda" else device_type


@contextmanager
def pretend_gpu() -> Iterator[None]:
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # by tensors of another class
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch, "is_autocast_enabled", lambda device="cuda": enabled(on_cpu(device)))
        patch.setattr(torch, "get_autocast_dtype", lambda device: dtype(on_cpu(device)))
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        patch.setattr(torch.cuda, "Event", Mock)  # all is done when it is recorded
        try:
            with Placing():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
