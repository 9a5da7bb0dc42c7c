"""Notices codebook collapse while the tokenizer trains: few of the codes are used, for long."""

from __future__ import annotations

ADVICE = (
    "Lower --lr or lengthen --warmup-epochs (features that move faster than the codebook leave it behind); lower "
    "--dead-after, so that idle codes restart sooner; lower --decay; a shallower --decoder-depth or a smaller "
    "--num-codes or --code-dim uses more of the codes. docs/quantizer.md tells what was measured."
)


class CollapseWatch:
    """Warns once for every ``steps`` steps in a row in which less than ``below`` of the codes were used."""

    def __init__(self, below: float, steps: int):
        self.below, self.steps, self.low = below, steps, 0

    def look(self, used: float, steps: int) -> str | None:
        """``used``: the share of the codes that were chosen in the last so many steps. Returns a warning, or None."""
        self.low = self.low + steps if used < self.below else 0
        if self.low < self.steps:
            return None
        count, self.low = self.low, 0
        return (
            f"codebook collapse: in the last lines of the log, {count} steps, less than {self.below:.0%} of the codes "
            f"were used (now {used:.1%}). {ADVICE}"
        )
