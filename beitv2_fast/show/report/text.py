"""The words of the report: what each picture shows, and what the numbers say, flattering or not."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...config.options import to_json
from ..codes import CodeUsage
from . import downstream
from .downstream import Draw, Row
from .findings import Findings
from .page import Figure, Section, details, note, number_tile, paragraph, results_table, sampling_error, table
from .stages import Stage

TITLE = "BEiT v2: what was learned"


def introduction(found: Findings) -> list[str]:
    codes = f"one of {found.usage.num_codes:,} codes" if found.usage else "one of a set of codes"
    return [
        paragraph(
            f"Two trainings without labels. A tokenizer gives every patch of a photograph {codes}, chosen so that a "
            "teacher network's features can be rebuilt from the codes. A student then sees photographs with patches "
            "hidden, and learns to name the hidden patches' codes. A linear probe asks what that was worth."
        )
    ]


def tiles(found: Findings) -> list[str]:
    result = []
    own, untrained = (_best(found.results, kind) for kind in ("pre-trained", "untrained"))
    if own and found.results:
        remark = f"untrained backbone: {untrained['mean']:.3f}" if untrained else own["features"]
        metric = found.results.get("metric", "score")
        result.append(number_tile(f"Probe, {metric}", f"{own['mean']:.3f}", remark))
    if found.tokenizer.metrics and "rec_loss" in found.tokenizer.metrics[-1]:
        similarity = 1 - found.tokenizer.metrics[-1]["rec_loss"]
        result.append(number_tile("Similarity to the teacher", f"{similarity:.3f}", "cosine, 1 is perfect, last steps"))
    if found.usage:
        usage = found.usage
        remark = f"perplexity {usage.perplexity:.1f}: as varied as that many equally frequent codes"
        result.append(number_tile("Codes used", f"{usage.used:,} of {usage.num_codes:,}", remark))
    if found.guesses and (hidden := found.hidden_usage):
        where, guess = "held-out" if found.held_out else "training", hidden.shares.max()
        remark = f"{where} photographs; {guess:.1%} by always naming the most frequent"
        right = next(iter(found.guesses.right.values()))[0]
        result.append(number_tile("Hidden codes named right", f"{right:.1%}", remark))
    return result


def sections(found: Findings, pictures: Mapping[str, Figure], shown: Mapping[str, int]) -> list[Section]:
    """pictures by name; shown: how many codes the sheet holds, and how many of these are the most frequent."""

    def figure(name: str, caption: str) -> list[str]:
        return [pictures[name].html(caption)] if name in pictures else []

    compared = figure("compared", "Whatever the logs of these runs have, each run a curve of its folder's name.")
    after = downstream.body(found.downstream, figure)
    return [
        Section("probe", "What the probe found", _probe(found)),
        *([Section("downstream", "Fine-tuning and evaluation", after)] if after else []),
        Section("tokenizer", "Tokenizer", _tokenizer(found, figure)),
        Section("codebook", "Codebook", _codebook(found, figure)),
        Section("maps", "Token maps", _maps(found, figure)),
        Section("similarity", "What the codes keep of the teacher", _similarity(found, figure)),
        Section("codes", "What the codes mean", _codes(found, figure, shown)),
        Section("pretraining", "Pre-training", _pretraining(found, figure)),
        Section("masks", "Hidden and guessed", _masks(found, figure)),
        Section("attention", "What a patch attends to", _attention(found, figure)),
        *([Section("compared", "Runs compared", compared)] if compared else []),
        Section("how", "How it was made", _how(found)),
    ]


def _probe(found: Findings) -> list[str]:
    results = found.results
    if results is None:
        return [note(found.no_results or "The probe has not been run yet.")]
    images = results.get("images", {})
    counts = ", ".join(f"{count:,} {split}" for split, count in images.items())
    lines = [
        paragraph(
            f"A linear classifier on frozen features, {results.get('metric', 'score')}, and their nearest neighbors by "
            f"cosine (temperature 0.07), {results.get('metric_of_knn_and_few_shot', 'balanced accuracy')}; "
            f"{results.get('task', '')}. Mean ± standard deviation over {results.get('seeds', '?')} seeds"
            + (f"; images: {counts}." if counts else ".")
            + (f" The largest class has {results['majority']:.1%} of the test images." if "majority" in results else "")
            + "".join(f" {sentence}" for sentence in sampling_error(results))
        ),
        results_table(results),
    ]
    lines += [paragraph(sentence) for sentence in verdict(results)]
    lines += downstream.probe_details(results)
    return lines + [paragraph(str(text), "muted") for text in results.get("notes", [])]


def verdict(results: Row) -> list[str]:
    """In a sentence: is the pre-trained backbone above the untrained one, the pixels and the teacher?"""
    own = _best(results, "pre-trained")
    if own is None:
        return []
    parts = []
    for kind, name in (("untrained", "the untrained backbone"), ("pixels", "raw pixels"), ("teacher", "the teacher")):
        other = _best(results, kind)
        if other is None:
            continue
        gap = own["mean"] - other["mean"]
        noise = max((own["std"] ** 2 + other["std"] ** 2) ** 0.5, results.get("error", 0.0))
        word = "about as good as" if abs(gap) <= noise else f"{abs(gap):.3f} {'above' if gap > 0 else 'below'}"
        parts.append(f"{word} {name} ({other['mean']:.3f})")
    if not parts:
        return []
    return [f"The pre-trained backbone's better feature ({own['mean']:.3f}) is {_listed(parts)}."]


def _tokenizer(found: Findings, figure: Draw) -> list[str]:
    stage = found.tokenizer
    teacher = f" {stage.config.teacher}" if stage.config else ""
    return [
        *_state(stage),
        *figure(
            "tokenizer",
            f"Left: how well the decoder rebuilds the features of the teacher{teacher} from the codes, as the cosine "
            "between the two, averaged over patches. Middle: the whole loss, and its part that pulls the encoder's "
            "vectors towards their codes. Every point is the mean of the steps since the one before it.",
        ),
    ]


def _codebook(found: Findings, figure: Draw) -> list[str]:
    caption = (
        "Left: the share of codes that were chosen at least once between two points of the curve. "
        "Middle: perplexity of their frequencies."
    )
    if found.usage is None:
        return [*_state(found.tokenizer), *figure("codebook", caption)]
    usage = found.usage
    patches = int(usage.counts.sum())
    whole = "" if len(found.images) == found.total_images else f" of {found.total_images:,}"
    sentence = (
        f"Codes of the {patches:,} patches of {len(found.images):,}{whole} training photographs, whole center squares. "
        "Perplexity is the number of equally frequent codes that would be as varied: the larger, the more the codebook "
        "tells apart."
    )
    return [
        paragraph(sentence),
        table(*usage_table(usage)),
        *figure("codebook", caption + " Right: share of all patches that each code has, most frequent first."),
    ]


def usage_table(usage: CodeUsage) -> tuple[list[str], list[list[str]]]:
    head = ["", "codes", "of the codebook"]
    rows = [
        ("in use", usage.used, "{:,.0f}"),
        ("perplexity", usage.perplexity, "{:,.1f}"),
        ("cover half of all patches", usage.covering(0.5), "{:,.0f}"),
        ("cover 90 % of all patches", usage.covering(0.9), "{:,.0f}"),
    ]
    body = [[name, form.format(value), f"{value / usage.num_codes:.1%}"] for name, value, form in rows]
    return head, body


def _maps(found: Findings, figure: Draw) -> list[str]:
    if found.codes is None:
        return _state(found.tokenizer)
    return figure(
        "token_maps",
        "Each square of a token map is a patch, its color the patch's code, the same in every picture of this report. "
        "Codes that lie close together in the codebook have similar colors (hue and lightness follow the "
        "codebook's principal components). Where the map follows the shapes of the photograph, the codes "
        f"carry its content. {_unseen(found)}",
    )


def _similarity(found: Findings, figure: Draw) -> list[str]:
    if found.codes is None:
        return _state(found.tokenizer)
    if found.teacher is None:
        return [note(found.no_teacher or "The teacher has not been loaded, as asked.")]
    return figure(
        "similarity",
        "For every patch the cosine between the teacher's feature and what the decoder rebuilds from only the codes: "
        f"dark 0, bright 1. Above each photograph the mean. {_unseen(found)}",
    )


def _codes(found: Findings, figure: Draw, shown: Mapping[str, int]) -> list[str]:
    if found.codes is None:
        return _state(found.tokenizer)
    top, rest = shown["top"], shown["all"] - shown["top"]
    which = f"the {top} most frequent codes" if rest else f"all {top} codes in use"
    which += f", then {rest} others at even distances down the ranking" if rest else ""
    return figure(
        "codes",
        f"A row is a code: {which}. The framed square is the patch that has the code; around it is what "
        "surrounds it (the tokenizer reads the whole photograph, so the surroundings count too). Patches are drawn at "
        "random, from as many photographs as possible. A row whose squares have something in common is a code that "
        "means something. The colored square is the code's color in the token maps.",
    )


def _pretraining(found: Findings, figure: Draw) -> list[str]:
    lines = [
        *_state(found.pretrain),
        *figure(
            "pretraining",
            "The student is asked for the codes of hidden patches twice: from its last layer, and from the aggregation "
            "branch, which sees an earlier layer's patches and the last layer's global token only. Dashed: what a "
            "guess gains that knows how frequent each code is and nothing of the photograph.",
        ),
    ]
    if knn := [line for line in found.pretrain.evaluation if "knn_cls_10" in line]:
        head = ["10 nearest neighbors, top-1, after step", "CLS token", "mean of patches"]
        shown = [knn[i * (len(knn) - 1) // 4] for i in range(5)] if len(knn) > 5 else knn
        rows = [[f"{line['step']:,}", f"{line['knn_cls_10']:.1%}", f"{line['knn_mean_10']:.1%}"] for line in shown]
        lines.append(table(head, rows))
    if found.guesses and (hidden := found.hidden_usage):
        head = ["hidden patches whose code is ...", "first guess", "among first five"]
        rows = [[branch, f"{top1:.1%}", f"{top5:.1%}"] for branch, (top1, top5) in found.guesses.right.items()]
        best = hidden.shares.sort(descending=True).values
        rows.append(["the most frequent codes, without looking", f"{best[0]:.1%}", f"{best[:5].sum():.1%}"])
        which = "which the trainings have not seen" if found.held_out else "which the trainings have seen"
        lines += [
            paragraph(f"At the end, on {len(found.shown):,} photographs {which}, cropped and masked as in training:"),
            table(head, rows, own=len(found.guesses.right)),
        ]
    return lines


def _masks(found: Findings, figure: Draw) -> list[str]:
    if found.guesses is None:
        return _state(found.pretrain) or _state(found.tokenizer)
    return figure(
        "masks",
        "Blocks of patches are hidden (blue) from the student. Third column: the tokenizer's codes of the hidden "
        "patches, which it is asked for; last column: the guesses of its last layer, a white dot where right. Similar "
        f"colors are codes that lie close together, so a wrong guess may still be a near one. {_unseen(found)}",
    )


def _attention(found: Findings, figure: Draw) -> list[str]:
    if found.guesses is None:
        return _state(found.pretrain) or _state(found.tokenizer)
    return figure(
        "attention",
        "The attention of the framed patch to all patches in the student's last layer, which saw the whole photograph: "
        "the mean of the heads, and each head by itself, scaled to its largest value. Below, the fewest patches that "
        "hold 60 % of it. Other patches, layers and photographs: `beitv2-fast picture attention` and "
        f"`beitv2-fast explore`. {_unseen(found)}",
    ) + figure(
        "nearest",
        "The same patch, and the patches of other photographs, which the trainings have seen, whose features of the "
        "student are nearest (cosine), at most one of a photograph. The framed square is the patch.",
    )


def _how(found: Findings) -> list[str]:
    lines = []
    if found.starts:
        rows = [
            [name, f"{sum(s.minutes for s in starts):.1f}", str(len(starts))] for name, starts in found.starts.items()
        ]
        told = [f"{name}, by {s.what}\n{s.command}\n" for name, starts in found.starts.items() for s in starts]
        lines += [table(["stage", "minutes", "starts"], rows), details("Commands, versions, machines", "\n".join(told))]
    for name, stage in (("tokenizer", found.tokenizer), ("pre-training", found.pretrain)):
        if stage.config is not None and stage.own_options:
            lines.append(details(f"Options of the {name}", _options(to_json(stage.config))))
    readme = next((f for name in ("README.md", "LICENSE") if (f := found.data / name).is_file()), None)
    if readme is not None:
        text = readme.read_text(encoding="utf-8", errors="replace")
        lines.append(details("Source and license of the photographs", text, opened=True))
    return lines or [paragraph("No run folder has a config yet.")]


def _options(values: Row) -> str:
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {json.dumps(value)}" for name, value in values.items())


def _state(stage: Stage) -> list[str]:
    """What is missing of a training, or how far it has come."""
    if stage.problem is not None:
        return [note(stage.problem)]
    if stage.unfinished:
        return [note(f"This training has not finished: {stage.unfinished}. What follows is from its last checkpoint.")]
    return []


def _unseen(found: Findings) -> str:
    return "The trainings have not seen these photographs." if found.held_out else ""


def _best(results: Row | None, kind: str) -> Row | None:
    rows = [row for row in (results or {}).get("rows", []) if str(row["features"]).startswith(kind)]
    return max(rows, key=lambda row: row["mean"], default=None)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
