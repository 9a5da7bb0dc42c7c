"""A residual codec (SoundStream, arXiv 2107.03312) on made waves: the more stages are sent, the better the sound.

python examples/audio_codec.py
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beitv2_fast import ResidualVectorQuantizer

SAMPLES, HOP, STAGES, CODES = 1024, 16, 4, 64


def waves(count: int) -> Tensor:
    """Sums of three sines with random frequencies, phases and loudness: [count, 1, SAMPLES]."""
    time = torch.arange(SAMPLES) / SAMPLES
    frequency, phase, loudness = torch.rand(3, count, 3, 1)
    sines = torch.sin(2 * math.pi * (4 + 28 * frequency) * time + 2 * math.pi * phase)
    return (loudness * sines).mean(1, keepdim=True)


class Codec(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, width, HOP, stride=HOP), nn.GELU(), nn.Conv1d(width, width, 3, padding=1)
        )
        # In training a random half of the waves has only its first 1 to 3 stages: each stage learns its worth.
        self.quantizer = ResidualVectorQuantizer(
            CODES, width, STAGES, dropout=0.5, commitment_weight=0.25, dead_after=5, channel_last=False
        )
        self.decoder = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=1), nn.GELU(), nn.ConvTranspose1d(width, 1, HOP, stride=HOP)
        )

    def forward(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        out = self.quantizer(self.encoder(sound))
        return self.decoder(out.quantized), out.loss


def main(steps: int = 200) -> list[float]:
    torch.manual_seed(0)
    model = Codec()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        sound = waves(32)
        decoded, quantizer_loss = model(sound)
        loss = F.mse_loss(decoded, sound) + 0.1 * quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    sound = waves(64)
    errors = []
    with torch.no_grad():
        codes = model.quantizer.encode(model.encoder(sound))  # [64, SAMPLES / HOP, STAGES]
        for stages in range(1, STAGES + 1):
            decoded = model.decoder(model.quantizer.decode(codes[..., :stages]))
            errors.append((F.mse_loss(decoded, sound) / sound.var()).item())
            bits = stages * math.log2(CODES) / HOP
            print(f"{stages} stages, {bits:.2f} bits per sample: unexplained variance {errors[-1]:.3f}")
    return errors


if __name__ == "__main__":
    main()
