"""codebook_search on NVIDIA and AMD GPUs: launches of triton_screen, triton_resolve, triton_scan and triton_nearest."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..gpu import cdiv, device_of, next_power_of_2, target_name
from .triton_nearest import nearest
from .triton_resolve import resolve
from .triton_scan import draw, scan
from .triton_screen import pack_codebook, screen

BLOCK_K = 128  # codes that one step of the screening scores
MAX_SPLIT = 8
PACK_WARPS = 8
SAMPLE = 64  # codes that tell where the codebook lies
BLOCK_SCAN = 64  # codes of a step where rows are scored against all of them
SCAN_PART = 1024  # codes of a task there, or more
SCAN_WARPS, SCAN_PROGRAMS = 8, 2  # of a program; on a multiprocessor


@dataclass(frozen=True)
class Config:
    """One shape of the screening kernel that autotuning may pick; tests compile every one for its targets."""

    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ScreenPlan:
    """How a family of GPUs screens. LANES follows the tensor core's accumulator: a group's scores lie in one thread."""

    lanes: int
    configs: tuple[Config, ...]
    wide: tuple[Config, ...] = ()  # in place of ``configs`` where D > 32, if given
    resolve_rows: int = 4  # BLOCK_R of ``resolve``
    scan_rows: int = 32  # BLOCK_R of ``scan``, not less
    # Without a limit of its own, ptxas spills registers of pack, resolve, nearest and draw to reach the next occupancy.
    resolve_options: dict[str, int] = field(default_factory=lambda: {"maxnreg": 255})

    def configs_for(self, d: int) -> tuple[Config, ...]:
        return self.wide if self.wide and d > 32 else self.configs


PLANS = {
    "sm_80": ScreenPlan(
        16,
        (Config(128, 4, 3), Config(64, 4, 3)),
        wide=(Config(128, 8, 3), Config(64, 8, 3), Config(64, 8, 2)),  # the last for cards with less shared memory
    ),
    "sm_90": ScreenPlan(8, (Config(128, 8, 3), Config(64, 4, 3)), wide=(Config(128, 8, 3), Config(64, 8, 3))),
    "sm_100": ScreenPlan(8, (Config(128, 4, 3),), wide=(Config(128, 8, 3),)),
    "gfx942": ScreenPlan(8, (Config(128, 4, 2), Config(64, 4, 2)), resolve_options={}),
    "interpreter": ScreenPlan(8, (Config(256, 4, 1),), resolve_rows=64, scan_rows=64),
}


def screen_chunks(d: int) -> tuple[int, int]:
    """(BLOCK_D, NUM_D) of the screening: a row stays in registers up to D = 128, else it is read in chunks."""
    return (max(16, next_power_of_2(d)), 1) if d <= 128 else (64, cdiv(d, 64))


def row_chunks(d: int) -> tuple[int, int]:
    """(BLOCK_D, NUM_D) of the other kernels."""
    block = min(32, max(16, next_power_of_2(d)))
    return block, cdiv(d, block)


def pack_chunk(width: int) -> int:
    """BLOCK_D of the packing, of a padded width."""
    return min(32, width)


def resolve_warps(codebook: Tensor) -> int:
    """One, so that nothing waits at a barrier. Codes that cannot be read 16 bytes at a time need one address per
    element: more than its registers."""
    aligned = codebook.stride(1) == 1 and not any(
        size % 16 for size in (codebook.shape[1], codebook.stride(0), codebook.data_ptr())
    )
    return 1 if aligned else 4


def choose_split(row_blocks: int, num_blocks: int, multiprocessors: int) -> int:
    """Into how many parts the codebook is cut so that every multiprocessor has two programs or more to overlap."""
    split = 1
    while split < MAX_SPLIT and row_blocks * split < 2 * multiprocessors and num_blocks >= 8 * split:
        split *= 2
    return split


def row_programs(n: int, groups: int, block: int) -> int:
    """How many programs n rows take that belong to the codebooks in turn, ``block`` rows of one codebook each."""
    return groups * cdiv(n // groups, block)


def index_bits(num_blocks: int, split: int) -> int:
    """Low mantissa bits that hold the number of a block within its part."""
    return max(1, (cdiv(num_blocks, split) - 1).bit_length())


def scan_parts(k: int, split: int) -> int:
    """Into how many parts the codebook is cut for ``scan``: a power of two, and its results fit into those of
    ``screen``."""
    parts = 1
    while parts < min(4 * split, k // SCAN_PART):
        parts *= 2
    return parts


@cache
def autotuned(configs: tuple[Config, ...]) -> tuple[Any, dict[Any, Any]]:
    """``screen`` that tries these, and what it took, which to ask in every step costs as much as a launch."""
    choices = [triton.Config({"BLOCK_N": c.block_n}, num_warps=c.num_warps, num_stages=c.num_stages) for c in configs]
    return triton.autotune(configs=choices, key=["D", "num_blocks", "SPLIT", "EUCLIDEAN"])(screen), {}


def codebook_search_triton(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    return_normalized: bool,
    return_codes: bool,
    return_distances: bool,
    *,
    split: int | None = None,
    plan: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(indices, normalized, codes, distances) as ``beitv2_fast::codebook_search``; fp32, fp16 and bf16.

    Several codebooks are searched in the same launches, each kernel's grid being so many times as large.

    ``split`` and ``plan`` are chosen from the device; tests set them. Extra memory: 2 K D bytes per packed codebook,
    N SPLIT (2 LANES + 1) floats and 9 N bytes, in 16 bits also both inputs in fp32; nothing of N x K.
    """
    (n, d), (codebook, groups, k) = x.shape, _as_rows(codebook)
    euclidean = metric == "euclidean"
    indices = x.new_empty(n, dtype=torch.int64)
    normalized = x.new_empty((n, d) if return_normalized else 0, dtype=torch.float32)
    codes = codebook.new_empty((n, d) if return_codes else 0)
    distances = x.new_empty(n if return_distances else 0, dtype=torch.float32)
    if n == 0:
        return indices, normalized, codes, distances

    with device_of(x):
        plan = plan or target_name()
        chosen, num_blocks = PLANS[plan], cdiv(k, BLOCK_K)
        lanes, block_r = chosen.lanes, chosen.resolve_rows
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        if split is None:
            split = choose_split(row_programs(n, groups, chosen.configs_for(d)[0].block_n), num_blocks, processors)
        bits = index_bits(num_blocks, split)
        row_blocks = row_programs(n, groups, block_r)
        hard = x.new_empty(n + groups + row_blocks, dtype=torch.int64)
        packed, bias, center, bounds = _pack(codebook, groups, hard, n, chosen, num_blocks, euclidean)
        keys = x.new_empty(n, split, 2, lanes, dtype=torch.float32)
        rest = x.new_empty(n, split, dtype=torch.float32)
        _screen(x, packed, bias, center, bounds, keys, rest, num_blocks, groups, euclidean, bits, split, plan)

        block_d, num_d = row_chunks(d)
        wanted = {
            "EUCLIDEAN": euclidean, "WRITE_NORMALIZED": return_normalized, "WRITE_CODES": return_codes,
            "WRITE_DISTANCES": return_distances, "BLOCK_D": block_d, "NUM_D": num_d,
        }  # fmt: skip
        resolve[(row_blocks,)](
            x, codebook, center, bounds, keys, rest, hard, indices, normalized, codes, distances,
            n, k, d, num_blocks, groups, *x.stride(), *codebook.stride(),
            INDEX_BITS=bits, SPLIT=split, LANES=lanes, BLOCK_R=block_r, BLOCK_K=BLOCK_K,
            **wanted, num_warps=resolve_warps(codebook), **chosen.resolve_options,
        )  # fmt: skip
        parts = scan_parts(k, split)
        programs = min(row_programs(n, groups, chosen.scan_rows) * parts, groups * SCAN_PROGRAMS * processors)
        x, codebook = x.float(), codebook.float()  # as in ``_score_all``
        scan[(programs,)](
            x, codebook, hard, keys.view(torch.float64), indices, normalized, codes, distances,
            n, k, d, cdiv(k, parts), groups, *x.stride(), *codebook.stride(),
            PARTS=parts, BLOCK_R=chosen.scan_rows, BLOCK_C=BLOCK_SCAN, **wanted, num_warps=SCAN_WARPS,
        )  # fmt: skip
    return indices, normalized, codes, distances


