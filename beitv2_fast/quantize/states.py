"""How a quantizer's tensors start, freeze, move and load, whatever library does it, and what they tell of its use.

Loaded are also states of quantizers that are not quite this one: published ones, and those of other options.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.snapshot import Snapshots

if TYPE_CHECKING:
    from typing_extensions import Self

    from .quantizer import FusedVectorQuantizer

# names of the reference implementation's quantizer -> ours
REFERENCE_NAMES = {"embedding.weight": "codebook", "embedding.initted": "initialized", "cluster_size": "cluster_size"}
# statistics that the reference stores and never reads again
REFERENCE_UNUSED = ("embedding.cluster_size", "embedding.embed_avg")
NOT_UNIT = 2.0**-9  # a length further from 1 is no rounding, of bf16 either


class QuantizerState(nn.Module):
    """What ``FusedVectorQuantizer`` has beside the buffers that it registers."""

    codebook: Tensor
    cluster_size: Tensor
    initialized: Tensor
    idle: Tensor
    steps: Tensor
    embed_avg: Tensor | None
    recent: Tensor | None
    window_counts: Tensor
    window_replaced: Tensor
    clock: Tensor
    transform: nn.Module | None
    metric: str
    dead_below: float
    kmeans_init: bool
    seed: int
    frozen = False  # by freeze(); an attribute like ``training`` and ``requires_grad``, so no part of a state dict

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The state of a new quantizer, where its tensors are: after ``to_empty``, as with torch's own modules."""
        shape, generator = self.codebook.shape, torch.Generator().manual_seed(self.seed)
        start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        if self.transform is not None:
            self.codebook.copy_(start * shape[-1] ** -0.5)
        else:
            self.codebook.copy_(F.normalize(start, dim=-1) if self.metric == "cosine" else start)
        if self.embed_avg is not None:
            self.embed_avg.copy_(self.codebook)
        self.cluster_size.fill_(self.embed_avg is not None or self.dead_below > 0)
        self.initialized.fill_(not self.kmeans_init)
        for counter in (self.idle, self.steps, self.recent):
            if counter is not None:
                counter.zero_()
        self._reset_unsaved()

    def freeze(self, frozen: bool = True) -> None:
        """Keep the codebook as it is in training mode, too, until ``thaw``.

        As with ``learning="frozen"`` the gradient and the commitment loss still reach the vectors, and a codebook that
        was not started yet still starts by k-means. Apart from ``usage()`` nothing else changes in training mode. A
        codebook that learns by gradient, or a transform, gets none, and the loss has no term for it; its
        ``requires_grad`` is off.
        A state dict does not say whether it is frozen; copies and pickles do.
        """
        self.frozen = frozen
        transform = [] if self.transform is None else self.transform.parameters()
        for learnt in (*transform, *[self.codebook] * isinstance(self.codebook, nn.Parameter)):
            learnt.requires_grad_(not frozen)
            learnt.grad = None  # an optimizer would move it by an old gradient

    def thaw(self) -> None:
        """Let the codebook learn again by its rule, from the state in which ``freeze`` found it."""
        self.freeze(False)

    @torch.no_grad()
    def usage(self, reset: bool = False) -> dict[str, float]:
        """Since the last reset: share of codes chosen, perplexity of their frequencies, how many dead codes restarted.

        Share and perplexity are means over the codebooks.
        """
        values = self.usage_tensors(reset)
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    @torch.no_grad()
    def usage_tensors(self, reset: bool = False) -> dict[str, Tensor]:
        """``usage`` as fp64 scalars on the device, for which the host need not wait."""
        if self._made_on_meta:
            self._leave_meta()
        result = {
            "used_codes": (self.window_counts > 0).double().mean(),
            "perplexity": perplexity(self.window_counts).mean(),
            "replaced_codes": self.window_replaced.double(),
        }
        if reset:
            self.window_counts.zero_()
            self.window_replaced.zero_()
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves between devices, but not to another dtype: averages of small steps need fp32.

        A codebook that learns by gradient is a parameter like any other and takes the dtype.
        """

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype or isinstance(t, nn.Parameter) else t.to(moved.device)

        moved: Self = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # of torch
        return moved

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Also accepts the reference implementation's names, and states of quantizers with other options."""
        fit_state(cast("FusedVectorQuantizer", self), state, prefix, errors=args[-1])
        super()._load_from_state_dict(state, prefix, *args)
        self._reset_unsaved()

    def _reset_unsaved(self) -> None:
        """A new start for what no checkpoint holds, on the device of what it does hold."""
        for name in ("window_counts", "window_replaced"):
            if getattr(self, name).device == self.idle.device:
                getattr(self, name).zero_()
            else:
                setattr(self, name, torch.zeros_like(getattr(self, name), device=self.idle.device))
        self.clock.zero_()
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self.snapshots = Snapshots()
        self._made_on_meta = self.idle.is_meta

    def _leave_meta(self) -> None:
        """No counts yet in the memory that took the place of meta's, which transformers' loader leaves as it is."""
        if not self.idle.is_meta:
            self._reset_unsaved()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of frequencies counts / sum: [..., K] -> [...] float64."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))


