"""How much of the codebook lives, and what that is worth: `python -m bench.collapse`.

Trains the demo's tokenizer on two sets of photographs, each with the reference's settings (dead codes stay dead) and
with the defaults, and plots the used share of codes and the similarity to the teacher over training:

    demo           the demo's photographs of solar cells, 128 px, K = 256 as in the demo preset
    tiny_imagenet  12,000 photographs of 100 classes, 64 px, K = 1024; unpacked from --tiny-imagenet, skipped without

Used is a code that was chosen in a window of 80 vectors per code (--log-every). Every run takes 5 to 15 minutes on one
processor; a run that is complete is not trained again. Written are a table on the terminal, docs/collapse.json and
docs/collapse.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from beitv2_fast.config.options import path
from beitv2_fast.config.training import TokenizerConfig
from beitv2_fast.train.demo_images import write_demo_images

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT.parent / "shared" / "data" / "tiny_imagenet_100.npz"
REFERENCE, DEFAULTS = (
    "reference's settings (--dead-after 0)",
    f"defaults (--dead-after {TokenizerConfig().dead_after:g})",
)
SETTINGS = {REFERENCE: 0.0, DEFAULTS: TokenizerConfig().dead_after}
END = 0.25  # the share of training, at its end, over which the table averages


@dataclass(frozen=True)
class Images:
    folder: Path
    title: str
    options: tuple[str, ...]


def unpack_tiny_imagenet(pack: Path, out: Path) -> Path | None:
    """The image folder in a pack, by the script beside it; None if there is no pack."""
    if not pack.is_file():
        return None
    if not out.is_dir():
        partial = out.with_suffix(".partial")
        subprocess.run([sys.executable, str(pack.with_name("unpack.py")), str(pack), str(partial)], check=True)
        partial.rename(out)
    return out


def image_sets(out: Path, pack: Path) -> list[Images]:
    whole = "--teacher efficientnet_lite0 --teacher-image-size 256 --no-teacher-resize"
    training = f"{whole} --views 2 --epochs 6 --log-every 10"
    sets = [Images(write_demo_images(out / "demo_images"), "demo, K = 256", tuple(training.split()))]
    tiny = unpack_tiny_imagenet(pack, out / "tiny_imagenet")
    if tiny is None:
        print(f"{pack} is not here: the runs on Tiny-ImageNet are left out")
    else:
        model = "--image-size 64 --patch-size 8 --num-codes 1024"
        training = f"{whole} --epochs 3 --warmup-epochs 0.3 --views 1 --log-every 40"
        sets.append(Images(tiny, "Tiny-ImageNet-100, K = 1024", (*model.split(), *training.split())))
    return sets


def train(images: Images, dead_after: float, run: Path, extra: list[str], threads: int) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of a run, which is trained or resumed first if it is not complete."""
    command = [
        *(sys.executable, str(ROOT / "train" / "tokenizer.py"), "--preset", "demo", "--data", str(images.folder)),
        *("--out", str(run), "--dead-after", str(dead_after), "--workers", "0"),
        *images.options,
        *extra,
    ]
    print(f"\n== {images.title}, dead_after {dead_after:g}\n   {' '.join(command)}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return list({row["step"]: row for row in rows}.values())  # a resumed run repeats steps: the last line counts


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the end of the training."""
    end = rows[-max(1, round(END * len(rows))) :]
    return {
        "used_codes": sum(row["used_codes"] for row in end) / len(end),
        "perplexity": sum(row["perplexity"] for row in end) / len(end),
        "similarity": sum(1 - row["rec_loss"] for row in end) / len(end),
    }


def plot(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(10, 3.4 * len(results)), squeeze=False)
    for (title, settings), (used, similarity) in zip(results.items(), axes, strict=True):
        for name, rows in settings.items():
            steps = [row["step"] for row in rows]
            used.plot(steps, [100 * row["used_codes"] for row in rows], label=name)
            similarity.plot(steps, [1 - row["rec_loss"] for row in rows], label=name)
        used.axhline(95, color="gray", linewidth=0.8, linestyle="--")
        used.set(title=f"{title}: codes used, %", xlabel="step", ylim=(0, 102))
        similarity.set(title=f"{title}: similarity", xlabel="step")
        used.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path, default=Path("runs/collapse"), help="folder of the runs")
    parser.add_argument("--docs", type=path, default=ROOT / "docs", help="folder of the plot and its numbers")
    parser.add_argument("--tiny-imagenet", type=path, default=PACK, help="tiny_imagenet_100.npz")
    parser.add_argument("--threads", type=int, default=1, help="of every run")
    parser.add_argument("rest", nargs="*", help="after --: further options of train/tokenizer.py, e.g. -- --seed 1")
    args = parser.parse_args()
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for images in image_sets(args.out, args.tiny_imagenet):
        results[images.title] = {
            name: train(images, value, args.out / f"{images.folder.name}_{value:g}", args.rest, args.threads)
            for name, value in SETTINGS.items()
        }
    table = {title: {name: summary(rows) for name, rows in runs.items()} for title, runs in results.items()}
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "collapse.json").write_text(json.dumps({"end": table, "runs": results}, indent=1) + "\n")
    plot(results, args.docs / "collapse.png")
    print(f"\nmeans over the last {END:.0%} of the training")
    for title, runs in table.items():
        for name, values in runs.items():
            print(
                f"  {title:<28} {name:<38} codes used {values['used_codes']:.1%}  "
                f"perplexity {values['perplexity']:.0f}  similarity {values['similarity']:.4f}"
            )


if __name__ == "__main__":
    main()
