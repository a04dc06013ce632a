"""The ladder's table and picture: they show the ledger's runs, and the page shows the ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import epsilon_ladder
import pytest
from epsilon_ladder import best, draw, found_in, rungs, table
from guides.page import read_part
from tiny_scale import run_of

from amp_plugin.report.style import shows

LEDGER, PAGE = (epsilon_ladder.HERE / name for name in ("ledger.jsonl", "guides/CHOOSING_EPSILON.md"))
NLLS = {0.0: 2.5, 0.5: 2.0, 1.0: 1.5, 2.0: 1.75, 4.0: 3.0}  # by strength


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """All runs of a rung, those of another but one, and on the test images one that does not count."""
    path = tmp_path / "ledger.jsonl"
    runs: list[dict[str, Any]] = []
    for name, factor in (("base", 1), ("width 8", 2)):
        scale, cells = rungs()[name]
        for s, nll in list(NLLS.items())[: 5 if name == "base" else 4]:  # the last of the other has not been run
            runs.append(run_of(cells[s], scale, eval_nll=factor * nll, eval_error=20.0 + s, loss=0.5))
    tested = {**runs[0], "settings": {**runs[0]["settings"], "validation_images": None}}
    path.write_text("".join(json.dumps(r) + "\n" for r in [*runs, tested]))
    return path


def test_a_rung_differs_from_the_base_in_one_thing() -> None:
    _, cells = rungs()["base"]
    assert [c.values for c in cells.values()][1:] == [
        {"amp_epsilon": s * 0.2, "amp_inner_lr": s * 0.3} for s in cells if s
    ], "both are multiplied"
    options = {name: cells[0.0].options(scale) for name, (scale, cells) in rungs().items()}
    for name, ours in options.items():
        # The learning rate goes with the batch size, and bf16 is as accurate.
        differing = {key for key in ours if ours[key] != options["base"].get(key)} - {"learning_rate", "bf16"}
        assert len(differing) == (name != "base"), name
    assert options["batch 100"]["learning_rate"] == 2 * options["base"]["learning_rate"]


def test_rows_are_the_runs_of_a_rung_and_the_lowest_is_bold(ledger: Path) -> None:
    found = found_in(ledger)
    assert {name: len(runs) for name, runs in found.items()} == {"base": 5, "width 8": 4}
    assert best(found["base"], "eval_nll") == 1.0
    lines = table(found).splitlines()
    assert lines[2:9] == [
        "| base | ERM | - | 2.500 | **20.00** | 0.500 |",
        "| base | 0.1 | 0.15 | 2.000 | 20.50 | 0.500 |",
        "| base | 0.2 | 0.3 | **1.500** | 21.00 | 0.500 |",
        "| base | 0.4 | 0.6 | 1.750 | 22.00 | 0.500 |",
        "| base | 0.8 | 1.2 | 3.000 | 24.00 | 0.500 |",
        "| width 8 | ERM | - | 5.000 | 20.00 | 0.500 |",
        "| width 8 | 0.1 | 0.15 | 4.000 | 20.50 | 0.500 |",
    ]


def test_the_picture_has_the_runs(ledger: Path, tmp_path: Path, drawn: list[Any]) -> None:
    draw(found_in(ledger), tmp_path / "picture.png")
    amp, erm = drawn[0].axes[1].get_lines()
    assert (list(amp.get_xdata()), list(amp.get_ydata())) == ([0.5, 1.0, 2.0], [4.0, 3.0, 3.5])
    assert list(erm.get_ydata()) == [5.0, 5.0]


def test_the_script_puts_both_into_a_page(ledger: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    page = tmp_path / "page.md"
    shutil.copy(PAGE, page)
    epsilon_ladder.main(["--table", "--ledger", str(ledger), "--page", str(page)])
    found = found_in(ledger)
    assert (
        read_part(page, epsilon_ladder.MARK) == f"![{epsilon_ladder.ALT}]({epsilon_ladder.PICTURE})\n\n{table(found)}"
    )
    assert shows(tmp_path / epsilon_ladder.PICTURE, table(found))
    before = page.read_text()
    with pytest.raises(ValueError, match=r"no\.jsonl has no runs of the ladder"):
        epsilon_ladder.main(["--table", "--ledger", str(tmp_path / "no.jsonl"), "--page", str(page)])
    assert page.read_text() == before
    with pytest.raises(ValueError, match="--rungs width 9: there are base, width 8"):
        epsilon_ladder.main(["--rungs", "width 9"])


def test_the_guide_shows_the_ledger() -> None:
    found = found_in(LEDGER)
    assert (
        read_part(PAGE, epsilon_ladder.MARK) == f"![{epsilon_ladder.ALT}]({epsilon_ladder.PICTURE})\n\n{table(found)}"
    )
    assert shows(PAGE.parent / epsilon_ladder.PICTURE, table(found)), "run recipes/epsilon_ladder.py --table"
