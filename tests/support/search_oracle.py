"""What the exact answer of codebook_search is, and problems on which it is hard to find."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_score(x: list[float], code: list[float], metric: str) -> Fraction:
    """The score of one code in rational numbers."""
    pairs = [(Fraction(a), Fraction(v)) for a, v in zip(x, code, strict=True)]
    if metric == "cosine":
        return sum((a * v for a, v in pairs), Fraction(0))
    return -sum(((a - v) ** 2 for a, v in pairs), Fraction(0))


def exact_indices(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The nearest codes of finite vectors."""
    return exact_nearest(x, codebook, metric, 1)[:, 0]


def exact_nearest(x: Tensor, codebook: Tensor, metric: str, k: int) -> Tensor:
    """The k nearest codes, nearest first: float64 where it settles the answer, rational numbers where it does not."""
    rows, codes = x.double(), codebook.double()
    scores = rows @ codes.T
    slack = 1e-12 * rows.norm(dim=-1) * codes.norm(dim=-1).max() + 1e-300
    if metric == "euclidean":
        scores -= codes.square().sum(-1) / 2
        slack += 1e-12 * codes.square().sum(-1).max()
    best, answer = scores.topk(min(k + 1, len(codes)))
    apart = best[:, :-1] - best[:, 1:] > slack[:, None]
    for i in (~apart.all(-1)).nonzero()[:, 0].tolist():
        candidates = (scores[i] >= best[i, k - 1] - slack[i]).nonzero()[:, 0].tolist()
        row = rows[i].tolist()
        known: dict[tuple[float, ...], Fraction] = {}  # of duplicates the same
        for code in {tuple(codes[j].tolist()) for j in candidates}:
            known[code] = exact_score(row, list(code), metric)
        order = sorted(candidates, key=lambda j: (-known[tuple(codes[j].tolist())], j))
        answer[i, :k] = torch.tensor(order[:k])
    return answer[:, :k]


def random(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(150, 32, generator=generator), _unit(torch.randn(700, 32, generator=generator))


def clustered(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Vectors and codes around eight directions, a thousandth apart."""
    centers = torch.randn(8, 24, generator=generator)
    spread = lambda n: centers.repeat(n // 8, 1) + 1e-3 * torch.randn(n, 24, generator=generator)  # noqa: E731
    return spread(96), _unit(spread(800))


def duplicated(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every code twenty times, in a shuffled order: the lowest index wins."""
    codes = _unit(torch.randn(30, 16, generator=generator)).repeat(20, 1)
    return torch.randn(100, 16, generator=generator), codes[torch.randperm(600, generator=generator)]


def last_bits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes that differ in the last bits of a few elements: no fp32 sum tells them apart."""
    code = _unit(torch.randn(1, 40, generator=generator)).repeat(300, 1)
    steps = torch.randint(-2, 3, code.shape, generator=generator) * (torch.rand(code.shape, generator=generator) < 0.1)
    code = (code.view(torch.int32) + steps.int()).view(torch.float32)
    return torch.randn(40, 40, generator=generator) + 3 * code[:1], code


def beyond_double(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores that differ by 2^-64 of their size: float64 cannot order them."""
    x = torch.tensor([[1.0, 2.0**-40]]).repeat(20, 1) * (1 + torch.rand(20, 1, generator=generator))
    last = 1 + 2.0**-23 * torch.randperm(64, generator=generator).float()
    return x, torch.stack([torch.ones(64), last], dim=-1)


def one_code(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(33, 5, generator=generator), torch.randn(1, 5, generator=generator)


def unequal_lengths(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes from 1e-6 to 1e6 long: one error bound for all of them must still hold."""
    length = 10 ** (12 * torch.rand(400, 1, generator=generator) - 6)
    return 100 * torch.randn(64, 12, generator=generator), torch.randn(400, 12, generator=generator) * length


def far_and_near(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Vectors from 1e-3 to 1e3 long, some zero, in between 150 of like length: each has its own scale or shares one."""
    length = torch.where(torch.arange(260) % 5 < 3, 1.0, 10 ** (6 * torch.rand(260, generator=generator) - 3))
    length = torch.where(torch.arange(260) % 50 == 7, 0.0, length)
    return torch.randn(260, 32, generator=generator) * length[:, None], torch.randn(700, 32, generator=generator)


def integers(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Small integers: thousands of exact ties."""
    draw = lambda *shape: torch.randint(-2, 3, shape, generator=generator).float()  # noqa: E731
    return draw(100, 6), draw(600, 6)


def scaled(x_scale: float, code_scale: float):
    def problem(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, codes = torch.randn(50, 20, generator=generator), torch.randn(100, 20, generator=generator)
        return x * x_scale, codes * code_scale

    return problem


def in_turn() -> tuple[Tensor, Tensor]:
    """Rows [40, 6] of four codebooks [4, 140, 6]: a cone, one with codes that are not finite, a collapsed one that
    rows of zeros and NaN meet too, and one far shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(40, 6, generator=generator), torch.randn(4, 140, 6, generator=generator)
    codebook[0] = 30 + codebook[0]
    codebook[1, 5, 0], codebook[1, 139] = torch.nan, torch.inf
    codebook[2] = codebook[2, :1] + 1e-7 * codebook[2]
    codebook[3] *= 1e-6
    x[::4] += 30
    x[6], x[13], x[18, 3], x[23, 1] = 0, 0, torch.nan, torch.inf
    return x, codebook


PROBLEMS = {
    "random": random,
    "clustered": clustered,
    "duplicated": duplicated,
    "last bits": last_bits,
    "beyond double": beyond_double,
    "one code": one_code,
    "unequal lengths": unequal_lengths,
    "far and near": far_and_near,
    "integers": integers,
    "huge": scaled(1e37, 1e37),
    "tiny": scaled(1e-37, 1e-37),
    "subnormal": scaled(1e-42, 1e-42),
    "huge vectors, tiny codes": scaled(1e37, 1e-37),
    "tiny vectors, huge codes": scaled(1e-42, 1e37),
    "subnormal vectors, unit codes": scaled(1e-44, 1.0),
}


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
