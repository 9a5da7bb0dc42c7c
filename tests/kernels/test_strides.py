"""Every op with inputs of every layout in memory: the values of contiguous inputs, and what its fake version says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import beitv2_fast.quantize.soft  # noqa: F401 (registers the last of the ops)

OPS = torch.ops.beitv2_fast


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def every_second(t: Tensor) -> Tensor:
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def reversed_dimensions(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def behind_another(t: Tensor) -> Tensor:
    """A storage offset of one element, so that no address is aligned to more."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


LAYOUTS = {f.__name__: f for f in (every_second, reversed_dimensions, behind_another, expanded)}


def arguments() -> dict[str, tuple[Any, ...]]:
    """Of every op: arguments that give each an output of several rows and columns."""
    x, codes, indices = noise(7, 6), noise(5, 6), torch.tensor([0, 2, 4, 1, 2, 0, 3])
    turns, books = noise(6, 4), noise(2, 5, 4)  # of two codebooks in turn
    mask = torch.tensor([[True, False, True], [False, True, True]])
    positions, labels = torch.tensor([0, 2, 4, 5]), torch.tensor([1, 0, 4, 2])
    tokens, head = [noise(2, 3, 4), 2 * noise(2, 3, 4)], (noise(4), noise(4), noise(5, 4), noise(5))
    qkv, bias, grad, sums = noise(2, 3, 3, 2, 4), noise(2, 3, 3), noise(2, 3, 2, 4), noise(2, 2, 2, 3).abs()
    state = {"codebook": noise(2, 5, 3), "cluster_size": noise(2, 5).abs(), "embed_avg": noise(2, 5, 3)}
    book, one = tuple(state.values()), [t[0] for t in state.values()]
    statistics = torch.arange(20).view(5, 4) << 30, torch.arange(35).view(5, 7) << 20
    idle, recent, turns_of_two = torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.int64), noise(14, 3)
    started, steps = torch.tensor(False), torch.tensor(7)
    clock = torch.zeros(5, dtype=torch.int64)
    bins = torch.tensor([[3, 1, 0, 2, 1], [0, 0, 7, 0, 0]])
    stream, rows, keep = noise(2, 2, 3, 4), noise(3, 4), torch.tensor([1.0, 0.0])
    return {
        "attention": (qkv, bias, 0.5),
        "attention_backward": (grad, qkv, bias, None, sums, 0.5, True),
        "block_masks": (torch.tensor([5, 6, 7]), 6, 5, 12, 4, 0.3, 12),
        "copy_codebook": (codes, noise(5, 6)),
        "codebook_search cosine": (x, codes, "cosine", True, True, True),
        "codebook_search euclidean": (x, codes, "euclidean", True, True, True),
        "codebook_search indices": (x, codes, "cosine", False, False, False),
        "codebook_search in turn": (turns, books, "cosine", True, True, True),
        "nearest_codes": (x, codes, "cosine", 3),
        "nearest_codes in turn": (turns, books, "euclidean", 3),
        "draw_codes": (x, codes, "euclidean", 0.5, torch.tensor(3), torch.arange(7)),
        "draw_codes in turn": (turns, books, "cosine", 0.5, torch.tensor([3, 4] * 3), torch.arange(6) // 2),
        "codebook_statistics cosine": (x, indices, 5, "cosine"),
        "codebook_statistics in turn": (turns, indices[:6], 5, "cosine", 2),
        "codebook_statistics euclidean": (x, indices, 5, "euclidean"),
        "apply_codebook_statistics cosine": (statistics[0], *one[:2], None, 0.9, "cosine", 0.0),
        "apply_codebook_statistics euclidean": (statistics[1], *one, 0.9, "euclidean", 1e-5),
        "apply_codebook_statistics in turn": (statistics[0].repeat(2, 1), *book, 0.9, "cosine", 1e-5),
        "count_uses": (bins, idle, recent, steps),
        "masked_positions": (mask, None),
        "masked_gather": (tokens[0], positions),
        "masked_scatter": (noise(4, 3), positions, 2, 3),
        "masked_cross_entropy": (tokens, positions, labels, *head, 1e-6, torch.float32, True, True, True),
        "with_gradient_backward": (noise(2), noise(2, 4, 4), 3, torch.bfloat16),
        "with_gradient_backward scattered": (noise(1), noise(1, 4, 3), 3, torch.bfloat16, positions, 2, 3),
        "residual_norm": (*stream, *rows[:1], keep, 0.8, *rows[1:], 1e-5, torch.float32, torch.float32),
        "residual_norm_backward": (
            *noise(2, 2, 3, 4), stream[0], noise(6), noise(6).abs(), stream[1], rows[0], keep, 0.8, rows[1],
            torch.float32, torch.float32,
        ),
        "gelu_and_gradient": (noise(5, 6), noise(5, 6)),
        "vector_quantize cosine": (x, codes, "cosine", 0.25, 0.5, True),
        "vector_quantize euclidean": (x, codes, "euclidean", 0.25, 0.5, True),
        "vector_quantize in turn": (turns, books, "cosine", 0.25, 0.5, True),
        "vector_quantize rotation": (x, codes, "euclidean", 0.25, 0.5, True, "rotation"),
        "vector_quantize_backward": (x, codes[indices], noise(7, 6), torch.tensor(0.5), 0.25, "cosine"),
        "vector_quantize_backward rotation": (x, codes[indices], noise(7, 6), None, 0.25, "euclidean", "rotation"),
        "codebook_gradient": (x, indices, codes, torch.tensor(0.5), 0.5, "cosine"),
        "codebook_gradient in turn": (turns, indices[:6], books, torch.tensor(0.5), 0.5, "euclidean"),
        "soft_assignment": (x, codes, 0.0),
        "soft_assignment_backward": (x, codes, 0.0, noise(7), noise(7), noise(5), None, True),
        "soft_cross_entropy": (x, codes, indices, 0.0, True, True),
        "soft_diversity": (noise(2, 6, 4), books, 3, 0.0, True, True),
        "soft_losses_backward": (noise(1)[0], x, x),
        "start_codebook": (*book, idle, recent, started, steps, clock, turns_of_two, "euclidean", 2, 0, 0.0, 100),
        "replace_dead_codes": (
            *book, idle, recent, bins + 1, steps - 7, steps, clock, turns_of_two, bins, "euclidean", 0, 1.0, 0.0,
        ),
    }  # fmt: skip


def test_every_op_is_in_the_table():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("beitv2_fast::")}
    assert names == {case.split()[0] for case in arguments()}


