"""The quantizer of an existing model, of vector-quantize-pytorch, becomes a fused one: same outputs, less time.

pip install vector-quantize-pytorch
python examples/swap.py
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from beitv2_fast import replace_quantizers


def their_model() -> nn.Module:
    """Any model that holds one of their quantizers, wherever in it."""
    from vector_quantize_pytorch import ResidualVQ

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(48, 32), nn.Linear(32, 48)
            self.vq = ResidualVQ(dim=32, codebook_size=2048, num_quantizers=2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            quantized, indices, losses = self.vq(self.encoder(x))
            return self.decoder(quantized), indices, losses.sum()

    return Autoencoder()


def train(model: nn.Module, batches: list[Tensor]) -> tuple[list[float], float]:
    """Losses, and milliseconds of processor time per step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, start = [], time.process_time()
    for batch in batches:
        decoded, _, commitment = model(batch)
        loss = (decoded - batch).square().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, 1e3 * (time.process_time() - start) / len(batches)


def main() -> tuple[nn.Module, nn.Module, list[float], list[float]]:
    torch.manual_seed(0)
    theirs = their_model()
    ours = replace_quantizers(copy.deepcopy(theirs))  # before the optimizer and DDP are made

    batches = [torch.randn(4, 256, 48) for _ in range(5)]
    before, their_time = train(theirs, batches)
    after, our_time = train(ours, batches)
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        print(f"step {step}: loss {old:.6f} theirs, {new:.6f} ours")

    same = (theirs.eval()(batches[0])[1] == ours.eval()(batches[0])[1]).float().mean()
    print(f"equal codes {same:.2%}; CPU ms per step {their_time:.1f} theirs, {our_time:.1f} ours")
    return theirs, ours, before, after


if __name__ == "__main__":
    main()
