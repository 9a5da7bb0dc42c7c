"""FLOPs, memory and predicted time of both trainings' steps on A100 and H100: `python -m bench.model_cost`.

**A model, not a measurement.** FLOPs are counted from shapes (a multiply-add is 2; backward is twice forward). Memory
is what the implementation keeps: fp32 weights, gradients and AdamW's averages, and the activations that bf16 autocast
leaves for backward. Time is a roofline by part: the slower of FLOPs at ``EFFICIENCY`` of the tensor cores' peak and
bytes at ``EFFICIENCY`` of the memory's peak rate, summed over the parts; launches, communication and data loading are
left out.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace

import torch
from torch import nn

from beitv2_fast.config.presets import PRETRAIN
from beitv2_fast.models.student import Student, StudentConfig
from beitv2_fast.models.tokenizer import Tokenizer, TokenizerModelConfig
from beitv2_fast.models.vit import ViTConfig

GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12)}  # dense bf16 FLOP/s, bytes/s; the vendor's numbers
EFFICIENCY = 0.5  # assumed share of both peaks that a part reaches
BATCH = 64  # images per GPU
BF16, FP32 = 2, 4
ADAMW_BYTES = 7 * FP32  # read weight, gradient, two averages; write weight and averages
ATTENTION_PRODUCTS = 2 + 4 + 1  # forward; backward; the scores again, which were not kept
TEACHER = ViTConfig(position="absolute")  # CLIP ViT-B/16


@dataclass(frozen=True)
class Part:
    """What a part of a step costs: FLOPs, bytes moved through the GPU's memory, bytes kept from forward to backward."""

    name: str
    flops: float
    moved: float
    kept: float = 0.0

    def seconds(self, gpu: str) -> float:
        flops, rate = GPUS[gpu]
        return max(self.flops / flops, self.moved / rate) / EFFICIENCY


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """Of the forward of a linear layer."""
    return 2 * rows * inputs * outputs


def block_parts(name: str, config: ViTConfig, batch: int, depth: int, *, backward: bool = True) -> list[Part]:
    """``depth`` transformer blocks: linear layers, attention, and what is elementwise between them.

    Kept in bf16: the inputs of the four linear layers (the MLP's second keeps its GELU's input), q, k, v and the
    attention's output; in fp32 the residual stream before each norm.
    """
    rows, dim, hidden = batch * (config.num_patches + 1), config.dim, int(config.dim * config.mlp_ratio)
    passes = 3 if backward else 1
    weights = 4 * dim * dim + 2 * dim * hidden
    linear = linear_flops(rows, dim, 4 * dim) + 2 * linear_flops(rows, dim, hidden)
    io = rows * (dim + 3 * dim + dim + dim + dim + hidden + hidden + dim) + weights
    product = 2 * rows * (config.num_patches + 1) * dim  # q k^T or p v
    attention = product * (ATTENTION_PRODUCTS if backward else 2)
    kept = rows * (BF16 * (dim + 3 * dim + dim + dim + hidden) + FP32 * 2 * dim) if backward else 0.0
    gamma = rows * 2 * dim * BF16 if backward and config.layer_scale > 0 else 0.0
    # forward: two norms and two sums on the fp32 stream, GELU; backward about twice that
    elementwise = rows * (2 * dim * (FP32 + BF16) + 2 * dim * (2 * FP32 + BF16) + 2 * hidden * BF16)
    return [
        Part(f"{name}: linear layers", depth * linear * passes, depth * io * BF16 * passes, depth * kept),
        Part(f"{name}: attention", depth * attention, depth * rows * 4 * dim * BF16 * passes),
        Part(f"{name}: norms, GELU, residuals", 0.0, depth * elementwise * passes, depth * gamma),
    ]


def embed_part(name: str, config: ViTConfig, batch: int, *, backward: bool = True) -> Part:
    """The patch embedding; images need no gradient, so backward is one product."""
    rows, inputs = batch * config.num_patches, config.in_channels * config.patch_size**2
    flops = linear_flops(rows, inputs, config.dim) * (2 if backward else 1)
    moved = rows * (inputs * FP32 + config.dim * (BF16 + FP32)) * (2 if backward else 1)
    return Part(f"{name}: patch embedding", flops, moved, rows * inputs * BF16 if backward else 0.0)


def head_part(name: str, rows: int, *widths: int, element: int = BF16) -> Part:
    """Linear layers one after another, with what is between them."""
    flops = 3 * sum(linear_flops(rows, a, b) for a, b in itertools.pairwise(widths))
    return Part(name, flops, 3 * rows * sum(widths) * element, rows * sum(widths[:-1]) * element)


def optimizer_part(parameters: int) -> Part:
    return Part("AdamW", 12.0 * parameters, parameters * ADAMW_BYTES)


