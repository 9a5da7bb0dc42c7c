"""The smallest modules with the interfaces, attributes and formulas of quantizers that no package brings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizers import noise


def squared_distances(x: Tensor, codes: Tensor) -> Tensor:
    return (x[:, None] - codes).square().sum(-1)


class Taming(nn.Module):
    """VectorQuantizer of taming-transformers."""

    def __init__(self, beta: float = 0.25):
        super().__init__()
        self.n_e, self.e_dim, self.beta = 32, 8, beta
        self.embedding = nn.Embedding(self.n_e, self.e_dim)

    def forward(self, z: Tensor) -> tuple[Any, ...]:
        last = z.movedim(1, -1)
        indices = squared_distances(last.reshape(-1, self.e_dim), self.embedding.weight).argmin(1)
        one_hot = F.one_hot(indices, self.n_e).to(z)
        codes = (one_hot @ self.embedding.weight).view(last.shape)
        loss = F.mse_loss(last, codes.detach()) + self.beta * F.mse_loss(codes, last.detach())
        share = one_hot.mean(0)
        perplexity = torch.exp(-(share * torch.log(share + 1e-10)).sum())
        quantized = (last + (codes - last).detach()).movedim(-1, 1)
        return quantized, loss, (perplexity, one_hot, indices.unsqueeze(1))


class LlamaGen(nn.Module):
    """VectorQuantizer of LlamaGen, whose window of used codes is short here."""

    def __init__(
        self, beta: float = 0.25, l2_norm: bool = True, show_usage: bool = True, entropy_loss_ratio: float = 0.0
    ):
        super().__init__()
        self.n_e, self.e_dim, self.beta = 32, 8, beta
        self.entropy_loss_ratio, self.l2_norm, self.show_usage = entropy_loss_ratio, l2_norm, show_usage
        self.embedding = nn.Embedding(self.n_e, self.e_dim)
        start = torch.rand(self.n_e, self.e_dim) * 2 - 1
        self.embedding.weight.data = F.normalize(start, dim=-1) if l2_norm else start / self.n_e
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(100))

    def forward(self, z: Tensor) -> tuple[Any, ...]:
        last, codes = z.movedim(1, -1), self.embedding.weight
        if self.l2_norm:
            last, codes = F.normalize(last, dim=-1), F.normalize(codes, dim=-1)
        indices = squared_distances(last.reshape(-1, self.e_dim), codes).argmin(1)
        chosen = codes[indices].view(last.shape)
        losses, usage = (None, None, None), 0
        if self.training:
            if self.show_usage:
                self.codebook_used = torch.cat([self.codebook_used[len(indices) :], indices.float()])
                usage = len(self.codebook_used.unique()) / self.n_e
            commitment = self.beta * F.mse_loss(last, chosen.detach())
            sample, mean = entropies(-squared_distances(last.reshape(-1, self.e_dim), codes) / 0.01)
            losses = F.mse_loss(chosen, last.detach()), commitment, self.entropy_loss_ratio * (sample - mean)
        quantized = (last + (chosen - last).detach()).movedim(-1, 1)
        return quantized, (*losses, usage), (None, None, indices)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(noise(32, 8, seed=3), dim=-1))

    def forward(self, indices: Tensor) -> Tensor:
        return self.weight[indices]


def entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.softmax(-1)
    mean = p.mean(0)
    return -(p * logits.log_softmax(-1)).sum(-1).mean(), -(mean * (mean + 1e-5).log()).sum()


class IBQ(nn.Module):
    """IndexPropagationQuantize of SEED-Voken."""

    def __init__(self, beta: float = 0.25, use_entropy_loss: bool = False, batch_maximization_weight: float = 1.0):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.remap, self.re_embed = 32, 8, beta, None, 32
        self.use_entropy_loss, self.cosine_similarity, self.entropy_temperature = use_entropy_loss, False, 0.1
        self.sample_minimization_weight, self.batch_maximization_weight = 0.5, batch_maximization_weight
        self.embedding = nn.Embedding(self.n_e, self.e_dim)

    def forward(self, z: Tensor, temp: Any = None, return_logits: bool = False) -> tuple[Any, ...]:
        last, codes = z.movedim(1, -1), self.embedding.weight
        x = last.reshape(-1, self.e_dim)
        logits = x @ codes.T
        soft, indices = logits.softmax(-1), logits.argmax(-1)
        hard = F.one_hot(indices, self.n_e).float()
        quantized, chosen = (hard - soft.detach() + soft) @ codes, hard @ codes
        loss = F.mse_loss(quantized, x) + F.mse_loss(chosen.detach(), x) + self.beta * F.mse_loss(chosen, x.detach())
        if self.use_entropy_loss:
            sample, mean = entropies(logits / self.entropy_temperature)
            total = self.sample_minimization_weight * sample - self.batch_maximization_weight * mean
            loss = loss, sample, mean, total
        return quantized.view(last.shape).movedim(-1, 1), loss, (None, None, indices)


class LaVIT(nn.Module):
    """VectorQuantizer of LaVIT's tokenizer, which has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.codebook_dim, self.num_tokens = 8, 32
        self.embedding = Table()

    def tokenize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = F.normalize(z, dim=-1).reshape(-1, self.codebook_dim)
        indices = squared_distances(y, self.embedding.weight).argmin(1)
        return self.embedding(indices), indices


