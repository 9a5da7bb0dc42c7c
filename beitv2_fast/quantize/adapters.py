"""The fused quantizer behind the signatures of other projects' quantizers (vq_pytorch.py has a library's own)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import codebook_search, vector_quantize
from .options import QuantizerOptions
from .quantizer import FusedVectorQuantizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

SAME_LENGTH = 1e-5  # a code's length differs from 1 by less when it was normalized in fp32


class Unsupported(ValueError):
    """A quantizer uses an option that its adapter cannot keep."""


def refuse(options: dict[str, Any]) -> None:
    used = [name for name, value in options.items() if value]
    if used:
        raise Unsupported(f"the option {', '.join(used)} has no fused counterpart")


def refuse_unknown(module: nn.Module, known: str, of: str = "") -> None:
    """Refuse what a copy of a class has beside the ``known`` attributes, parameters, buffers and submodules, and
    options of its nn.Embedding that change gradients or weights."""
    tables = (vars(module), module._parameters, module._buffers, module._modules)
    unknown = {name: value for table in tables for name, value in table.items() if name[0] != "_"}
    for name in ("training", *known.split()):
        unknown.pop(name, None)
    refuse({of + name: not isinstance(value, bool | int | float | None) or value for name, value in unknown.items()})
    for name, table in module.named_children():
        if isinstance(table, nn.Embedding):
            options = {option: getattr(table, option) for option in ("max_norm", "scale_grad_by_freq", "sparse")}
            options["padding_idx"] = table.padding_idx is not None
            refuse({f"{name}.{option}": value for option, value in options.items()})


def refuse_hidden(module: nn.Module, *methods: str) -> None:
    """Refuse a module with attributes of its own in place of ``methods`` of its class."""
    hidden = [name for name in methods if name in vars(module)]
    if hidden:
        raise Unsupported(
            f"{', '.join(hidden)} is set on the module itself, as some hooks do: "
            "replace quantizers before such hooks are added, or remove them first"
        )


def with_methods(known: str = "", **methods: Callable[..., Any]) -> Callable[..., nn.Module]:
    """An adapter that gives a module ``methods`` instead of its own, each called with the module before its arguments.

    The rest of it stays: parameters, names in state dicts, its other methods. Its class becomes a subclass of its own.

        def forward(module, z):  # z [B, C, H, W]
            rows = z.movedim(1, -1).flatten(0, -2)
            indices = codebook_search(rows, module.embedding.weight, metric="euclidean").indices
            ...

        replace_quantizers(model, {TheirQuantizer: with_methods(forward=forward)})

    Args:
        known: names, with spaces between them, of all attributes, parameters, buffers and submodules that the methods
            reckon with: a module that uses others is refused by their names. By default nothing is refused.
        methods: functions of a module (not lambdas, if the model is to be pickled), by the names of its methods.

    Raises:
        TypeError: a method that is no function. The adapter raises Unsupported for what is not ``known``, for a module
            with an attribute of its own in place of a method, and for one whose methods are replaced already.
    """
    for name, method in methods.items():
        if not isinstance(method, FunctionType):  # others are not bound, or are copied with the module
            raise TypeError(f"{name} must be a function; got {method!r}: call it in a `def {name}(module, ...)`")

    def adapter(module: nn.Module, **options: Any) -> Any:
        if isinstance(module, Replaced):
            raise Unsupported("its methods are replaced already: name all of them in one call of with_methods")
        refuse_hidden(module, *methods)
        if known:
            refuse_unknown(module, known)
        return _replace(module, tuple(methods.items()))

    return adapter


class Replaced:
    """What modules with replaced methods are too. As no import finds their class, their copies and pickles are those of
    a module of the original class, which is given the methods again."""

    replaced: ClassVar[tuple[Any, Any]]

    def __init_subclass__(cls) -> None:
        """Not that of the original class, to which this is no further one."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls, methods = self.replaced
        make, args, *state = _of_class(cls, self).__reduce_ex__(protocol)
        return _replace_again, (methods, make, args), *state


def _replace(module: Any, methods: tuple[tuple[str, Callable[..., Any]], ...]) -> Any:
    cls: Any = type(module)
    return _of_class(_subclass(cls, methods), module)


