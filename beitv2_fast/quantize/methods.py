"""Quantizers that stay what they are but for the methods that search, which are replaced by ones on the fused ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import codebook_search, vector_quantize
from ..kernels.codebook_update.ops import ema_step
from ..kernels.sampling import ALONE
from .adapters import EmbeddingAdapter, embed_code, quantize_map, with_methods
from .soft import entropies, index_backpropagation


def chameleon(module: Any, z: Tensor, metric: str = "euclidean") -> tuple[Tensor, Tensor, Tensor]:
    codes = module.embedding.weight if metric == "euclidean" else F.normalize(module.embedding.weight, dim=-1)
    return quantize_map(z, codes, metric, codebook_weight=module.beta)


def glm_image(module: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return chameleon(module, z, metric="cosine")


def indices_only(module: Any, z: Tensor, axis: int = 1, metric: str = "euclidean") -> Tensor:
    rows = z.movedim(axis, -1)
    return codebook_search(rows.flatten(0, -2), module.embedding.weight, metric=metric).indices.view(rows.shape[:-1])


def apertus1p5(module: Any, z: Tensor) -> Tensor:
    return indices_only(module, z, metric="cosine")


def emu3(module: Any, z: Tensor) -> Tensor:
    return indices_only(module, z, axis=2)


def taming(module: Any, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of its first VectorQuantizer, which returns a one-hot matrix [N, K]."""
    quantized, loss, indices = quantize_map(z, module.embedding.weight, codebook_weight=module.beta)
    one_hot = z.new_zeros(len(indices), module.n_e).scatter_(1, indices[:, None], 1)
    p = one_hot.mean(0)
    return quantized, loss, (torch.exp(-(p * (p + 1e-10).log()).sum()), one_hot, indices[:, None])


def llamagen(module: Any, z: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[None, None, Tensor]]:
    codes, metric = module.embedding.weight, "euclidean"
    if module.l2_norm:
        codes, metric = F.normalize(codes, dim=-1), "cosine"
    quantized, commitment, indices = quantize_map(z, codes, metric, commitment_weight=module.beta)
    losses: tuple[Any, ...] = None, None, None, 0
    if module.training:
        y, entropy = z.movedim(1, -1).flatten(0, -2), z.new_zeros(())
        y = F.normalize(y, dim=-1) if module.l2_norm else y
        if module.entropy_loss_ratio:
            # Of minus the squared distances, which but for |y|^2 are products of vectors one longer.
            y1, codes1 = F.pad(y, (0, 1), value=1.0), torch.cat([2 * codes, -codes.square().sum(-1, keepdim=True)], -1)
            sample, mean = entropies(y1, codes1, metric="dot", temperature=0.01, eps=1e-5)
            entropy = module.entropy_loss_ratio * (sample - mean)
        usage = _share_of_late(module, indices) if module.show_usage else 0
        losses = F.mse_loss(F.embedding(indices, codes), y.detach()), commitment, entropy, usage
    return quantized, losses, (None, None, indices)


def ibq(module: Any, z: Tensor, temp: Any = None, return_logits: bool = False) -> tuple[Tensor, Any, tuple[Any, ...]]:
    """Of SEED-Voken (arXiv 2412.02692): every code gets a gradient through the softmax. As there, temp and
    return_logits are not read."""
    last, codes = z.movedim(1, -1), module.embedding.weight
    x = last.flatten(0, -2)
    quantized, indices = index_backpropagation(x, codes)
    chosen = F.embedding(indices, codes)
    loss: Any = F.mse_loss(quantized, x) + F.mse_loss(chosen.detach(), x) + module.beta * F.mse_loss(chosen, x.detach())
    if module.use_entropy_loss:
        sample, mean = entropies(x, codes, metric="dot", temperature=module.entropy_temperature, eps=1e-5)
        weights = module.sample_minimization_weight, module.batch_maximization_weight
        loss = loss, sample, mean, weights[0] * sample - weights[1] * mean
    return quantized.view(last.shape).movedim(-1, 1).contiguous(), loss, (None, None, indices)


@torch.no_grad()
def _share_of_late(module: Any, indices: Tensor) -> float:
    late = module.codebook_used
    late.copy_(torch.cat([late, indices.to(late.dtype)])[-len(late) :])
    share: float = len(late.unique()) / module.n_e
    return share


