"""SimVQ (arXiv 2411.02038): a codebook of 65,536 codes that learns as a whole, searched without a distance matrix.

The codes stay as they were drawn; what learns is one linear map of all of them, so none is left behind.

    python examples/large_codebook.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast import FusedVectorQuantizer

NUM_CODES, DIM, PATCH = 65_536, 16, 4


def textures(count: int, size: int = 32) -> Tensor:
    """Smooth random images [count, 3, size, size] in 0..1."""
    coarse = torch.rand(count, 3, size // 8, size // 8)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)


class PatchTokenizer(nn.Module):
    """A code for every patch of PATCH x PATCH pixels."""

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * PATCH * PATCH
        self.encoder = nn.Sequential(nn.Linear(pixels, 64), nn.GELU(), nn.Linear(64, DIM))
        self.quantizer = FusedVectorQuantizer(
            NUM_CODES, DIM, metric="euclidean", transform=nn.Linear(DIM, DIM, bias=False)
        )
        self.decoder = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, pixels))

    def tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> codes [B, patches]."""
        return self.quantizer.encode(self.encoder(patches(images)))


def patches(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, patches, pixels]"""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def main(steps: int = 60) -> dict[str, float]:
    torch.manual_seed(0)
    model = PatchTokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # the linear map of the codes is among the parameters
    errors = []
    for _ in range(steps):
        target = patches(textures(32))  # 2,048 patches: a matrix of distances would take 512 MB
        out = model.quantizer(model.encoder(target))
        error = F.mse_loss(model.decoder(out.quantized), target)
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        errors.append(error.item())

    model.eval()
    images = textures(32)
    tokens = model.tokens(images)
    distinct = tokens.unique().numel() / tokens.numel()
    print(f"tokens {list(tokens.shape)}, {distinct:.0%} distinct; error {errors[0]:.3f} -> {errors[-1]:.3f}")
    return {"distinct": distinct, "first": errors[0], "last": errors[-1]}


if __name__ == "__main__":
    main()
