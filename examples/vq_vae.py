"""A VQ-VAE (arXiv 1711.00937) on drawn images: an image becomes 4 x 4 codes, and codes become an image again.

python examples/vq_vae.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast import FusedVectorQuantizer


def disks(count: int, size: int = 16) -> Tensor:
    """Images [count, 3, size, size] of one colored disk each, on a background of another color."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    center, radius = torch.rand(2, count, 1, 1) - 0.5, 0.2 + 0.4 * torch.rand(count, 1, 1)
    inside = ((x - center[0]).square() + (y - center[1]).square() < radius.square())[:, None]
    disk, background = torch.rand(2, count, 3, 1, 1)
    return torch.where(inside, disk, background)


class VQVAE(nn.Module):
    def __init__(self, num_codes: int = 128, width: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
        )
        # Image maps [B, C, H, W]; the codes are moving averages of the vectors that choose them.
        self.quantizer = FusedVectorQuantizer(
            num_codes, width, metric="euclidean", commitment_weight=0.25, dead_after=5, channel_last=False
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.quantizer(self.encoder(images))
        return self.decoder(out.quantized), out.loss


def main(steps: int = 200) -> dict[str, float]:
    torch.manual_seed(0)
    model = VQVAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        images = disks(64)
        decoded, quantizer_loss = model(images)
        loss = F.mse_loss(decoded, images) + quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == steps // 2:
            model.quantizer.usage(reset=True)
    used = model.quantizer.usage()["used_codes"]

    model.eval()
    images = disks(64)
    with torch.no_grad():
        codes = model.quantizer.encode(model.encoder(images))  # [64, 4, 4]: what to store
        decoded = model.decoder(model.quantizer.decode(codes))
    error = F.mse_loss(decoded, images) / images.var()
    print(f"codes {list(codes.shape)}, {used:.0%} of them in use; unexplained variance {error:.3f}")
    return {"used": used, "error": error.item()}


if __name__ == "__main__":
    main()
