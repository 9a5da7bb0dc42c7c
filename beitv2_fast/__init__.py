"""BEiT v2 on fused vector-quantisation kernels. The package itself needs torch alone; extras bring the rest."""

from torch.utils._pytree import _register_namedtuple  # as torch.export's error asks; there is no public name

from .adapters import EmbeddingAdapter, NormEMAAdapter, Unsupported, VectorQuantizeAdapter
from .classifier import Classifier, ClassifierConfig
from .features import Features, classify, features, read_images
from .models import create_model, list_models, model_config
from .quantizer import FusedVectorQuantizer, Quantized
from .replace import ADAPTERS, replace_quantizers
from .residual_quantizer import ResidualVectorQuantizer
from .student import Student, StudentConfig, StudentOutput
from .tokenizer import Tokenizer, TokenizerModelConfig, TokenizerOutput
from .vit import ViT, ViTConfig

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
