"""The calculation of bench.zero_cost against what two ranks hold and send under the settings of train/configs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.zero_cost import STAGES, zero_cost

from ..support.training import ENVIRONMENT, ROOT
from ..training.test_distributed import settings

RANKS = 2
SLACK = 1_000  # bytes: norms, flags, alignment


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict[str, float]]:
    """What tests/support/zero_meter.py counted, by "zeroSTAGE xACCUMULATE"."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    (folder / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    files = [folder / "zero0.json", *(settings(f"zero{stage}", folder)[1] for stage in STAGES[1:])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += [str(ROOT / "tests" / "support" / "zero_meter.py"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS ")[1].splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_calculation_is_what_two_ranks_hold_and_send(measured, stage, accumulate):
    counted = measured[f"zero{stage} x{accumulate}"]
    expected = zero_cost(int(counted["parameters"]), stage, RANKS, accumulate)
    assert counted["parameters"] * 4 > 50 * SLACK
    for name in ("weights", "gradients", "moments", "master", "sent"):
        assert counted[name] == pytest.approx(getattr(expected, name), abs=SLACK), name


def test_more_ranks_hold_less_and_never_more():
    for stage in STAGES:
        peaks = [zero_cost(10**6, stage, ranks).peak for ranks in (2, 8, 64)]
        assert peaks == sorted(peaks, reverse=True)