class EuclideanCodebook(nn.Module):
    """EnCodec's and audiocraft's, with a k-means of nothing but its draw."""

    def __init__(self, decay: float = 0.8, epsilon: float = 1e-5, kmeans_init: bool = False):
        super().__init__()
        self.decay, self.epsilon, self.codebook_size = decay, epsilon, 32
        self.kmeans_iters, self.threshold_ema_dead_code = 10, 2
        start = noise(32, 8, seed=5)
        self.register_buffer("inited", torch.tensor([float(not kmeans_init)]))
        self.register_buffer("cluster_size", torch.zeros(32))
        self.register_buffer("embed", start)
        self.register_buffer("embed_avg", start.clone())

    def init_embed_(self, x: Tensor) -> None:
        if not self.inited:
            self.embed.copy_(x[:32])
            self.embed_avg.copy_(x[:32])
            self.inited.fill_(1)

    def expire_codes_(self, x: Tensor) -> None:
        self.embed[self.cluster_size < self.threshold_ema_dead_code] = x[0]

    def quantize(self, x: Tensor) -> Tensor:
        return squared_distances(x, self.embed).argmin(1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quantize(x.flatten(0, -2)).view(x.shape[:-1])

    def decode(self, indices: Tensor) -> Tensor:
        return self.embed[indices]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.detach().flatten(0, -2)
        self.init_embed_(rows)
        indices = self.quantize(rows)
        codes = self.embed[indices].view(x.shape)
        if self.training:
            self.expire_codes_(rows)
            one_hot = F.one_hot(indices, self.codebook_size).float()
            self.cluster_size.lerp_(one_hot.sum(0), 1 - self.decay)
            self.embed_avg.lerp_(one_hot.T @ rows, 1 - self.decay)
            total = self.cluster_size.sum()
            smooth = (self.cluster_size + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
            self.embed.copy_(self.embed_avg / smooth[:, None])
        return codes, indices.view(x.shape[:-1])


class Descript(nn.Module):
    """VectorQuantize of descript-audio-codec."""

    def __init__(self) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = 32, 4
        self.in_proj, self.out_proj = (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(*c, 1)) for c in ((8, 4), (4, 8))
        )
        self.codebook = nn.Embedding(32, 4)

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        rows = F.normalize(latents.transpose(1, 2).reshape(-1, self.codebook_dim), dim=-1)
        indices = squared_distances(rows, F.normalize(self.codebook.weight, dim=-1)).argmin(1).view(len(latents), -1)
        return self.codebook(indices).transpose(1, 2), indices

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        latents = self.in_proj(z)
        codes, indices = self.decode_latents(latents)
        commitment = F.mse_loss(latents, codes.detach(), reduction="none").mean((1, 2))
        codebook = F.mse_loss(codes, latents.detach(), reduction="none").mean((1, 2))
        return self.out_proj(latents + (codes - latents).detach()), commitment, codebook, indices, latents


class NormEMAVectorQuantizer(nn.Module):
    """BEiT v2's interface and formulas."""

    def __init__(self, num_tokens: int, codebook_dim: int, beta: float = 1.0, decay: float = 0.9):
        super().__init__()
        self.num_tokens, self.codebook_dim, self.beta, self.decay = num_tokens, codebook_dim, beta, decay
        self.embedding = nn.Module()
        start = F.normalize(noise(num_tokens, codebook_dim, seed=7), dim=-1)
        self.embedding.weight = nn.Parameter(start, requires_grad=False)
        self.embedding.register_buffer("cluster_size", torch.zeros(num_tokens))
        self.embedding.register_buffer("embed_avg", start.clone())
        self.embedding.register_buffer("initted", torch.ones(1))
        self.embedding.update = True
        self.register_buffer("cluster_size", torch.zeros(num_tokens))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.normalize(z.movedim(1, -1), dim=-1)
        weight = self.embedding.weight
        indices = (weight.square().sum(1) - 2 * y.flatten(0, -2) @ weight.T).argmin(1)
        one_hot = F.one_hot(indices, self.num_tokens).float()
        codes = (one_hot @ weight).view(y.shape)
        bins = one_hot.sum(0)
        if self.embedding.update or not self.training:
            self.cluster_size.lerp_(bins, 1 - self.decay)
        if self.embedding.update and self.training:
            sums = one_hot.T @ y.detach().flatten(0, -2)
            mean = torch.where(bins[:, None] > 0, F.normalize(sums, dim=-1), weight)
            weight.data = F.normalize(self.decay * weight + (1 - self.decay) * mean, dim=-1)
        loss = self.beta * F.mse_loss(codes.detach(), y)
        return (y + (codes - y).detach()).movedim(-1, 1), loss, indices


class VectorQuantizer2(nn.Module):
    """taming-transformers' interface and formulas."""

    def __init__(self, n_e: int, e_dim: int, beta: float, legacy: bool = True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.remap, self.re_embed, self.sane_index_shape = None, n_e, False

    def forward(self, z: Tensor, temp=None, rescale_logits=False, return_logits=False):
        last = z.movedim(1, -1)
        indices = torch.cdist(last.reshape(-1, self.e_dim), self.embedding.weight).argmin(1)
        codes = self.embedding(indices).view(last.shape)
        commitment, codebook = F.mse_loss(codes.detach(), last), F.mse_loss(codes, last.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        return (last + (codes - last).detach()).movedim(-1, 1), loss, (None, None, indices)
