"""The fused quantizer behind the signatures of other projects' quantizers (vq_pytorch.py has a library's own)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
            refuse(
                {f"{name}.{option}": getattr(table, option) for option in ("max_norm", "scale_grad_by_freq", "sparse")}
            )
            refuse({f"{name}.padding_idx": table.padding_idx is not None})


def quantize_map(
    z: Tensor, codes: Tensor, metric: str = "euclidean", commitment_weight: float = 1.0, codebook_weight: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``vector_quantize`` of z [B, C, ...]: what comes out for z, the loss, and indices [N] of all vectors."""
    last = z.movedim(1, -1)
    with torch.autocast(z.device.type, enabled=False):
        out = vector_quantize(
            last.reshape(-1, last.shape[-1]),
            codes,
            metric=metric,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
        )
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

    def _quantize(self, x: Tensor, codebook: Tensor, keep: Tensor | None, *drawn: Any) -> tuple[Tensor, Tensor, Tensor]:
        if self.by_distance and keep is None:  # with a mask, _nearest is asked
            keep = torch.ones_like(x[:, 0], dtype=torch.bool)
        return super()._quantize(x, codebook, keep, *drawn)

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


class EmbeddingAdapter(nn.Module):
    """For quantizers whose codes are the weight of an ``nn.Embedding`` ``embedding`` that learns by gradient.

    diffusers' VectorQuantizer (in VQModel) and taming-transformers' VectorQuantizer2: Euclidean, [B, C, H, W] ->
    (z_q, loss, (None, None, indices)), with their attributes beta, legacy, remap, unknown_index and sane_index_shape.
    The parameter is the same object as before: names in checkpoints and optimizers keep their meaning.
    """

    known = "embedding n_e e_dim vq_embed_dim beta legacy remap used re_embed unknown_index sane_index_shape"
    used: Tensor
    table: Tensor

    def __init__(self, module: Any, **options: Unpack[QuantizerOptions]):
        super().__init__()
        refuse_unknown(module, self.known)
        self.embedding = module.embedding
        self.beta, self.legacy, self.sane_index_shape = module.beta, module.legacy, module.sane_index_shape
        self.n_e, self.re_embed = module.n_e, module.re_embed
        self.remap = module.remap
        if self.remap is not None:
            self.register_buffer("used", module.used)
            self.unknown_index = module.unknown_index
            numbers = torch.arange(len(module.used), device=module.used.device)
            table = torch.full((self.n_e,), len(numbers), device=numbers.device)
            table.scatter_reduce_(0, module.used.long(), numbers, "amin")  # code -> its first place in used
            self.register_buffer("table", table, persistent=False)

    def extra_repr(self) -> str:
        return f"num_codes={self.n_e}, beta={self.beta}, legacy={self.legacy}"

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        refuse({"temp": temp not in (None, 1.0), "rescale_logits": rescale_logits, "return_logits": return_logits})
        # legacy: the published models were trained with beta on the other term.
        weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        quantized, loss, indices = quantize_map(z, self.embedding.weight, "euclidean", *weights)
        if self.remap is not None:
            indices = self._to_used(indices)[:, None]
        if self.sane_index_shape:
            indices = indices.reshape(z.select(1, 0).shape)
        return quantized, loss, (None, None, indices)

    def embed_code(self, indices: Tensor) -> Tensor:
        """The codes of [B, H, W] as [B, C, H, W]: what ``decode_code`` of taming's models asks for, in vain there."""
        codes: Tensor = self.embedding(indices)
        return codes.movedim(-1, 1)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """The codes of indices; ``shape`` [B, H, W, C], if given, makes them [B, C, H, W]."""
        if self.remap is not None:
            indices = indices.reshape(-1)
            indices = self.used[torch.where(indices >= len(self.used), 0, indices)]
        codes: Tensor = self.embedding(indices)
        return codes if shape is None else codes.view(shape).movedim(-1, 1).contiguous()

    def _to_used(self, indices: Tensor) -> Tensor:
        """Numbers of codes -> their places in ``used``; others become unknown_index, or any place for "random"."""
        places = self.table[indices]
        if self.unknown_index == "random":
            unknown = torch.randint_like(places, self.re_embed)
        else:
            unknown = torch.full_like(places, int(self.unknown_index))
        return torch.where(places == len(self.used), unknown, places)
