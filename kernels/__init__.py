"""The ops of beitv2_fast, one folder each: public function, reference definition, fast versions side by side.

Imported as ``beitv2_fast.kernels``. They need torch only, and Triton on GPUs.
"""

if __name__ == "kernels":
    # transformers imports another project of this name, and from the repository's root it finds this folder. A second
    # copy of the ops would pull the first one's from under it, since torch lets the last registration win.
    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"{name}: this folder is imported as beitv2_fast.kernels; `kernels` of PyPI is another project"
        )
else:
    from .attention import attention
    from .block_masks import block_masks
    from .codebook_search import CodebookSearch, codebook_search, draw_codes
    from .codebook_update import codebook_update
    from .gelu import gelu_and_gradient
    from .masked_cross_entropy import masked_cross_entropy, masked_gather
    from .residual_norm import residual_norm
    from .vector_quantize import VectorQuantize, vector_quantize

__all__ = [
    "CodebookSearch",
    "VectorQuantize",
    "attention",
    "block_masks",
    "codebook_search",
    "codebook_update",
    "draw_codes",
    "gelu_and_gradient",
    "masked_cross_entropy",
    "masked_gather",
    "residual_norm",
    "vector_quantize",
]
