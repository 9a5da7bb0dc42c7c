"""The paper's ablations: ``python -m beitv2_fast.train.experiments.ablate NAME ...`` (no NAME: what there is).

Small ones, or with --model those of the paper's presets, by the paper's metrics: fine-tuning, linear probe, mIoU. Each
is a short list of option values. What an option does not touch is trained once for all of them: the tokenizer of the
masks, the base that every ablation compares with. Stopped and started again, a run goes on where it was; the results of
all ablations collect in results.json of --out, with a table and a plot for each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beitv2_fast.config.options import option, parse
from beitv2_fast.config.presets import PRETRAIN, TOKENIZER
from beitv2_fast.distributed import run_main
from beitv2_fast.errors import UserError
from beitv2_fast.runs.files import write_atomically
from beitv2_fast.train.experiments.packed_images import unpacked
from beitv2_fast.train.experiments.runner import Step, is_done, machine, run_steps, times
from beitv2_fast.train.experiments.stages import SCENES, SmallScale, Stages, probe_numbers, step_result
from beitv2_fast.train.experiments.tables import Column, Table, markdown, plot

Options = dict[str, Any]
RESULT_COLUMNS = (
    Column("used_codes", "codes used"),
    Column("perplexity", "perplexity", percent=False, digits=0),
    Column("similarity", "similarity to teacher", percent=False, digits=3),
    Column("encoder_probe_mean", "encoder: probe"),
    Column("encoder_knn_mean", "encoder: 10-NN"),
    Column("probe_cls", "student: probe, CLS"),
    Column("probe_mean", "student: probe, mean"),
    Column("knn_cls", "student: 10-NN, CLS"),
    Column("knn_mean", "student: 10-NN, mean"),
    Column("finetune", "student: fine-tuned"),
    Column("segment", "student: mIoU"),
)
OF_TOKENIZERS = ("used_codes", "perplexity", "similarity")


@dataclass(frozen=True)
class Variant:
    """A row: options of the tokenizer's training and of the pre-training that differ from the base."""

    title: str
    tokenizer: Options = field(default_factory=dict)
    pretrain: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    title: str
    variants: tuple[Variant, ...]

    @property
    def about_tokenizers(self) -> bool:
        return any(variant.tokenizer for variant in self.variants)


def _of(title: str, stage: str, name: str, values: Sequence[Any], says: str = "{}") -> Ablation:
    """One option of a stage, value by value."""
    return Ablation(title, tuple(Variant(says.format(v), **{stage: {name: v}}) for v in values))


# By --model: sizes of the codebook, early layers, decay of the codebook's moving average
VALUES = {
    "none": ((64, 256, 1024), (1, 2, 3), 0.97),
    "base": ((1024, 4096, 8192), (3, 6, 9), 0.99),
    "large": ((1024, 4096, 8192), (7, 14, 21), 0.99),
}


def ablations(model: str = "none") -> dict[str, Ablation]:
    """By name. A variant equal to the base is the base, which is trained once. The small base is 256 codes of width 32,
    a decoder of 1 block, k-means and EMA 0.97; blocks over 40 % of the patches, early layer 3 of 4, 2 aggregation
    blocks with the shared head. That of a --model is what its presets say.
    """
    sizes, layers, ema = VALUES[model]
    return {
        "codebook_size": _of("Size of the codebook", "tokenizer", "num_codes", sizes, "{} codes"),
        "code_dim": _of("Width of the codes", "tokenizer", "code_dim", (8, 32, 128), "width {}"),
        "decoder_depth": _of("Depth of the tokenizer's decoder", "tokenizer", "decoder_depth", (1, 3), "depth {}"),
        "teacher": _of(
            "Teacher (clip and dino: with the weights that their packages fetch)", "tokenizer", "teacher",
            ("efficientnet_lite0", "clip", "dino"),
        ),
        "codebook_update": Ablation(
            "k-means start and moving average of the codebook",
            (
                Variant(f"k-means, EMA {ema}", {"kmeans_init": True, "decay": ema}),
                Variant(f"random start, EMA {ema}", {"kmeans_init": False}),
                Variant("k-means, no EMA", {"decay": 0.0}),
                Variant("random start, no EMA", {"kmeans_init": False, "decay": 0.0}),
                Variant(f"random start, EMA {ema}, dead codes stay", {"kmeans_init": False, "dead_after": 0.0}),
            ),
        ),
        "early_layer": _of("Early layer l of the aggregation", "pretrain", "early_layer", layers, "l = {}"),
        "aggregation_depth": _of("Depth of the aggregation", "pretrain", "aggregation_depth", (1, 2, 3), "depth {}"),
        "head": _of("Head of the two branches", "pretrain", "shared_head", (True, False), "shared: {}"),
        "aggregation": Ablation(
            "Patch aggregation", (Variant("with"), Variant("without", pretrain={"aggregation_depth": 0}))
        ),
        "loss_on": _of("Branches with a loss", "pretrain", "loss_on", ("both", "last", "aggregation")),
        "mask_ratio": _of("Share of masked patches", "pretrain", "masked", (0.2, 0.4, 0.6, 0.75), "{}"),
        "masks": Ablation(
            "Masks: shape and share",
            (
                Variant("blocks, 40 %"),
                Variant("blocks, 20 %", pretrain={"masked": 0.2}),
                Variant("blocks, 60 %", pretrain={"masked": 0.6}),
                Variant("random, 40 %", pretrain={"mask": "random"}),
            ),
        ),
    }  # fmt: skip