def _replace_again(methods: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return _replace(make(*args), methods)


@cache
def _subclass(cls: Any, methods: tuple[tuple[str, Callable[..., Any]], ...]) -> Any:
    names = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(cls.__name__, (Replaced, cls), {**names, **dict(methods), "replaced": (cls, methods)})


def _of_class(cls: Any, module: Any) -> Any:
    """A module of another class with the same attributes."""
    new: Any = object.__new__(cls)
    vars(new).update(nn.Module.__getstate__(module))
    return new


def quantize_map(z: Tensor, codes: Tensor, metric: str = "euclidean", **weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``vector_quantize`` of z [B, C, ...]: what comes out for z, the loss, and indices [N] of all vectors."""
    last = z.movedim(1, -1)
    with torch.autocast(z.device.type, enabled=False):
        out = vector_quantize(last.reshape(-1, last.shape[-1]), codes, metric=metric, **weights)
    quantized = out.quantized.view(last.shape).movedim(-1, 1).to(z.dtype).contiguous()
    return quantized, out.loss.to(z.dtype), out.indices


class NormEMAAdapter(FusedVectorQuantizer):
    """For NormEMAVectorQuantizer of BEiT v2 and the projects that copied it: [B, C, H, W] -> (z_q, loss, indices).

    Exact parity, so dead codes stay dead unless ``dead_after`` is given, ``embedding.update = False`` is ``freeze()``,
    and codes of other than unit length are searched by their distance from l2(z). Checkpoints with the reference's
    names load. Not read, as by the original: ``eps``, ``embedding.decay`` and the statistics of ``embedding``.
    Different: statistics are always summed over ranks.
    """

    any_length = True
    known = "num_tokens codebook_dim beta decay embedding cluster_size statistic_code_usage all_reduce_fn"

    def __init__(self, module: Any, **options: Unpack[QuantizerOptions]):
        refuse_unknown(module, self.known)
        known = "num_tokens codebook_dim decay eps weight cluster_size embed_avg initted update"
        refuse_unknown(module.embedding, known, "embedding.")
        kept: dict[str, Any] = {
            "decay": module.decay,
            "commitment_weight": module.beta,
            "channel_last": False,
            "dead_after": 0.0,
            "kmeans_init": not bool(module.embedding.initted),
        }
        super().__init__(module.num_tokens, module.codebook_dim, **{**kept, **options})
        self.beta, self.num_tokens, self.codebook_dim = module.beta, module.num_tokens, module.codebook_dim
        self.to(module.embedding.weight.device)
        with torch.no_grad():
            self.codebook.copy_(module.embedding.weight)
            if getattr(module, "cluster_size", None) is not None:
                self.cluster_size.copy_(module.cluster_size)
        self._look_at_lengths()
        if not getattr(module.embedding, "update", True):
            self.freeze()

    def _look_at_lengths(self) -> None:
        self.by_distance = not self.codebook.is_meta and bool(
            self.initialized and ((self.codebook.norm(dim=-1) - 1).abs() > SAME_LENGTH).any()
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._look_at_lengths()

    def _nearest(self, x: Tensor, codes: Tensor) -> Tensor:
        if not self.by_distance:
            return super()._nearest(x, codes)
        y = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        return codebook_search(y, codes, metric="euclidean").indices

    def _quantize(
        self, x: Tensor, codebook: Tensor, keep: Tensor | None, drawn: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = self._nearest(x, codebook) if self.by_distance and drawn is None else drawn
        return super()._quantize(x, codebook, keep, found)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # as the original's
        out = super().forward(z)
        return out.quantized, out.loss, out.indices.flatten()

    @property
    def embedding(self) -> CodesOfNormEMA:
        """Under the original's name: ``embedding.weight``, ``embedding(indices)``, ``embedding.update``."""
        return CodesOfNormEMA(self)

    @torch.no_grad()
    def reset_cluster_size(self, device: torch.device | None = None) -> None:
        """Forget the usage statistics, as the reference does at the start of every epoch and before evaluation."""
        if self.embed_avg is not None:
            raise RuntimeError("with learning='sum_ema' the codes are embed_avg / cluster_size: it cannot be forgotten")
        self.cluster_size.zero_()


class CodesOfNormEMA:
    """The codebook of a quantizer, as the submodule that it was before; holds nothing."""

    def __init__(self, quantizer: FusedVectorQuantizer):
        self._quantizer = quantizer

    @property
    def weight(self) -> Tensor:
        return self._quantizer.codebook

    @property
    def update(self) -> bool:
        return not self._quantizer.frozen

    @update.setter
    def update(self, update: bool) -> None:
        self._quantizer.freeze(not update)

    def __call__(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)


def embedding_forward(
    module: Any, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
    refuse({"temp": temp not in (None, 1.0), "rescale_logits": rescale_logits, "return_logits": return_logits})
    # legacy: the published models were trained with beta on the other term.
    weights = {"codebook_weight" if module.legacy else "commitment_weight": module.beta}
    quantized, loss, indices = quantize_map(z, module.embedding.weight, **{"codebook_weight": 1.0, **weights})
    if module.remap is not None:
        indices = _to_used(module, indices)[:, None]
    if module.sane_index_shape:
        indices = indices.reshape(z.select(1, 0).shape)
    return quantized, loss, (None, None, indices)


def _to_used(module: Any, indices: Tensor) -> Tensor:
    """Numbers of codes -> their places in ``used``; others become unknown_index, or any place for "random"."""
    numbers = torch.arange(len(module.used), device=indices.device)
    table = torch.full((module.n_e,), len(numbers), device=indices.device)
    table.scatter_reduce_(0, module.used.long(), numbers, "amin")  # code -> its first place in used
    places = table[indices]
    if module.unknown_index == "random":
        unknown = torch.randint_like(places, module.re_embed)
    else:
        unknown = torch.full_like(places, int(module.unknown_index))
    return torch.where(places == len(numbers), unknown, places)


def embed_code(module: Any, indices: Tensor) -> Tensor:
    """[B, H, W] -> codes [B, C, H, W]: what ``decode_code`` of taming's models asks of a quantizer, in vain there."""
    codes: Tensor = module.embedding(indices)
    return codes.movedim(-1, 1)


EmbeddingAdapter = with_methods(
    "embedding n_e e_dim vq_embed_dim beta legacy remap used re_embed unknown_index sane_index_shape",
    forward=embedding_forward,
    embed_code=embed_code,
)
"""For diffusers' VectorQuantizer (in VQModel) and taming-transformers' VectorQuantizer2: Euclidean, [B, C, H, W] ->
(z_q, loss, (None, None, indices)), with the codes of an ``nn.Embedding`` that learns by gradient."""
