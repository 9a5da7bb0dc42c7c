"""Each command is served by DALI where it is installed, and on the CPU has the bits that torchvision's loader gives.

Tokenizer training, pre-training, fine-tuning with its evaluation, and probe.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from beitv2_fast.data.views import EvalView, FinetuneView, PretrainView, TokenizerView
from beitv2_fast.downstream.probes import features as probe_features
from beitv2_fast.errors import UserError

from ..support.downstream import results, write_colors
from ..support.training import PRETRAIN, TINY, TOKENIZER, assert_same_bits, call

dali = pytest.importorskip("beitv2_fast.data.dali", reason="DALI is not installed (extra: dali)", exc_type=UserError)
pytestmark = pytest.mark.slow
COMMON = [*TINY, "--epochs", 2]
PROBE = "--preset demo --device cpu --workers 0 --seeds 1 --epochs 2 --shots 1".split()
LOADERS = ("torchvision", "dali")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, set[type]]]:
    """Run folders STAGE_LOADER, and the views that DALI served each stage."""
    root, served = tmp_path_factory.mktemp("commands"), {}
    data = root / "data"
    for split, count in (("train", 4), ("val", 3), ("test", 3)):
        write_colors(data / split, count)
    student = ["--weights", root / "pretrain_torchvision"]
    tokenizer = ["--tokenizer", root / "tokenizer_torchvision"]
    stages = {
        "tokenizer": [*COMMON, *TOKENIZER, "--no-in-memory", "--views", 0],
        "pretrain": [*COMMON, *PRETRAIN, "--no-in-memory", *tokenizer],
        "finetune": [*COMMON, "--no-in-memory", *student],
        "linear_probe": [*PROBE, "--run", root / "pretrain_torchvision", *tokenizer],
    }
    get = dali.DaliBatches.__getitems__
    with pytest.MonkeyPatch.context() as patch:

        def spy(self, keys):
            served.setdefault(stage, set()).add(type(self.dataset.view))
            return get(self, keys)

        patch.setattr(dali.DaliBatches, "__getitems__", spy)
        for stage, options in stages.items():
            for loader in LOADERS:
                given = [*options, "--data", data, "--out", root / f"{stage}_{loader}"]
                if stage != "linear_probe":
                    given += ["--loader", loader]
                elif loader != "dali":  # it has no option: DALI where it is installed
                    patch.setattr(probe_features, "choose_loader", lambda wanted, **_: ("torchvision", ""))
                else:
                    patch.setattr(probe_features, "choose_loader", lambda wanted, **_: ("dali", ""))
                assert call(stage, *given) == 0
    return root, served


def test_dali_serves_every_command_its_view(runs):
    _, served = runs
    assert served == {
        "tokenizer": {TokenizerView, EvalView},
        "pretrain": {PretrainView},
        "finetune": {FinetuneView, EvalView},
        "linear_probe": {EvalView},
    }


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "finetune"])
def test_a_training_ends_with_the_same_bits_whatever_loads(runs, stage):
    root, _ = runs
    assert_same_bits(root / f"{stage}_dali", root / f"{stage}_torchvision")


@pytest.mark.parametrize("stage", ["finetune", "linear_probe"])
def test_an_evaluation_and_a_probe_measure_the_same_whatever_loads(runs, stage):
    root, _ = runs
    one, two = (results(root / f"{stage}_{loader}") for loader in LOADERS)
    assert one == two
