"""Makes docs/transcript_of_names.md: ``python -m tests.support.transcript_of_names > docs/transcript_of_names.md``.

Each command is run as it stands there, in this process, by which the published addresses lead to a server on 127.0.0.1
with files of the published structure and random weights.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest
import torch

from beitv2_fast import cli, create_model
from beitv2_fast.train import linear_probe, pretrain, report
from beitv2_fast.weights import convert

from .release_server import serving, without_digests
from .training import write_images

TOKENIZER, STUDENT = "vqkd_encoder_base_decoder_1x768x12_clip", "beitv2_base_patch16_224_pt1k_300e"
COMMANDS = f"""
beitv2-fast models
python train/pretrain.py --data photos --tokenizer {TOKENIZER} --out runs/pretrain --dim 96 --depth 3 --heads 3 --early-layer 2 --batch-size 8 --epochs 2 --warmup-epochs 1 --log-every 1 --workers 0 --device cpu
python train/linear_probe.py --data photos --run {STUDENT} --out runs/probe --epochs 10 --shots 1 --workers 0 --device cpu
python train/report.py --data photos --tokenizer {TOKENIZER} --pretrain runs/pretrain --probe runs/probe --out runs/report --no-teacher --workers 0 --device cpu
beitv2-fast encode photos --tokenizer {TOKENIZER} --out codes.npz --workers 0 --device cpu
beitv2-fast convert runs/pretrain student_for_a_hub --to beitv2_fast
""".strip().splitlines()  # noqa: E501
INTRODUCTION = """# From a published name to pre-training, probe, report and codes

Written by `python -m tests.support.transcript_of_names`. The commands are those of a machine with a network; here the
addresses lead to a server on 127.0.0.1 with files of the published structure and size, whose weights are random and
whose photographs are noise: the scores say nothing. 12 images to train on, a student of width 96, 2 CPU cores that
other programs kept busy.
"""
MAINS = {"pretrain": pretrain.main, "linear_probe": linear_probe.main, "report": report.main}


def answer(command: str, folder: Path) -> str:
    words = shlex.split(command)
    run, given = (cli.run_command, words[1:]) if words[0] != "python" else (MAINS[Path(words[1]).stem], words[2:])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run(given)
    lines = [line.rpartition("\r")[2].rstrip() for line in said.getvalue().replace(f"{folder}/", "").splitlines()]
    return "\n".join(line for line in lines if not re.search(r"%\|(?!.*B/s)|[1-9 ]\d%\|", line))  # of bars: files' ends


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place).resolve()
        with serving(folder / "cache", patch) as server:
            without_digests(patch)
            for name in (TOKENIZER, STUDENT):
                published = create_model({TOKENIZER: "vqkd_base_clip_1", STUDENT: "beitv2_base"}[name])
                if name == TOKENIZER:
                    published.quantize.initialized.fill_(True)
                server.publish(name, convert(published.state_dict(), "published"), folder)
            for split, label in ((split, label) for split in ("train", "test") for label in ("a", "b")):
                write_images(folder / "photos" / split / label, 6, size=240)
            os.chdir(folder)
            print(INTRODUCTION)
            for command in COMMANDS:
                print(f"    $ {command}\n")
                print("\n".join(f"    {line}".rstrip() for line in answer(command, folder).splitlines()) + "\n")


if __name__ == "__main__":
    main()
