"""How ops are registered: by ``torch.library.custom_op``, and called past the dispatcher where nobody needs it.

Between a call and its kernel lie the dispatcher and Python for autograd, aliases and dynamo: 10 to 40 us of the host,
often more than the launch. Where the dispatcher would only pass the call on, it is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from operator import or_
from typing import Any, cast

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.overrides import has_torch_function


def _keys(*names: str) -> int:
    bits: int = reduce(or_, (DispatchKeySet(getattr(DispatchKey, name)) for name in names)).raw_repr()
    return bits


# The dispatcher's keys of an ordinary thread and of ordinary tensors. Modes, transforms and traces change them, and so
# do subclasses, wrappers, and tensors that are negated, zeros or inference mode's.
try:
    from torch._C import DispatchKey, DispatchKeySet, _any_requires_grad, _is_torch_function_mode_enabled
    from torch._C import _dispatch_keys as _keys_of
    from torch._C import _dispatch_tls_local_include_set as _keys_of_thread
    from torch._C._autograd import _profiler_enabled

    THREAD = _keys("BackendSelect", "ADInplaceOrView")
    TENSORS = {_keys(d, f"Autograd{d}", f"Autocast{d}", "ADInplaceOrView"): d.lower() for d in ("CPU", "CUDA")}
except (ImportError, AttributeError):  # a torch in which these private names changed: its dispatcher is asked
    TENSORS = {}


def _ordinary(arguments: Sequence[Any]) -> str | None:
    """The first tensor's device, if the dispatcher would do no more than autograd and the call of its kernel."""
    if (
        not TENSORS
        or _keys_of_thread().raw_repr() != THREAD
        or _is_torch_function_mode_enabled()
        or _profiler_enabled()  # it names the ops
        or forward_ad._current_level >= 0
        or has_torch_function(arguments)
    ):
        return None
    found = [TENSORS.get(_keys_of(argument).raw_repr()) for argument in arguments if isinstance(argument, Tensor)]
    return found[0] if found and None not in found else None


class Op(CustomOpDef):
    """A custom op that calls its kernel itself where thread and tensors are ordinary.

    ``kernels``: by device; elsewhere the definition serves. That no kernel returns its inputs, which custom_op watches
    in every call, ``torch.library.opcheck`` watches in the tests.
    """

    kernels: dict[str, Callable[..., Any]]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # Dynamo reads no further than is_compiling.
        if not torch.compiler.is_compiling() and not named:
            each: Sequence[Any] = arguments
            if self._takes_lists:
                each = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,))]
            device = _ordinary(each)
            if device:
                if not (torch.is_grad_enabled() and _any_requires_grad(*each)):
                    return self._run(device, *arguments)
                if self._backward_fn is not None and not self._takes_lists:
                    return self._function.apply(*arguments)
        return self._opoverload(*arguments, **named)

    def register_kernel(self, device: str) -> Any:  # type: ignore[override]  # of one device, and as a decorator only
        def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels[device] = kernel
            super(Op, self).register_kernel(device)(kernel)
            return kernel

        return register

    def _run(self, device: str, *arguments: Any) -> Any:
        if any(self._written):
            written = [
                a for a, is_written in zip(arguments, self._written, strict=False) if is_written and a is not None
            ]
            torch.autograd.graph.increment_version(written)
        return self.kernels.get(device, self._init_fn)(*arguments)

    @cached_property
    def _written(self) -> list[bool]:
        """Of each argument; optional ones at the end may be left out of a call."""
        return [argument.is_write for argument in self._opoverload._schema.arguments]

    @cached_property
    def _takes_lists(self) -> bool:
        return any(isinstance(argument.type, torch.ListType) for argument in self._opoverload._schema.arguments)

    @cached_property
    def _function(self) -> Any:
        run, save, backward = self._run, cast(Any, self._setup_context_fn), cast(Any, self._backward_fn)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(arguments[0].device.type, *arguments)
            save(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self._name, (torch.autograd.Function,), methods)


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """As ``torch.library.custom_op``."""

    def register(definition: Callable[..., Any]) -> Op:
        op: Any = torch.library.custom_op(name, definition, mutates_args=mutates_args)
        op.__class__, op.kernels = Op, {}
        return cast(Op, op)

    return register