def draw_codes_triton(x: Tensor, codebook: Tensor, metric: str, temperature: float, keys: Tensor) -> Tensor:
    """indices as ``beitv2_fast::draw_codes``, for the rows' keys [N] int64, contiguous; fp32, fp16 and bf16."""
    bits = torch.tensor(temperature, dtype=torch.float64, device="cpu").view(torch.int64).item()  # not fp32
    return _score_all(draw, x, codebook, metric, x.new_empty(len(x), dtype=torch.int64), keys, bits)


def nearest_codes_triton(x: Tensor, codebook: Tensor, metric: str, k: int) -> Tensor:
    """indices [N, k] as ``beitv2_fast::nearest_codes``; fp32, fp16 and bf16."""
    indices = x.new_empty((len(x), k), dtype=torch.int64)
    return _score_all(nearest, x, codebook, metric, indices, TOP=k, SLOTS=next_power_of_2(k))


def _score_all(
    kernel: Any, x: Tensor, codebook: Tensor, metric: str, indices: Tensor, *arguments: Any, **constants: int
) -> Tensor:
    """Fills the indices by a kernel that scores all codes in float64."""
    (n, d), (codebook, groups, k), plan = x.shape, _as_rows(codebook), PLANS[target_name()]
    block_d, num_d = row_chunks(d)
    x, codebook = x.float(), codebook.float()  # Triton does not compile float64 products of 16-bit operands
    if n:
        with device_of(x):
            kernel[(row_programs(n, groups, plan.scan_rows),)](
                x, codebook, indices, n, k, d, groups, *x.stride(), *codebook.stride(), *arguments,
                EUCLIDEAN=metric == "euclidean", BLOCK_R=plan.scan_rows, BLOCK_C=BLOCK_SCAN, BLOCK_D=block_d,
                NUM_D=num_d, num_warps=SCAN_WARPS, **constants, **plan.resolve_options,
            )  # fmt: skip
    return indices


