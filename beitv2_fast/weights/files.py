"""Weights in files and folders: read in any format, written so that a crash leaves the old file or the new one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.downstream import FinetuneConfig
from ..config.options import from_json
from ..config.training import PretrainConfig, TokenizerConfig, TrainConfig
from ..errors import CheckpointError, UserError, require
from ..models.vit import ViTConfig
from ..runs.checkpoints import read_weights, save_weights
from ..runs.files import atomically, check_no_folder
from ..runs.folder import CONFIG, is_run_folder, stored_config
from ..runs.sources import locate
from . import Weights, convert, detect, without_wrapping
from .build import load_run_model
from .shapes import ModelConfig, describe, describe_backbone, flatten
from .transformers_config import from_transformers, preprocessor, to_transformers

METADATA = "beitv2_fast"  # key of the config in our files' metadata
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
# in a folder of transformers, the first that is there; the second of each pair: of a variant, such as fp16
FOLDER_WEIGHTS = (
    ("model.safetensors", r"model\.\w+\.safetensors"),
    ("model.safetensors.index.json", r"model\.safetensors\.index\.\w+\.json"),
    ("pytorch_model.bin", r"pytorch_model\.\w+\.bin"),
    ("pytorch_model.bin.index.json", r"pytorch_model\.bin\.index\.\w+\.json"),
)


@dataclass(frozen=True)
class Loaded:
    """weights: as stored, under the model's own names. format: one of ``FORMATS``. known: values of the config that
    shapes do not tell."""

    weights: Weights
    format: str
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> Weights:
        return convert(self.weights, "beitv2_fast", self.format)

    def config(self, **known: Any) -> ModelConfig:
        return describe(self.ours, {**known, **self.known})

    def backbone(self, **known: Any) -> ViTConfig:
        """Of a model that something else starts from, which may lack its head."""
        return describe_backbone(self.ours, {**known, **self.known})


def read(path: str | Path, source: str | None = None) -> Loaded:
    """Read weights of any format.

    Args:
        path: a .safetensors, .pth, .pt or .bin file, or the .index.json of one in pieces; a run folder of this package
            (its newest checkpoint); a folder of transformers, timm or ``save_pretrained`` (config.json and weights, of
            whichever variant); a published name, a URL or ``hf-hub:ORGANIZATION/NAME``: see ``runs.sources``.
        source: the format; None: recognized.

    Raises:
        CheckpointError: there is nothing there, or nothing that can be read as such.
    """
    named, path = path, locate(path)
    if path.is_dir():
        return _read_folder(path, source)
    if not path.exists():
        raise CheckpointError(
            f"there is no checkpoint file {named}. Name a run folder, a file, a URL, hf-hub:ORGANIZATION/NAME, or a "
            "name that `beitv2-fast models` lists."
        )
    state = _read_pieces(path) if path.suffix == ".json" else read_weights(path)
    weights = Weights(without_wrapping(state), _read_extras(_extras_file(path)))
    return Loaded(weights, source or detect(weights), _metadata(path))


def write(
    path: str | Path,
    state: Mapping[str, Tensor],
    target: str,
    config: ModelConfig | None = None,
    *,
    force: bool = False,
) -> None:
    """Write weights that ``convert`` made.

    Args:
        path: NAME.safetensors; NAME.pth or NAME.pt (a dict with the weights under "model", as the published files); for
            "transformers" also a folder, which gets config.json and preprocessor_config.json, for from_pretrained.
        state: under the names of ``target``. Its ``extras``, if there are any, are written to NAME.extras.safetensors
            next to it, or extras.safetensors in the folder; ``read`` finds them there.
        config: of the model: needed for a folder; in files of ours it says what shapes do not.
        force: replace what is there.

    Raises:
        UserError: something is there already, or the name has no suffix that says what to write.
    """
    path, extras = Path(path), dict(getattr(state, "extras", {}))
    folder = target == "transformers" and path.suffix not in WEIGHT_SUFFIXES
    if not folder and path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{path} should end in .safetensors (or .pth), so that it is clear what to write.")
    if not folder:
        check_no_folder(path)
    elif path.exists() and not _is_of_transformers(path):
        raise UserError(f"{path} exists and is no folder of a model for transformers. Name another one.")
    if path.exists() and not force:
        raise UserError(f"{path} exists. Name another one, or give --force (force=True) to replace it.")
    if folder and config is None:
        raise UserError(f"a folder for transformers ({path}) needs the model's config.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder and config is not None:
        atomically(path, lambda temporary: _write_folder(temporary, state, extras, config))
        return
    side = _extras_file(path)
    if extras:
        atomically(side, lambda temporary: save_weights(extras, temporary))
    else:
        side.unlink(missing_ok=True)
    metadata = (
        {METADATA: json.dumps(flatten(config))} if target == METADATA and config is not None else {"format": "pt"}
    )
    if path.suffix == ".safetensors":
        atomically(path, lambda temporary: save_weights(state, temporary, metadata))
    else:
        atomically(path, lambda temporary: torch.save({"model": dict(state)}, temporary))


def _is_of_transformers(path: Path) -> bool:
    """Whether it is a model's folder; run folders have a config.json too."""
    return (path / CONFIG).is_file() and stored_config(path).get("model_type") is not None


