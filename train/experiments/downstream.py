"""One table of everything, small: ``python -m beitv2_fast.train.experiments.downstream``.

Tokenizer, pre-training with and without patch aggregation, and what each backbone is worth afterwards: probes, k-NN,
fine-tuning, segmentation, for several seeds.

Stopped and started again with the same options, it goes on where it was; finished steps are not run again. What is
there can be shown at any time: ``--show``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from beitv2_fast.config.options import option, parse
from beitv2_fast.distributed import run_main
from beitv2_fast.runs.files import write_atomically
from beitv2_fast.train.experiments.packed_images import unpacked
from beitv2_fast.train.experiments.runner import Step, machine, run_steps, times
from beitv2_fast.train.experiments.stages import SCENES, SmallScale, Stages, probe_numbers, step_result
from beitv2_fast.train.experiments.tables import Column, Table, markdown, ordering, plot

RANDOM, ENCODER, PLAIN, STUDENT = "random weights", "VQ-KD encoder", "student, no aggregation", "student"
TEACHER = "teacher (saw ImageNet's labels)"
ROWS = {"random": RANDOM, "tokenizer": ENCODER, "pretrain_plain": PLAIN, "pretrain": STUDENT, "teacher": TEACHER}
BACKBONE_COLUMNS = (
    Column("probe_cls", "probe, CLS"),
    Column("probe_mean", "probe, mean"),
    Column("knn_cls", "10-NN, CLS"),
    Column("knn_mean", "10-NN, mean"),
    Column("finetune", "fine-tuned"),
    Column("segment", "mIoU"),
)
TOKENIZER_COLUMNS = (
    Column("used_codes", "codes used"),
    Column("perplexity", "perplexity", percent=False, digits=0),
    Column("similarity", "similarity to the teacher", percent=False, digits=3),
)
# The paper's orderings: (higher, lower, column)
ORDERINGS = (
    (STUDENT, ENCODER, "finetune"), (STUDENT, ENCODER, "probe_cls"), (STUDENT, ENCODER, "probe_mean"),
    (STUDENT, PLAIN, "probe_cls"), (STUDENT, PLAIN, "probe_mean"), (STUDENT, PLAIN, "finetune"),
    (STUDENT, RANDOM, "probe_cls"), (STUDENT, RANDOM, "probe_mean"), (STUDENT, RANDOM, "finetune"),
    (STUDENT, RANDOM, "segment"), (PLAIN, RANDOM, "finetune"), (ENCODER, RANDOM, "finetune"),
)  # fmt: skip


@dataclass(frozen=True)
class DownstreamConfig(SmallScale):
    """The table of backbones on small photographs."""

    out: Path = option(Path("runs/downstream"), "folder of all runs, of results.json, table.md and table.png")
    images: Path = option(
        Path("data"),
        "photographs to pre-train on and to classify: a folder with train/CLASS and val/CLASS, or a packed file",
    )
    scenes: Path = option(Path("none"), SCENES)
    seeds: int = option(3, "repetitions of the whole, from the tokenizer on", at_least=1)
    show: bool = option(False, "run nothing: write the table of what is there")


def steps_of(config: DownstreamConfig, images: Path, scenes: Path | None) -> list[Step]:
    """All steps, a seed after the other, so that what is stopped early has whole seeds."""
    stages, found = Stages(config.out.resolve(), images.resolve(), config), []
    for seed in range(config.seeds):
        at = f"seed{seed}"
        run = {row: f"{at}/{row}" for row in ("tokenizer", "pretrain_plain", "pretrain")}
        found += [
            stages.tokenizer(run["tokenizer"], seed),
            stages.finetune(f"{at}/finetune_random", None, seed),
            stages.pretrain(run["pretrain"], run["tokenizer"], seed),
            stages.pretrain(run["pretrain_plain"], run["tokenizer"], seed, aggregation_depth=0),
            stages.quality(f"{at}/tokenizer_quality", run["tokenizer"]),
            stages.finetune(f"{at}/finetune_tokenizer", run["tokenizer"], seed),
            stages.finetune(f"{at}/finetune_pretrain", run["pretrain"], seed),
            stages.finetune(f"{at}/finetune_pretrain_plain", run["pretrain_plain"], seed),
            *(stages.probe(f"{at}/probe_{row}", name, seed) for row, name in run.items()),
            stages.probe(f"{at}/probe_random", run["pretrain"], seed, "untrained"),
        ]
        if seed == 0:  # the teacher is the same for all
            found.append(stages.probe(f"{at}/probe_teacher", run["tokenizer"], seed, "teacher"))
        if scenes is not None:
            for row, name in (("random", None), ("pretrain", run["pretrain"])):
                found.append(stages.segment(f"{at}/segment_{row}", scenes.resolve(), name, seed))
    return found


def tables_of(root: Path, seeds: int) -> tuple[Table, Table]:
    """(tokenizers, backbones): what the steps that are done have left."""
    tokenizers: Table = {"VQ-KD": {}}
    backbones: Table = {title: {} for title in ROWS.values()}

    def add(table: Table, row: str, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            table[row].setdefault(key, []).append(value)

    for seed in range(seeds):
        at = f"seed{seed}"
        if (found := step_result(root, f"{at}/tokenizer_quality")) is not None:
            add(tokenizers, "VQ-KD", {column.key: found[column.key] for column in TOKENIZER_COLUMNS})
        for row, title in ROWS.items():
            if (found := step_result(root, f"{at}/probe_{row}")) is not None:
                add(backbones, title, probe_numbers(found))
            if (found := step_result(root, f"{at}/finetune_{row}")) is not None:
                add(backbones, title, {"finetune": found["weights"]["top1"]})
            if (found := step_result(root, f"{at}/segment_{row}")) is not None:
                add(backbones, title, {"segment": found["weights"]["miou"]})
    return tokenizers, backbones


def orderings(table: Table) -> list[str]:
    titles = {column.key: column for column in BACKBONE_COLUMNS}
    return [f"{a} > {b}, {titles[key].title}: {ordering(table, a, b, titles[key])}" for a, b, key in ORDERINGS]


def write_tables(config: DownstreamConfig, steps: list[Step], before: dict[str, object], started: float) -> str:
    """results.json, table.md and table.png; the text of the table."""
    root = config.out
    root.mkdir(parents=True, exist_ok=True)
    tokenizers, backbones = tables_of(root, config.seeds)
    step_seconds, cpu_seconds = times(root, steps)
    known = root / "results.json"
    earlier = json.loads(known.read_text()) if known.is_file() else {}
    spent = earlier.get("wall_seconds", 0.0) + time.monotonic() - started
    state = {"machine_before": before, "machine_after": machine()}
    state["config"] = {f.name: str(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if config.show and earlier:  # nothing ran now
        state = {key: earlier[key] for key in state}
    content = {
        "tokenizers": tokenizers,
        "backbones": backbones,
        "orderings": orderings(backbones),
        "wall_seconds": round(spent, 1),  # of all calls of this command together
        "step_seconds": round(step_seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        **state,
    }
    text = "\n".join(
        [
            markdown("tokenizer", tokenizers, TOKENIZER_COLUMNS),
            markdown("backbone", backbones, BACKBONE_COLUMNS),
            *(f"- {line}" for line in content["orderings"]),
            f"\n{content['wall_seconds'] / 60:.1f} minutes of the command, {cpu_seconds / 60:.1f} of processor time.\n",
        ]
    )
    write_atomically(known, json.dumps(content, indent=1) + "\n")
    write_atomically(root / "table.md", text)
    plot(backbones, BACKBONE_COLUMNS, root / "table.png", aside=[TEACHER])
    return text


def main(argv: list[str] | None = None) -> int:
    config, _ = parse(DownstreamConfig, {"base": DownstreamConfig()}, argv)
    started, before = time.monotonic(), machine()
    images = unpacked(config.images, config.out / "images", not config.show)
    scenes = None if str(config.scenes) == "none" else unpacked(config.scenes, config.out / "scenes", not config.show)
    steps = steps_of(config, images, scenes)
    code = 0
    if not config.show:
        code = run_steps(steps, config.out, jobs=config.steps_at_once).code
    print(write_tables(config, steps, before, started))
    return code


if __name__ == "__main__":
    run_main(main)
