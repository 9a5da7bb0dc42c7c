"""``beitv2-fast convert``: a file of weights into another format."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..weights import Weights, convert
from ..weights.create import model_config
from ..weights.files import METADATA, WEIGHT_SUFFIXES, read, write
from ..weights.pretrained import write_pretrained
from ..weights.shapes import flatten


def convert_file(
    path: str | Path, out: str | Path, target: str, *, source: str | None = None, model: str | None = None,
    force: bool = False,
) -> tuple[str, Weights]:  # fmt: skip
    """Read weights, convert them, write them: the command ``beitv2-fast convert``.

    Args:
        path, out: see ``read`` and ``write``; for beitv2_fast a name without a suffix is a ``save_pretrained`` folder.
        target, source: see ``convert``.
        model: a name of ``create_model``, for what neither the weights nor their file tell (heads without bias tables,
            eps).

    Returns:
        the format that was read, and the weights as written.
    """
    loaded = read(path, source)
    state = convert(loaded.weights, target, loaded.format)
    hints = flatten(model_config(model)) if model else {}
    config = None
    if target in (METADATA, "transformers"):
        try:
            config = loaded.config(**hints)
        except CheckpointError:  # a file of only weights is written without
            if Path(out).suffix not in WEIGHT_SUFFIXES:
                raise
    if config is not None and target == METADATA and Path(out).suffix not in WEIGHT_SUFFIXES:
        write_pretrained(out, state, config, path, force=force)
    else:
        write(out, state, target, config, force=force)
    return loaded.format, state