def _read_folder(path: Path, source: str | None) -> Loaded:
    values = stored_config(path)
    if is_run_folder(path):
        model = load_run_model(path)[0]
        return Loaded(Weights(model.state_dict()), "beitv2_fast", flatten(model.config))
    if values.get("model_type") == METADATA:  # of save_pretrained
        known = values["config"] if isinstance(values.get("config"), dict) else {}
    else:  # timm's has no values that shapes do not tell
        known = {} if "architecture" in values else from_transformers(path / CONFIG)
    found = _folder_weights(path)
    state = _read_pieces(found) if found.suffix == ".json" else read_weights(found)
    weights = Weights(without_wrapping(state), _read_extras(path / "extras.safetensors"))
    return Loaded(weights, source or detect(weights), known)


def read_training(path: Path) -> TrainConfig | None:
    """The config of the training behind a folder of ``save_pretrained``; None: it says none of this version."""
    values: Any = stored_config(path).get("training")
    configs = {config.stage: config for config in (TokenizerConfig, PretrainConfig, FinetuneConfig)}
    try:
        return from_json(configs[values["stage"]], values)
    except (TypeError, ValueError, KeyError):
        return None


def _folder_weights(path: Path) -> Path:
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    plain = [name for name, _ in FOLDER_WEIGHTS if name in names]
    variants = [name for _, pattern in FOLDER_WEIGHTS for name in names if re.fullmatch(pattern, name)]
    if not plain and len(variants) > 1:
        raise CheckpointError(f"{path} has several variants of the weights: {', '.join(variants)}. Name one of them.")
    if not plain + variants:
        wanted = ", ".join(name for name, _ in FOLDER_WEIGHTS)
        raise CheckpointError(f"{path} has none of {wanted}. Name a folder with weights in it.")
    return path / (plain + variants)[0]


def _read_pieces(index: Path) -> dict[str, Tensor]:
    """The files that an index of transformers lists; names that lead out of the folder are refused."""
    if not index.is_file():
        raise CheckpointError(f"there is no checkpoint file {index}")
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of weights in pieces: it has no weight_map.") from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} lists {name!r}, which is not the name of a file in its folder.")
        state.update(read_weights(index.parent / name))
    missing = sorted(places.keys() - state.keys())
    if missing:
        raise CheckpointError(
            f"{index} lists {', '.join(missing[:8])}, which its files do not have: they are not whole."
        )
    return state


def _read_extras(path: Path) -> dict[str, Tensor]:
    return read_weights(path) if path.is_file() else {}


def _extras_file(path: Path) -> Path:
    return path.with_suffix(".extras.safetensors")


def _metadata(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {}
    with require("safetensors", "train", "Reading a checkpoint").safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    try:
        values = json.loads(text) if text else {}
    except ValueError:
        values = {}
    return values if isinstance(values, dict) else {}


def _write_folder(path: Path, state: Mapping[str, Tensor], extras: dict[str, Tensor], config: ModelConfig) -> None:
    path.mkdir()
    save_weights(state, path / "model.safetensors", {"format": "pt"})
    if extras:
        save_weights(extras, path / "extras.safetensors")
    for name, values in ((CONFIG, to_transformers(config)), ("preprocessor_config.json", preprocessor(config))):
        (path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
