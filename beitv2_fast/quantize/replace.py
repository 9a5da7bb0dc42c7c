"""replace_quantizers: the quantizers of an existing model become fused ones, and the model does not notice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from .adapters import EmbeddingAdapter, NormEMAAdapter, Replaced, Unsupported, refuse
from .methods import METHODS
from .options import QuantizerOptions
from .quantizer import FusedVectorQuantizer
from .vq_pytorch import VectorQuantizeAdapter

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Makes the replacement for a module; raises Unsupported for options that it cannot keep.
Adapter = Callable[..., nn.Module]

# By class, or by a class's full name, so that nothing needs to be imported here. To teach it a class for good, add it.
ADAPTERS: dict[type | str, Adapter] = {
    "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize": VectorQuantizeAdapter,
    "diffusers.models.autoencoders.vae.VectorQuantizer": EmbeddingAdapter,
    "norm_ema_quantizer.NormEMAVectorQuantizer": NormEMAAdapter,
    "taming.modules.vqvae.quantize.VectorQuantizer2": EmbeddingAdapter,
    **METHODS,
}


def replace_quantizers(
    model: nn.Module,
    adapters: Mapping[type, Adapter | str] | None = None,
    *,
    unsupported: str = "error",
    **options: Unpack[QuantizerOptions],
) -> nn.Module:
    """Swap the quantizers of a model, in place, for ones on the fused ops; weights and call signatures stay.

    Known by themselves are the classes of ``ADAPTERS``: of vector-quantize-pytorch, diffusers, transformers and others
    (docs/quantizer_compatibility.md). Classes that are copied from project to project are named by the caller, with the
    adapter for them, or with the name in ``ADAPTERS`` of the class that they are a copy of:

        replace_quantizers(model, {NormEMAVectorQuantizer: NormEMAAdapter})  # BEiT v2, LaBraM, ...
        replace_quantizers(model, {VectorQuantizer: "tokenizer.tokenizer_image.vq_model.VectorQuantizer"})  # LlamaGen

    A class must match exactly: a subclass may compute something else. A module that occurs at several places is
    replaced by one module. Outputs agree in eval mode, and in training with the same options, to rounding; what is
    drawn at random (k-means start, restarts of dead codes) is drawn differently, and the same on every rank.
    Swap before the optimizer and DDP are made.

    Args:
        model: changed in place, unless it is itself a quantizer.
        adapters: class -> adapter, or the name of one, beside ``ADAPTERS``. An adapter is called with the module and
            ``options``; ``with_methods`` makes one from functions.
        unsupported: what to do with a quantizer that uses an option no adapter can keep: "error", or "keep" the
            module as it is and warn.
        options: of the FusedVectorQuantizer that learns by EMA, over those of the replaced module: for example
            ``dead_after=50.0`` or ``restart_below=0.2``.

    Returns:
        The model; or its replacement if the model is a quantizer.

    Raises:
        Unsupported (a ValueError): naming the option and the module. ValueError: the model has no quantizer that is not
            fused already.
    """
    if unsupported not in ("error", "keep"):
        raise ValueError(f"unsupported must be 'error' or 'keep'; got {unsupported!r}")
    known = ADAPTERS.copy()
    for cls, adapter in (adapters or {}).items():
        if isinstance(adapter, str) and adapter not in ADAPTERS:
            raise ValueError(f"ADAPTERS has no {adapter!r}, but {', '.join(map(str, ADAPTERS))}")
        known[cls] = ADAPTERS[adapter] if isinstance(adapter, str) else adapter
    found = {path: (module, make) for path, module in model.named_modules() if (make := _adapter(module, known))}
    if not found:
        if any(isinstance(module, Replaced | FusedVectorQuantizer) for module in model.modules()):
            fused = f"the quantizers of {type(model).__name__} are replaced already, or were fused from the start"
            raise ValueError(f"{fused}: name the class of any other")
        names = ", ".join(key if isinstance(key, str) else key.__qualname__ for key in known)
        raise ValueError(f"{type(model).__name__} holds no quantizer of a known class ({names}): name its class")
    # All replacements are made before the first is put in, so that an error leaves the model as it was.
    replacements: dict[nn.Module, nn.Module] = {}
    of_codebook: dict[nn.Module, nn.Module] = {}  # the layers of a ResidualVQ may share one
    for path, (module, make) in found.items():
        try:
            _refuse_around(model, module)
            codebook = getattr(module, "_codebook", module)
            if codebook not in of_codebook:
                of_codebook[codebook] = make(module, **options).train(module.training)
            replacements[module] = of_codebook[codebook]
        except Unsupported as error:
            message = f"{path or 'the model'} ({type(module).__name__}): {error}"
            if unsupported == "error":
                raise Unsupported(f"{message}. With unsupported='keep' such quantizers stay as they are.") from None
            warnings.warn(f"replace_quantizers leaves {message}", stacklevel=2)
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return model


def _refuse_around(model: nn.Module, quantizer: nn.Module) -> None:
    """Unsupported if a module around the quantizer asks more of it than its adapter has."""
    for around in model.modules():
        if getattr(around, "implicit_neural_codebook", False) and quantizer in around.modules():
            refuse({f"implicit_neural_codebook of the {type(around).__name__} around it": True})


def _adapter(module: nn.Module, known: Mapping[type | str, Adapter]) -> Adapter | None:
    cls = type(module)
    if issubclass(cls, Replaced):  # which has the name of the original
        return None
    return known.get(cls) or known.get(f"{cls.__module__}.{cls.__qualname__}")