def laid_out(value: Any, layout: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, lambda t: layout(t) if t.dim() else t, value)


def tensors(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def given(case: str, layout: str) -> list[Any]:
    """The arguments of a case in this layout. What is written to has no overlapping memory, nor have positions."""
    op, values = case.split()[0], list(arguments()[case])
    apart = {i for i, a in enumerate(getattr(OPS, op).default._schema.arguments) if a.is_write or a.name == "positions"}
    return [v if layout == "expanded" and i in apart else laid_out(v, LAYOUTS[layout]) for i, v in enumerate(values)]


def check(op: Any, values: Callable[[], list[Any]]) -> None:
    given, plain = values(), [laid_out(v, lambda t: t.clone(memory_format=torch.contiguous_format)) for v in values()]
    actual, expected = op(*given), op(*plain)
    torch.testing.assert_close(tensors(actual, given), tensors(expected, plain), rtol=1e-6, atol=1e-6)
    torch.library.opcheck(op, tuple(values()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", arguments())
def test_an_op_takes_inputs_of_any_layout(case, layout):
    check(getattr(OPS, case.split()[0]).default, lambda: given(case, layout))


OF_FP32 = ("apply_codebook_statistics", "start_codebook", "replace_dead_codes")  # whose state has no other type


@pytest.mark.parametrize("case", [case for case in arguments() if not case.startswith(OF_FP32)])
def test_an_op_takes_fp64_of_any_layout(case):
    def values() -> list[Any]:
        double = [laid_out(v, lambda t: t.double() if t.is_floating_point() else t) for v in arguments()[case]]
        return [torch.float64 if v is torch.float32 else laid_out(v, reversed_dimensions) for v in double]

    check(getattr(OPS, case.split()[0]).default, values)
