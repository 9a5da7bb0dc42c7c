"""Run folders of tiny untrained models on tiny images, for tests of reports, pictures and the explore page."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from beitv2_fast.config.options import to_json
from beitv2_fast.config.training import PretrainConfig, TokenizerConfig
from beitv2_fast.runs.checkpoints import save_weights
from beitv2_fast.teachers.base import Teacher
from beitv2_fast.weights.build import build_student, build_tokenizer

SHAPE = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2, "epochs": 2}
CODES = 8


class TinyTeacher(Teacher):
    dim, patch_size = 12, 8

    def __init__(self):
        super().__init__((0.5,) * 3, (0.5,) * 3)
        torch.manual_seed(5)
        self.conv = torch.nn.Conv2d(3, 12, 8, 8)

    def features(self, images):
        return self.conv(images)


def lines_of(config: TokenizerConfig | PretrainConfig, steps: int = 4) -> list[dict[str, float]]:
    """A training log."""
    kind = {"rec_loss": 0.9, "perplexity": 4.0} if isinstance(config, TokenizerConfig) else {"accuracy_mim": 0.1}
    return [{"step": s, "epoch": s / 2, "loss": 1 / s, "lr": 1e-3, **kind} for s in range(1, steps + 1)]


def write_run(
    out: Path, config: TokenizerConfig | PretrainConfig, model: torch.nn.Module, metrics: list[dict[str, float]]
) -> None:
    """A run folder with one checkpoint."""
    folder = out / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    save_weights(model.state_dict(), folder / "model.safetensors")
    (out / "config.json").write_text(json.dumps(to_json(config)))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def write_images(data: Path) -> Path:
    """data/{train,test}/{a,b}/*.png, of noise, wider than high."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("test", 2)):
        for label in ("a", "b"):
            (data / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(data / split / label / f"{i}.png")
    return data


def small_tokenizer(out: Path, **options: object) -> Path:
    """Its run folder, for what needs a tokenizer and not its training."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        **SHAPE, num_codes=CODES, code_dim=4, decoder_depth=1, teacher="efficientnet_lite0", init_std=0.5, **options
    )
    write_run(out, config, build_tokenizer(config, 12), lines_of(config))
    return out


def small_runs(root: Path) -> Path:
    """root/data, root/tokenizer and root/pretrain."""
    data = write_images(root / "data")
    pretrain = PretrainConfig(
        **SHAPE, data=data, tokenizer=small_tokenizer(root / "tokenizer", data=data), early_layer=1, num_masked=6,
        min_mask_patches=2, init_std=0.5,
    )  # fmt: skip
    write_run(root / "pretrain", pretrain, build_student(pretrain, CODES), lines_of(pretrain))
    return root
