"""BEiT v2 on fused vector-quantization kernels. The package itself needs torch only; extras bring the rest.

The ops and the outputs of modules are registered with torch by the import, so that ``torch.export.load`` finds them.
All other names load when they are asked for.
"""

import sys
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import _register_namedtuple  # as torch.export's error asks; there is no public name

from .models.student import StudentOutput
from .models.tokenizer import TokenizerOutput
from .quantize.quantizer import Quantized

if TYPE_CHECKING:
    from .data.images import read_images
    from .models.classifier import Classifier, ClassifierConfig
    from .models.features import Features, classify, features
    from .models.student import Student, StudentConfig
    from .models.tokenizer import Tokenizer, TokenizerModelConfig
    from .models.vit import ViT, ViTConfig
    from .quantize.adapters import EmbeddingAdapter, NormEMAAdapter, Unsupported, with_methods
    from .quantize.options import QuantizerOptions
    from .quantize.quantizer import FusedVectorQuantizer
    from .quantize.replace import ADAPTERS, replace_quantizers
    from .quantize.residual import GroupedResidualVectorQuantizer, ResidualVectorQuantizer
    from .quantize.vq_pytorch import VectorQuantizeAdapter
    from .show.attention import attention_probabilities
    from .weights.create import create_model, list_models, model_config
    from .weights.pretrained import from_pretrained, save_pretrained

__all__ = [
    "ADAPTERS", "Classifier", "ClassifierConfig", "EmbeddingAdapter", "Features", "FusedVectorQuantizer",
    "GroupedResidualVectorQuantizer",
    "NormEMAAdapter", "Quantized", "QuantizerOptions", "ResidualVectorQuantizer", "Student", "StudentConfig",
    "StudentOutput", "Tokenizer", "TokenizerModelConfig", "TokenizerOutput", "Unsupported", "VectorQuantizeAdapter",
    "ViT", "ViTConfig", "attention_probabilities", "classify", "create_model", "features", "from_pretrained",
    "list_models",
    "model_config", "read_images", "replace_quantizers", "save_pretrained", "with_methods",
]  # fmt: skip

__version__ = "0.2.0"

_MODULES = {
    "data.images": ("read_images",),
    "models.classifier": ("Classifier", "ClassifierConfig"),
    "models.features": ("Features", "classify", "features"),
    "models.student": ("Student", "StudentConfig"),
    "models.tokenizer": ("Tokenizer", "TokenizerModelConfig"),
    "models.vit": ("ViT", "ViTConfig"),
    "quantize.adapters": ("EmbeddingAdapter", "NormEMAAdapter", "Unsupported", "with_methods"),
    "quantize.options": ("QuantizerOptions",),
    "quantize.quantizer": ("FusedVectorQuantizer",),
    "quantize.replace": ("ADAPTERS", "replace_quantizers"),
    "quantize.residual": ("GroupedResidualVectorQuantizer", "ResidualVectorQuantizer"),
    "quantize.vq_pytorch": ("VectorQuantizeAdapter",),
    "show.attention": ("attention_probabilities",),
    "weights.create": ("create_model", "list_models", "model_config"),
    "weights.pretrained": ("from_pretrained", "save_pretrained"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
# where the names are that modules of earlier versions had
_MOVED: dict[str, tuple[str, ...]]
_MOVED = {f"convert.{name}": (f"weights.{name}",) for name in ("names", "shapes", "transformers_config", "translate")}
_MOVED |= {"convert": ("weights",), "convert.files": ("weights.files", "cli.convert")}
_MOVED |= {"convert.finetune": ("weights.start",)}


def _find(modules: tuple[str, ...], name: str) -> Any:
    for module in () if name.startswith("__") else modules:  # who looks through sys.modules gets nothing imported
        if hasattr(found := import_module(f".{module}", __name__), name):
            return getattr(found, name)
    raise AttributeError(f"there is no {name!r} in {__name__}.{modules[0]}")


if not TYPE_CHECKING:  # to which every name would exist

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = _find((_MODULE_OF[name],), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Outputs that torch.export.save can write. The names are in the files: they stay when the classes move.
_register_namedtuple(Quantized, serialized_type_name="beitv2_fast.quantized.Quantized")
_register_namedtuple(StudentOutput, serialized_type_name="beitv2_fast.student.StudentOutput")
_register_namedtuple(TokenizerOutput, serialized_type_name="beitv2_fast.tokenizer.TokenizerOutput")

for _name, _modules in _MOVED.items():
    _alias = sys.modules[f"{__name__}.{_name}"] = ModuleType(f"{__name__}.{_name}")
    _alias.__dict__["__getattr__"] = partial(_find, _modules)
convert = sys.modules[f"{__name__}.convert"]
