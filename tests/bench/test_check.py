"""The benchmark gate fails where something became slower, and only there."""

from __future__ import annotations

import json

import pytest

from bench import check

COMMITTED = {"search": 0.05, "update": 0.8}


@pytest.mark.parametrize(
    ("measured", "named"),
    (
        ({"search": 0.064, "update": 1.03}, []),  # 1.28 and 1.29 times
        ({"search": 0.01, "update": 0.1}, []),
        ({"search": 0.066, "update": 0.8}, ["search"]),
        ({"search": 0.066, "update": 1.05}, ["search", "update"]),
        ({"search": float("nan"), "update": 0.8}, ["search"]),
        ({"search": 0.05}, ["update"]),
        ({"search": 0.05, "update": 0.8, "head": 0.9}, ["head"]),
    ),
)
def test_what_is_slower_than_its_committed_ratio_allows_is_named(measured, named):
    assert [problem.partition(":")[0] for problem in check.slower(measured, COMMITTED)] == named


@pytest.mark.parametrize(("seconds", "code"), ((1.0, 0), (1.2, 0), (1.4, 1)))
def test_the_gate_ends_with_an_error_where_ours_takes_longer_beside_its_peer(
    tmp_path, monkeypatch, capsys, seconds, code
):
    """By a clock that each call moves on: no time is measured here."""
    now = [0.0]

    def takes(duration):
        def run():
            now[0] += duration

        return run

    monkeypatch.setattr(check, "FILE", tmp_path / "ratios.json")
    monkeypatch.setattr(check.time, "process_time", lambda: now[0])
    monkeypatch.setattr(check, "pairs", lambda: iter([("search", takes(1.0), takes(4.0))]))
    with pytest.raises(SystemExit, match="has no ratios of this processor"):
        check.main([])
    assert check.main(["--write"]) == 0
    assert json.loads(check.FILE.read_text())[check.processor()]["ratios"] == {"search": 0.25}
    monkeypatch.setattr(check, "pairs", lambda: iter([("search", takes(seconds), takes(4.0))]))
    assert check.main([]) == code
    assert ("search: 0.350, 1.40 times the committed 0.250" in capsys.readouterr().out) == bool(code)


def test_the_committed_ratios_name_a_processor_and_are_below_their_peers_times():
    for name, entry in json.loads(check.FILE.read_text()).items():
        assert "AVX" in name or "DEFAULT" in name
        assert len(entry["ratios"]) == 5 and all(0 < ratio < 1.3 for ratio in entry["ratios"].values())
