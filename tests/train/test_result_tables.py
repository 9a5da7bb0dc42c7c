"""Tables and plots of results with several seeds."""

from __future__ import annotations

import pytest
from PIL import Image

from beitv2_fast.train.experiments.tables import Column, cell, deviation, markdown, ordering, plot

SHARE, COUNT = Column("share", "right"), Column("count", "codes", percent=False, digits=0)
TABLE = {
    "one": {"share": [0.5, 0.6, 0.7], "count": [10.0]},
    "two": {"share": [0.4, 0.4, 0.4], "count": [12.0, 14.0]},
    "three": {"share": [0.55, 0.7, 0.55]},
}


def test_a_cell_is_the_mean_and_the_deviation_over_seeds():
    assert deviation([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert cell([0.5, 0.6, 0.7], SHARE) == "60.0 ± 10.0"
    assert cell([0.5], SHARE) == "50.0"
    assert cell([], SHARE) == "—"


def test_the_table_has_one_line_per_row_and_a_dash_where_nothing_was_measured():
    assert markdown("network", TABLE, [SHARE, COUNT]).splitlines() == [
        "| network | right, % | codes |",
        "|---|---|---|",
        "| one | 60.0 ± 10.0 | 10 |",
        "| two | 40.0 ± 0.0 | 13 ± 1 |",
        "| three | 60.0 ± 8.7 | — |",
    ]


def test_an_ordering_says_no_where_it_is_the_other_way_round_and_when_the_seeds_differ_more():
    assert ordering(TABLE, "one", "two", SHARE) == "yes: 60.0 against 40.0"
    assert ordering(TABLE, "two", "one", SHARE) == "NO: 40.0 against 60.0"
    assert ordering(TABLE, "three", "one", SHARE) == "NO: 60.0 against 60.0, within the seeds’ deviation"
    assert ordering(TABLE, "one", "two", COUNT) == "NO: 10 against 13 (one seed)"
    assert ordering(TABLE, "three", "two", COUNT) == "not measured"


def test_the_plot_shows_every_row_and_leaves_empty_columns_out(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: demo)")
    plot(TABLE, [SHARE, COUNT, Column("none", "nothing")], tmp_path / "plot.png", title="three networks", scale=1)
    with_two = Image.open(tmp_path / "plot.png").convert("RGB")
    assert with_two.width == 1080 and len(with_two.getcolors(1 << 20)) > 10
    plot(TABLE, [SHARE, COUNT], tmp_path / "aside.png", title="three networks", aside=["one"], scale=1)
    assert Image.open(tmp_path / "aside.png").convert("RGB").tobytes() != with_two.tobytes()
    plot({name: row for name, row in TABLE.items() if name != "two"}, [SHARE], tmp_path / "less.png", scale=1)
    assert Image.open(tmp_path / "less.png").height < with_two.height