ABLATIONS = tuple(ablations())
FIXED: Options = {
    "code_dim": 32, "decoder_depth": 1, "teacher": "efficientnet_lite0", "kmeans_init": True, "decay": 0.97,
    "aggregation_depth": 2, "shared_head": True, "loss_on": "both", "mask": "block",
}  # fmt: skip


@dataclass(frozen=True)
class AblateConfig(SmallScale):
    """Ablations; each row differs from the base in what it names."""

    out: Path = option(Path("runs/ablations"), "folder of all runs, of results.json and of NAME.md and NAME.png")
    images: Path = option(Path("data"), "photographs: a folder with train/CLASS and val/CLASS, or a packed file")
    scenes: Path = option(Path("none"), SCENES)
    teacher_cache: Path | None = option(
        None,
        "folder of the teacher's features, which another experiment on these images may have filled; none: in --out",
    )
    students: bool = option(
        True, "also pre-train a student for each tokenizer of an ablation that is about tokenizers, and probe and "
        "fine-tune it; else these are judged by themselves: codes, similarity, probe and k-NN of the encoder",
    )  # fmt: skip
    seeds: int = option(1, "repetitions of the whole, from the tokenizer on", at_least=1)
    show: bool = option(False, "run nothing: write the tables of what is there")


BASE = AblateConfig(tokenizer_epochs=3, pretrain_epochs=3)


@dataclass
class AblationSteps:
    """steps: of all ablations, each once. runs: by (ablation, variant's title, seed) the names of its steps."""

    steps: dict[str, Step] = field(default_factory=dict)
    runs: dict[tuple[str, str, int], dict[str, str]] = field(default_factory=dict)

    def add(self, step: Step) -> str:
        self.steps.setdefault(step.name, step)
        return step.name


def plan(names: Sequence[str], config: AblateConfig, images: Path, scenes: Path | None = None) -> AblationSteps:
    stages, made = Stages(config.out.resolve(), images.resolve(), config, config.teacher_cache), AblationSteps()
    for name in names:
        ablation = ablations(config.model)[name]
        about = ablation.about_tokenizers
        for variant in ablation.variants:
            for seed in range(config.seeds):
                made.runs[name, variant.title, seed] = _runs(
                    made, stages, variant, seed, scenes, encoder=about, student=config.students or not about
                )
    return made


def _runs(
    made: AblationSteps,
    stages: Stages,
    variant: Variant,
    seed: int,
    scenes: Path | None,
    *,
    encoder: bool,
    student: bool,
) -> dict[str, str]:
    """The steps of a variant. Their names tell all that differs from the base, so equal ones are the same step."""
    scale = stages.scale
    base = {**FIXED, "num_codes": scale.num_codes, "early_layer": scale.early_layer, "masked": scale.masked}
    if scale.model != "none":
        base |= {**vars(TOKENIZER[scale.model]), **vars(PRETRAIN[scale.model])}
    given, own = (
        {key: value for key, value in options.items() if base.get(key) != value}
        for options in (variant.tokenizer, variant.pretrain)
    )
    of_tokenizer, whole = _slug(given), _slug(given) + _slug(own)
    tokenizer = made.add(stages.tokenizer(f"seed{seed}/tokenizer{of_tokenizer}", seed, **given))
    runs = {"tokenizer": tokenizer}
    if encoder:
        runs["quality"] = made.add(stages.quality(f"seed{seed}/quality{of_tokenizer}", tokenizer))
        runs["encoder"] = made.add(stages.probe(f"seed{seed}/encoder{of_tokenizer}", tokenizer, seed))
    if student:
        if "masked" in own:
            own["num_masked"] = scale.patches(own.pop("masked"))
        runs["pretrain"] = made.add(stages.pretrain(f"seed{seed}/pretrain{whole}", tokenizer, seed, **own))
        runs["probe"] = made.add(stages.probe(f"seed{seed}/probe{whole}", runs["pretrain"], seed))
        runs["finetune"] = made.add(stages.finetune(f"seed{seed}/finetune{whole}", runs["pretrain"], seed))
        if scenes is not None:
            at = scenes.resolve(), runs["pretrain"], seed
            runs["segment"] = made.add(stages.segment(f"seed{seed}/segment{whole}", *at))
    return runs


