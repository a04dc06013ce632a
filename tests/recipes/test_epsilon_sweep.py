"""The sweep's table and picture: they show the ledger's runs, and the page shows the ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import epsilon_sweep
import pytest
from epsilon_sweep import SGD, Setting, draw, read, table
from guides.page import read_part

from amp_plugin.report.style import shows

LEDGER, PAGE = (epsilon_sweep.HERE / name for name in ("ledger.jsonl", "guides/CHOOSING_EPSILON.md"))
GRID = [Setting(0.2, s) for s in (0.1, 0.3, 1.0)] + [Setting(e, 0.3) for e in (0.05, 0.5)]


def run(setting: Setting, seed: int, nll: float, **settings: Any) -> dict[str, Any]:
    optim = "sgd" if setting == SGD else "amp"
    metrics = {"eval_nll": nll, "eval_error": 10 * nll, "eval_ece": 0.1, "loss": 0.5}
    if optim == "amp":
        metrics |= {"sharpness": 0.25, "clipped": 0.0}
    chosen = {"optim": optim, "amp_epsilon": setting.epsilon, "amp_inner_lr": setting.inner_lr, "seed": seed}
    return {
        "settings": {"dataset": "cifar10_sample", "validation_images": 5, "model": "net", **chosen, **settings},
        "metrics": metrics,
    }


def written(folder: Path, runs: list[dict[str, Any]]) -> Path:
    path = folder / "ledger.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in runs))
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    runs = [run(s, seed, k + seed / 4) for k, s in enumerate([SGD, *GRID], 1) for seed in (1, 2)]
    others = [run(SGD, 1, 99.0, validation_images=None), run(SGD, 1, 99.0, dataset="cifar10")]
    return written(tmp_path, [*runs, *others])


def test_rows_are_means_over_seeds_of_the_held_out_images(ledger: Path) -> None:
    lines = table(read(ledger)).splitlines()
    assert len(lines) == 2 + 1 + len(GRID)
    assert lines[2] == "| SGD | - | 2 | 1.375 ± 0.177 | 13.8 ± 1.8 | 0.100 ± 0.000 | 0.500 ± 0.000 | - | - |"
    assert lines[3].startswith("| 0.05 | 0.3 | 2 | 5.375 ± 0.177 |")


def test_the_picture_has_the_means(ledger: Path, tmp_path: Path, drawn: list[Any]) -> None:
    sweep = read(ledger)
    draw(sweep, tmp_path / "picture.png")
    axes = drawn[0].axes[1]
    [line] = [line for line in axes.get_lines() if line.get_label() == "AMP, epsilon 0.2"]
    expected = [mean(sweep[Setting(0.2, s)].numbers("eval_nll")) for s in (0.1, 0.3, 1.0)]
    assert list(line.get_xdata()) == [0.1, 0.3, 1.0]
    assert list(line.get_ydata()) == expected


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in model"):
        read(written(tmp_path, [run(SGD, 1, 1.0), run(SGD, 2, 1.0, model="other")]))
    with pytest.raises(ValueError, match="seed 1, is there twice"):
        read(written(tmp_path, [run(SGD, 1, 1.0), run(SGD, 1, 2.0)]))
    with pytest.raises(ValueError, match="no runs on cifar100 with validation_images"):
        read(written(tmp_path, [run(SGD, 1, 1.0)]), "cifar100")


def test_the_script_puts_both_into_a_page(ledger: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    page = tmp_path / "page.md"
    shutil.copy(PAGE, page)
    epsilon_sweep.main(["--ledger", str(ledger), "--page", str(page)])
    sweep = read(ledger)
    assert read_part(page, epsilon_sweep.MARK) == f"![{epsilon_sweep.ALT}]({epsilon_sweep.PICTURE})\n\n{table(sweep)}"
    assert shows(tmp_path / epsilon_sweep.PICTURE, table(sweep))
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        read_part(page, epsilon_sweep.MARK)


def test_the_page_shows_the_ledger() -> None:
    sweep = read(LEDGER)
    assert (
        read_part(PAGE, epsilon_sweep.MARK) == f"![{epsilon_sweep.ALT}]({epsilon_sweep.PICTURE})\n\n{table(sweep)}"
    ), "run python recipes/epsilon_sweep.py"
    assert shows(PAGE.parent / epsilon_sweep.PICTURE, table(sweep)), "run python recipes/epsilon_sweep.py"