def _as_rows(codebook: Tensor) -> tuple[Tensor, int, int]:
    """Codebooks [K, D] or [G, K, D] -> (all codes [G K, D], G, K)."""
    return codebook.flatten(0, -2), codebook.shape[:-2].numel(), codebook.shape[-2]


def _pack(
    codebook: Tensor, groups: int, hard: Tensor, rows: int, plan: ScreenPlan, num_blocks: int, euclidean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(packed codes, biases, center, bounds): see ``pack_codebook``."""
    k, d = len(codebook) // groups, codebook.shape[1]
    block_d, num_d = screen_chunks(d)
    width = block_d * num_d
    packed = codebook.new_empty(groups * num_blocks * BLOCK_K, width, dtype=torch.float16)
    sizes = (num_blocks * BLOCK_K, 128 * cdiv(d, 128), 4 * num_blocks + 8)
    bias, center, bounds = [codebook.new_empty(groups * size, dtype=torch.float32) for size in sizes]
    chunk = pack_chunk(width)
    pack_codebook[(groups * num_blocks,)](
        codebook, packed, bias, center, bounds, hard, rows, k, d, num_blocks, groups, *codebook.stride(),
        LANES=plan.lanes, BLOCK_K=BLOCK_K, SAMPLE=SAMPLE, EUCLIDEAN=euclidean, BLOCK_D=chunk,
        NUM_D=width // chunk, num_warps=PACK_WARPS, **plan.resolve_options,
    )  # fmt: skip
    return packed, bias, center, bounds


def _screen(
    x: Tensor, packed: Tensor, bias: Tensor, center: Tensor, bounds: Tensor, keys: Tensor, rest: Tensor,
    num_blocks: int, groups: int, euclidean: bool, bits: int, split: int, plan: str,
) -> None:  # fmt: skip
    n, d = x.shape
    block_d, num_d = screen_chunks(d)
    arguments = (x, packed, bias, center, bounds, keys, rest, n, d, num_blocks, groups, *x.stride())
    constants = {
        "EUCLIDEAN": euclidean, "INDEX_BITS": bits, "SPLIT": split,
        "LANES": PLANS[plan].lanes, "BLOCK_K": BLOCK_K, "BLOCK_D": block_d, "NUM_D": num_d,
    }  # fmt: skip
    configs = PLANS[plan].configs_for(d)
    tuner, taken = autotuned(configs)
    problem = d, num_blocks, split, euclidean, x.dtype
    if triton.knobs.runtime.interpret or len(configs) == 1:
        taken[problem] = tuner.configs[0]
    if problem in taken:
        launch = taken[problem].all_kwargs()
        screen[(row_programs(n, groups, launch["BLOCK_N"]), split)](*arguments, **constants, **launch)
    else:
        tuner[lambda meta: (row_programs(n, groups, meta["BLOCK_N"]), split)](*arguments, **constants)
        taken[problem] = tuner.best_config
