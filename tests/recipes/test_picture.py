"""The README's picture shows the ledger's runs."""

from __future__ import annotations

from statistics import mean

import make_picture
import pytest
from make_picture import LEDGER, MEASURES, PICTURES
from repository import ROOT
from reproduction import records
from reproduction.cells import Selection
from reproduction.comparison import paired, reference_of, rows_of
from reproduction.published import methods
from reproduction.scale import read_scale

from amp_plugin.report.style import shows


def test_every_pair_is_a_point_and_the_diamond_their_mean() -> None:
    pytest.importorskip("matplotlib", reason="draws")
    pytest.importorskip("scipy", reason="intervals")
    data = make_picture.differences()
    axes = make_picture.draw(data, "light").axes
    assert len(axes) == len(MEASURES)
    expected = [numbers for (_, measure), numbers in data.items() if measure == "eval_nll"]
    lines = axes[1].get_lines()[1:]  # the first is SGD's, at 0
    assert [list(line.get_xdata()) for line in lines[1::3]] == expected
    assert [line.get_xdata()[0] for line in lines[2::3]] == [mean(numbers) for numbers in expected]
    assert all(
        line.get_xdata()[0] < mean(n) < line.get_xdata()[1] for line, n in zip(lines[::3], expected, strict=True)
    )


def test_differences_are_those_of_pairs() -> None:
    """Where AMP is better they are positive."""
    rows = rows_of(Selection(read_scale("cpu"), datasets=["cifar10"], methods=["amp"]), records.read(LEDGER))
    ((setting, found),) = rows.items()
    erm, amp = reference_of(found), reference_of(found, "amp")
    assert erm is not None
    assert amp is not None
    by_hand = [erm.runs[s]["metrics"]["eval_nll"] - amp.runs[s]["metrics"]["eval_nll"] for s in (1, 2, 3, 4, 5)]
    assert make_picture.differences()[f"{setting.dataset}: amp", "eval_nll"] == by_hand


def test_the_pictures_are_of_the_ledger_as_it_is() -> None:
    for path in PICTURES.values():
        assert shows(path, make_picture.listed(make_picture.differences())), "run recipes/make_picture.py"
        assert path.stat().st_size < 200_000


def test_the_table_of_the_readme_is_the_ledgers() -> None:
    pytest.importorskip("scipy", reason="intervals")
    tables = rows_of(Selection(read_scale("cpu"), methods=list(make_picture.METHODS)), records.read(LEDGER))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method in make_picture.METHODS:
        (line,) = (x for x in readme.splitlines() if x.startswith(f'| `"{methods()[method].ascent}"`'))
        for measure, digits in {"eval_nll": 2, "eval_error": 1}.items():
            found = [paired(reference_of(rows), reference_of(rows, method), measure) for rows in tables.values()]
            words = [f"{f.mean:.{digits}f} [{f.low:.{digits}f}, {f.high:.{digits}f}]" for f in found if f is not None]
            assert f"| {'; '.join(words)} |" in line, f"{measure} of {method}"
