"""The loader of images that lie decoded on the device: a thread draws, the device cuts, flips, jitters, normalizes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .draws import EpochSampler, Key
from .images import ImageFolder

ALIGNED = 16  # bytes: where an array may begin for every dtype


class StoredLoader:
    """Batches of ``dataset[key]`` for the keys of each batch, made of ``dataset.stored`` on its device.

    While a step works on one batch, a thread draws for the next. Its numbers, about 150 bytes per image, go to the
    device in one copy, which nobody waits for.
    """

    def __init__(self, dataset: ImageFolder, batches: EpochSampler | list[list[Key]]) -> None:
        self.dataset, self.batches = dataset, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        drawn = map(self._drawn, self.batches)
        with ThreadPoolExecutor(1, thread_name_prefix="drawing") as thread:
            coming = thread.submit(next, drawn, None)
            while (found := coming.result()) is not None:
                coming = thread.submit(next, drawn, None)
                yield self._made(*found)

    def _drawn(self, keys: list[Key]) -> tuple[dict[str, Tensor], Packed]:
        """What says which images these are, for the host, and what the device needs."""
        dataset = self.dataset
        names, stored = dataset.names(keys), dataset.stored
        assert stored is not None
        sizes = stored.sizes[names["index"].numpy()]
        labels = {name: values for name, values in names.items() if name != "view"}
        draws = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in dataset.draws(keys, sizes).items()}
        sent = {**draws, **labels, "size": torch.from_numpy(sizes)}
        return names, Packed(sent, dataset.device)

    def _made(self, names: dict[str, Tensor], packed: Packed) -> dict[str, Tensor]:
        draws, view = packed.sent(), self.dataset.view
        label = {name: draws[name] for name in names if name == "label"}
        assert self.dataset.stored is not None
        return {**view.finish(self.dataset.stored.cut(view, draws), draws), **names, **label}


class Packed:
    """Tensors of the CPU that go to a device in one copy: one after another in memory that it reads by itself."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.device, self.tensors = device, tensors
        self.first, end = {}, 0
        for name, tensor in tensors.items():
            self.first[name] = end
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for name, tensor in tensors.items():
            self._part(self.buffer, name).copy_(tensor)

    def sent(self) -> dict[str, Tensor]:
        """The tensors, on the device as soon as its stream gets there."""
        there = self.buffer.to(self.device, non_blocking=True)
        return {name: self._part(there, name) for name in self.tensors}

    def _part(self, buffer: Tensor, name: str) -> Tensor:
        tensor, first = self.tensors[name], self.first[name]
        return buffer[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
