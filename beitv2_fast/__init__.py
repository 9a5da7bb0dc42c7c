"""BEiT v2 on fused vector-quantisation kernels. The package itself needs torch alone; extras bring the rest."""

from .classifier import Classifier, ClassifierConfig
from .quantizer import FusedVectorQuantizer, Quantized
from .student import Student, StudentConfig, StudentOutput
from .tokenizer import Tokenizer, TokenizerModelConfig, TokenizerOutput
from .vit import ViT, ViTConfig

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "FusedVectorQuantizer",
    "Quantized",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "Tokenizer",
    "TokenizerModelConfig",
    "TokenizerOutput",
    "ViT",
    "ViTConfig",
]

__version__ = "0.1.0"
