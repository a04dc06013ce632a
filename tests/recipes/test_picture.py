"""The README's picture shows the ledger's runs."""

from __future__ import annotations

from statistics import mean

import make_picture
import pytest
from make_picture import JOBS, MEASURES, PICTURES

from amp_plugin.report.style import shows


def test_every_run_is_a_point_and_the_bar_their_mean() -> None:
    pytest.importorskip("matplotlib", reason="draws")
    data = make_picture.points()
    axes = make_picture.draw(data, "light").axes
    assert len(axes) == len(MEASURES)
    expected = [data[job, optim, "eval_nll"] for job in JOBS for optim in ("sgd", "amp")]
    lines = axes[1].get_lines()
    assert [list(line.get_xdata()) for line in lines[::2]] == expected
    assert [line.get_xdata()[0] for line in lines[1::2]] == [mean(values) for values in expected]


def test_the_pictures_are_of_the_ledger_as_it_is() -> None:
    for path in PICTURES.values():
        assert shows(path, make_picture.listed(make_picture.points())), "run recipes/make_picture.py"
        assert path.stat().st_size < 200_000