def tokenizer_parts(config: TokenizerModelConfig, batch: int, parameters: int) -> list[Part]:
    """A VQ-KD step, the teacher (CLIP B/16, only its forward) included."""
    encoder, decoder = config.encoder, config.decoder
    rows, dim = batch * encoder.num_patches, encoder.dim
    search = 2.0 * rows * config.num_codes * config.code_dim
    return [
        embed_part("teacher", TEACHER, batch, backward=False),
        *block_parts("teacher", TEACHER, batch, TEACHER.depth, backward=False),
        embed_part("encoder", encoder, batch),
        *block_parts("encoder", encoder, batch, encoder.depth),
        head_part("encoder head (fp32)", rows, dim, dim, config.code_dim, element=FP32),
        Part("quantizer", search, rows * config.code_dim * FP32 * 6 + config.num_codes * config.code_dim * FP32 * 4),
        replace_flops(embed_part("decoder", decoder, batch), 3 / 2),  # the codes need a gradient
        *block_parts("decoder", decoder, batch, decoder.depth),
        head_part("decoder head", rows, dim, dim, config.teacher_dim),
        optimizer_part(parameters),
    ]


def student_parts(config: StudentConfig, batch: int, num_masked: int, parameters: int) -> list[Part]:
    """A pre-training step; the tokenizer's encoder, which makes the labels, included (B/16, only its forward)."""
    vit, tokenizer = config.vit, TokenizerModelConfig()
    patches, branches = batch * vit.num_patches, 2 if config.aggregation_depth else 1
    rows = branches * batch * num_masked
    encode = linear_flops(patches, tokenizer.encoder.dim, tokenizer.encoder.dim + tokenizer.code_dim)
    search = 2.0 * patches * tokenizer.num_codes * tokenizer.code_dim
    # logits pass through memory in chunks: written and read in forward, and once more as gradients
    logits = rows * config.num_codes * BF16
    return [
        embed_part("tokenizer", tokenizer.encoder, batch, backward=False),
        *block_parts("tokenizer", tokenizer.encoder, batch, tokenizer.encoder.depth, backward=False),
        Part("tokenizer: head and search", encode + search, patches * tokenizer.encoder.dim * FP32 * 3),
        embed_part("student", vit, batch),
        *block_parts("student", vit, batch, vit.depth),
        *block_parts("aggregation", vit, batch, config.aggregation_depth),
        Part(
            "masked-token head",
            3.0 * linear_flops(rows, vit.dim, config.num_codes),
            4 * logits + 3 * rows * vit.dim * BF16,
            branches * batch * (vit.num_patches + 1) * vit.dim * FP32,  # the tokens' gradients, made in forward
        ),
        optimizer_part(parameters),
    ]


def replace_flops(part: Part, factor: float) -> Part:
    return replace(part, flops=part.flops * factor)


def meta_parameters(model: type[nn.Module], config: object) -> int:
    """Parameters of a model, built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in model(config).parameters())


def shapes() -> dict[str, tuple[list[Part], int]]:
    """By name: the parts of a step and its parameters."""
    base = TokenizerModelConfig()
    large = replace(base, encoder=ViTConfig(dim=1024, depth=24, heads=16, position="absolute"))
    result = {}
    for size, config in (("B/16", base), ("L/16", large)):
        parameters = meta_parameters(Tokenizer, config)
        result[f"VQ-KD {size}"] = (tokenizer_parts(config, BATCH, parameters), parameters)
    for size, name in (("B/16", "base"), ("L/16", "large")):
        preset = PRETRAIN[name]
        vit = ViTConfig(dim=preset.dim, depth=preset.depth, heads=preset.heads, layer_scale=preset.layer_scale)
        student = StudentConfig(vit, early_layer=preset.early_layer)
        parameters = meta_parameters(Student, student)
        result[f"pre-training {size}"] = (student_parts(student, BATCH, preset.num_masked, parameters), parameters)
    return result


def memory(parts: list[Part], parameters: int) -> dict[str, float]:
    """Bytes on one GPU, by kind, without ZeRO."""
    return {
        "weights": FP32 * parameters,
        "gradients": FP32 * parameters,
        "AdamW": 2 * FP32 * parameters,
        "activations": sum(part.kept for part in parts),
    }


def report(name: str, parts: list[Part], parameters: int) -> str:
    gpus = list(GPUS)
    lines = [
        f"\n**{name}, {BATCH} images per GPU, {parameters / 1e6:.1f} M parameters** (model, not measured)\n",
        f"| part | GFLOP | GB moved | {' | '.join(f'{gpu} ms' for gpu in gpus)} |",
        f"|---|---|---|{'---|' * len(gpus)}",
    ]
    total = Part("all", sum(p.flops for p in parts), sum(p.moved for p in parts))
    for part in parts:
        times = " | ".join(f"{1e3 * part.seconds(gpu):.1f}" for gpu in gpus)
        lines.append(f"| {part.name} | {part.flops / 1e9:,.0f} | {part.moved / 1e9:.1f} | {times} |")
    seconds = {gpu: sum(part.seconds(gpu) for part in parts) for gpu in gpus}
    times = " | ".join(f"{1e3 * t:.0f}" for t in seconds.values())
    lines.append(f"| **all** | {total.flops / 1e9:,.0f} | {total.moved / 1e9:.1f} | {times} |")
    kinds = memory(parts, parameters)
    text = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in kinds.items())
    speed = ", ".join(f"{gpu} {BATCH / t:.0f}" for gpu, t in seconds.items())
    lines.append(f"\nGB: {text}; together {sum(kinds.values()) / 1e9:.1f}. Images per second: {speed}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(f"A model, not a measurement: roofline at {EFFICIENCY:.0%} of the peaks, bf16 autocast, no ZeRO.")
    for name, (parts, parameters) in shapes().items():
        print(report(name, parts, parameters))


if __name__ == "__main__":
    main()