def lavit(module: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    y = F.normalize(z, dim=-1).reshape(-1, z.shape[-1])
    indices = codebook_search(y, module.embedding.weight, metric="euclidean").indices
    return module.embedding(indices), indices


def nearest(module: Any, x: Tensor) -> Tensor:
    """EnCodec's ``quantize``: x [N, D] -> [N]."""
    return codebook_search(x, module.embed, metric="euclidean").indices


def encodec(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """EnCodec's ``forward``; start and restarts are the original's, and as there the ranks share no statistics."""
    rows = x.detach().reshape(-1, x.shape[-1])
    module.init_embed_(rows)
    indices = nearest(module, rows)
    codes = F.embedding(indices, module.embed).view(x.shape)
    if module.training:
        module.expire_codes_(rows)
        state = module.embed, module.cluster_size, module.embed_avg
        ema_step(*state, rows, indices, module.decay, "euclidean", module.epsilon, ALONE)
    return codes, indices.view(x.shape[:-1])


def dac(module: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    rows, codes = latents.mT.flatten(0, 1), F.normalize(module.codebook.weight, dim=-1)
    indices = codebook_search(rows, codes, metric="cosine").indices.view(len(latents), -1)
    return module.codebook(indices).mT, indices


def sim_vq(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of vector-quantize-pytorch, also inside its ResidualSimVQ."""
    last = x.movedim(1, -1) if module.channel_first else x
    rows, weight = last.reshape(-1, last.shape[-1]), module.commitment_weight
    options = {"commitment_weight": weight * module.input_to_quantize_commit_loss_weight, "codebook_weight": weight}
    gradient = "rotation" if module.rotation_trick else "straight_through"
    with torch.autocast(x.device.type, enabled=False):
        out = vector_quantize(rows, module.codebook, metric="euclidean", gradient=gradient, **options)
    quantized = out.quantized.view(last.shape).to(x.dtype)
    quantized = quantized.movedim(-1, 1) if module.channel_first else quantized
    return quantized, out.indices.view(last.shape[:-1]), out.loss


def sim_vq_codes(module: Any, indices: Tensor) -> Tensor:
    """The codes of indices [B, ...], as ``forward`` finds them: a transform may see all codes at once."""
    codes = F.embedding(indices, module.codebook)
    return codes.movedim(-1, 1) if module.channel_first else codes


# The attributes that the methods above, and those of the classes themselves, reckon with.
CHAMELEON = "num_embeddings embedding_dim beta embedding quant_state_dims"
TAMING = "n_e e_dim beta embedding"
CODEBOOK = "codebook_size inited cluster_size embed embed_avg"
EUCLIDEAN_CODEBOOK = with_methods(
    f"{CODEBOOK} decay kmeans_iters epsilon threshold_ema_dead_code", quantize=nearest, forward=encodec
)
SEARCHED_CODEBOOK = with_methods(CODEBOOK, quantize=nearest)
DAC = with_methods("codebook_size codebook_dim in_proj out_proj codebook", decode_latents=dac)
TRANSFORMERS = {
    "apertus1p5.Apertus1p5VisionTokenizerVectorQuantizer": with_methods("embedding", forward=apertus1p5),
    "chameleon.ChameleonVQVAEVectorQuantizer": with_methods(CHAMELEON, forward=chameleon),
    "dac.DacVectorQuantize": DAC,
    "emu3.Emu3VQVAEVectorQuantizer": with_methods("embedding", forward=emu3),
    "encodec.EncodecEuclideanCodebook": SEARCHED_CODEBOOK,
    "glm_image.GlmImageVQVAEVectorQuantizer": with_methods(CHAMELEON, forward=glm_image),
    "janus.JanusVQVAEVectorQuantizer": with_methods(CHAMELEON, forward=chameleon),
    "mimi.MimiEuclideanCodebook": with_methods(
        "codebook_size initialized cluster_usage embed_sum epsilon", quantize=nearest
    ),
    "wavtokenizer.WavTokenizerEuclideanCodebook": SEARCHED_CODEBOOK,
    "xcodec.XcodecEuclideanCodebook": SEARCHED_CODEBOOK,
}
# By a class's full name.
METHODS: dict[type | str, Callable[..., nn.Module]] = {
    "audiocraft.quantization.core_vq.EuclideanCodebook": EUCLIDEAN_CODEBOOK,
    "dac.nn.quantize.VectorQuantize": DAC,
    "encodec.quantization.core_vq.EuclideanCodebook": EUCLIDEAN_CODEBOOK,
    "models.modeling_visual_tokenzier.VectorQuantizer": with_methods(  # LaVIT
        "codebook_dim num_tokens embedding", tokenize=lavit
    ),
    "src.IBQ.modules.vqvae.quantize.IndexPropagationQuantize": with_methods(
        f"{TAMING} re_embed unknown_index use_entropy_loss entropy_temperature sample_minimization_weight"
        " batch_maximization_weight",
        forward=ibq,
    ),
    "src.IBQ.modules.vqvae.quantize.VectorQuantizer2": EmbeddingAdapter,
    "taming.modules.vqvae.quantize.VectorQuantizer": with_methods(TAMING, forward=taming, embed_code=embed_code),
    "tokenizer.tokenizer_image.vq_model.VectorQuantizer": with_methods(  # LlamaGen
        f"{TAMING} l2_norm show_usage codebook_used entropy_loss_ratio", forward=llamagen
    ),
    "vector_quantize_pytorch.sim_vq.SimVQ": with_methods(
        "codebook_size code_transform frozen_codebook channel_first rotation_trick commitment_weight"
        " input_to_quantize_commit_loss_weight",
        forward=sim_vq,
        indices_to_codes=sim_vq_codes,
    ),
    **{"transformers.models.{0}.modeling_{0}.{1}".format(*name.split(".")): a for name, a in TRANSFORMERS.items()},
}