def _slug(options: Options) -> str:
    return "".join(f"-{key}_{value}" for key, value in sorted(options.items()))


def ablation_table(name: str, made: AblationSteps, config: AblateConfig) -> Table:
    """What the steps of an ablation have left, by variant."""
    table: Table = {}
    for variant in ablations(config.model)[name].variants:
        row = table.setdefault(variant.title, {})
        for seed in range(config.seeds):
            runs = made.runs[name, variant.title, seed]
            found = {kind: step_result(config.out, step) for kind, step in runs.items()}
            numbers: dict[str, float] = {}
            if (quality := found.get("quality")) is not None:
                numbers |= {key: quality[key] for key in OF_TOKENIZERS}
            if (encoder := found.get("encoder")) is not None:
                numbers |= {f"encoder_{key}": value for key, value in probe_numbers(encoder).items()}
            if (student := found.get("probe")) is not None:
                numbers |= probe_numbers(student)
            if (tuned := found.get("finetune")) is not None:
                numbers["finetune"] = tuned["weights"]["top1"]
            if (segmented := found.get("segment")) is not None:
                numbers["segment"] = segmented["weights"]["miou"]
            for key, value in numbers.items():
                row.setdefault(key, []).append(value)
    return table


def write_ablations(
    names: Sequence[str], made: AblationSteps, config: AblateConfig, started: float, before: dict[str, Any]
) -> None:
    """results.json, in which other ablations stay, and a table and a plot of each of these."""
    config.out.mkdir(parents=True, exist_ok=True)
    file = config.out / "results.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    for name in names:
        table, title = ablation_table(name, made, config), ablations(config.model)[name].title
        used = {step for key, runs in made.runs.items() if key[0] == name for step in runs.values()}
        seconds, cpu = times(config.out, [made.steps[step] for step in used])
        columns = [c for c in RESULT_COLUMNS if any(row.get(c.key) for row in table.values())]
        text = markdown(title, table, columns) if columns else f"{name}: nothing is done yet\n"
        state = {
            "steps_done": sum(is_done(config.out, made.steps[step]) for step in used),
            "last_call_seconds": round(time.monotonic() - started, 1),
            "machine": [before, machine()],
            "config": {f.name: str(getattr(config, f.name)) for f in dataclasses.fields(config)},
        }
        if config.show and name in content:  # nothing ran now
            state = {key: content[name][key] for key in state}
        content[name] = {
            "title": title,
            "rows": table,
            "seeds": config.seeds,
            "steps": len(used),
            "step_seconds": round(seconds, 1),  # with those that other ablations share
            "cpu_seconds": round(cpu, 1),
            **state,
        }
        write_atomically(config.out / f"{name}.md", text)
        if columns:
            plot(table, columns, config.out / f"{name}.png", title=title)
        print(text)
    write_atomically(file, json.dumps(content, indent=1) + "\n")


def listing(model: str = "none") -> str:
    lines = []
    for name, ablation in ablations(model).items():
        lines.append(f"{name:<18}{ablation.title}: {'; '.join(v.title for v in ablation.variants)}")
    return "\n".join(lines)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names of ablations, options): the names come first."""
    argv = list(argv)
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names = list(ABLATIONS) if argv[:first] == ["all"] else argv[:first]
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown:
        raise UserError(f"there is no ablation {', '.join(unknown)}. There are:\n{listing()}")
    return list(dict.fromkeys(names)), argv[first:]


def main(argv: Sequence[str] | None = None) -> int:
    names, options = split(sys.argv[1:] if argv is None else argv)
    config, _ = parse(AblateConfig, {"base": BASE}, options)
    if not names:
        print(f"{listing(config.model)}\n\npython -m beitv2_fast.train.experiments.ablate [NAME ... or all] [options]")
        return 0
    started, before = time.monotonic(), machine()
    scenes = None if str(config.scenes) == "none" else unpacked(config.scenes, config.out / "scenes", not config.show)
    made = plan(names, config, unpacked(config.images, config.out / "images", not config.show), scenes)
    code = 0
    if not config.show:
        code = run_steps(list(made.steps.values()), config.out, jobs=config.steps_at_once).code
    write_ablations(names, made, config, started, before)
    return code


if __name__ == "__main__":
    run_main(main)
