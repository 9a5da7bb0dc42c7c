"""BEiT v2 on fused vector-quantisation kernels. The package itself needs torch alone; extras bring the rest."""

from torch.utils._pytree import _register_namedtuple  # as torch.export's error asks; there is no public name

from .data.images import read_images
from .models.classifier import Classifier, ClassifierConfig
from .models.features import Features, classify, features
from .models.student import Student, StudentConfig, StudentOutput
from .models.tokenizer import Tokenizer, TokenizerModelConfig, TokenizerOutput
from .models.vit import ViT, ViTConfig
from .quantize.adapters import EmbeddingAdapter, NormEMAAdapter, Unsupported, VectorQuantizeAdapter
from .quantize.quantizer import FusedVectorQuantizer, Quantized
from .quantize.replace import ADAPTERS, replace_quantizers
from .quantize.residual import ResidualVectorQuantizer
from .weights.create import create_model, list_models, model_config

__all__ = [
    "ADAPTERS",
    "Classifier",
    "ClassifierConfig",
    "EmbeddingAdapter",
    "Features",
    "FusedVectorQuantizer",
    "NormEMAAdapter",
    "Quantized",
    "ResidualVectorQuantizer",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "Tokenizer",
    "TokenizerModelConfig",
    "TokenizerOutput",
    "Unsupported",
    "VectorQuantizeAdapter",
    "ViT",
    "ViTConfig",
    "classify",
    "create_model",
    "features",
    "list_models",
    "model_config",
    "read_images",
    "replace_quantizers",
]

__version__ = "0.1.0"

for _output in (Quantized, StudentOutput, TokenizerOutput):  # so that an exported module that returns one can be saved
    _register_namedtuple(_output, serialized_type_name=f"{_output.__module__}.{_output.__qualname__}")