def fit_state(quantizer: FusedVectorQuantizer, state: dict[str, Tensor], prefix: str, errors: list[str]) -> None:
    """Make the entries under ``prefix`` those of the quantizer, in place: its names, options and dtypes."""
    if prefix + "embedding.weight" in state:
        _rename(state, prefix)
    if prefix + "codebook" in state:
        _fit_options(quantizer, state, prefix, errors)
    for name, buffer in quantizer.named_buffers(recurse=False):
        if isinstance(state.get(prefix + name), Tensor):  # assign=True would take any dtype
            state[prefix + name] = state[prefix + name].to(buffer.dtype)


def _rename(state: dict[str, Tensor], prefix: str) -> None:
    """The reference's names become those of FusedVectorQuantizer."""
    for name in REFERENCE_UNUSED:
        state.pop(prefix + name, None)
    for name, ours in REFERENCE_NAMES.items():
        if prefix + name in state:
            value = state.pop(prefix + name)
            state[prefix + ours] = value.to(torch.bool).reshape(()) if ours == "initialized" else value


def _fit_options(quantizer: FusedVectorQuantizer, state: dict[str, Tensor], prefix: str, errors: list[str]) -> None:
    """What other options did not keep starts as it would start beside this codebook; what they kept besides is left
    out. One warning says what is new."""
    own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    news: list[str] = []
    if not _fit_heads(quantizer, own, news):
        errors.append(
            f"{prefix}codebook is {list(own['codebook'].shape)} in the state dict, for a quantizer of num_codes="
            f"{quantizer.num_codes}, dim={quantizer.dim}, heads={quantizer.heads}, share_codebook="
            f"{quantizer.share_codebook}. Build it with the options that the codebook was trained with."
        )
        return
    codebook = own["codebook"]
    counts = codebook.new_zeros(codebook.shape[:-1], dtype=torch.int64)
    own.setdefault("initialized", torch.ones_like(counts.view(-1)[0], dtype=torch.bool))
    unit = quantizer.metric == "cosine" and quantizer.learning != "gradient" and not quantizer.any_length
    unit = unit and not codebook.is_meta and bool(own["initialized"].any())
    if unit and (codebook.float().norm(dim=-1) - 1).abs().max() > NOT_UNIT:
        codebook = own["codebook"] = F.normalize(codebook.float(), dim=-1)
        news.append("the codes, which have other lengths (as with learning='gradient'), are normalized")
    own.setdefault("cluster_size", counts.float())
    own.setdefault("idle", counts)
    own.setdefault("steps", torch.zeros_like(counts.view(-1)[0]))
    if quantizer.embed_avg is not None and "embed_avg" not in own:
        own["cluster_size"] = own["cluster_size"].clamp(min=1)
        own["embed_avg"] = codebook.float() * own["cluster_size"][..., None]
        news.append("the moving averages of learning='sum_ema' start at this codebook")
    if quantizer.recent is not None and "recent" not in own:
        own["recent"] = counts.clone()  # loaded with assign=True, it is a buffer of its own
        news.append("the counts of restart_below start at 0")
    for name in ("embed_avg", "recent"):
        if getattr(quantizer, name) is None and own.pop(name, None) is not None:
            del state[prefix + name]
            news.append(f"{name} is left out, which these options do not use")
    state.update({prefix + name: value for name, value in own.items()})
    if news:
        where = f"{prefix}{type(quantizer).__name__}"
        warnings.warn(f"{where}: the state dict is of a quantizer with other options: {'; '.join(news)}.", stacklevel=2)


def _fit_heads(quantizer: FusedVectorQuantizer, own: dict[str, Tensor], news: list[str]) -> bool:
    """Whether the codebook has this quantizer's shape; one codebook for all heads becomes one for each."""
    groups, shape = quantizer.groups, (quantizer.num_codes, quantizer.codebook.shape[-1])
    if groups == 1 or own["codebook"].shape != shape:
        return own["codebook"].shape == (shape if groups == 1 else (groups, *shape))
    for name in ("codebook", "cluster_size", "embed_avg", "idle", "recent"):
        if name in own:  # each head has its share of what was summed over all of them
            value = own[name] / groups if name in ("cluster_size", "embed_avg") else own[name]
            own[name] = value.expand(groups, *value.shape).contiguous()
    news.append(f"the one codebook becomes that of each of the {groups} heads")
    return True
