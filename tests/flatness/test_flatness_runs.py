"""Tests of the command that puts finished runs side by side, and of the pictures of landscapes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from amp_plugin.data import collate
from amp_plugin.flatness import Landscape, Objective, plot_landscapes
from amp_plugin.train import job
from amp_plugin.train.run_folder import open_run

command = importlib.import_module("amp_plugin.flatness.__main__")
JOB = [
    *("--train_images", "60", "--per_device_train_batch_size", "20", "--max_steps", "3", "--use_cpu", "true"),
    *("--model_kwargs", '{"width": 4, "layers": [1, 1, 1, 1]}', "--cpu_threads", "1", "--disable_tqdm", "true"),
]
QUICK = [
    *("--images", "20", "--steps", "2", "--eigenvalues", "2", "--products", "4", "--probes", "2"),
    *("--line_points", "5", "--plane_points", "3", "--span", "0.5"),
]


def flatness(*arguments: Any) -> str:
    """Run the command and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        failed = command.run([str(a) for a in arguments])
    assert failed is None, failed
    return printed.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two runs, sgd and amp, in one folder."""
    pytest.importorskip("matplotlib", reason="draws pictures")
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # the job's own pictures take longer than its training
        for optim in ("sgd", "amp"):
            job.main([*JOB, "--optim", optim, "--output_dir", str(folder / optim)])
    return folder


@pytest.fixture(scope="module")
def results(runs: Path) -> tuple[Path, str]:
    """Return the folder of the results and what was printed."""
    pytest.importorskip("hessian_eigenthings", reason='needs the extra: pip install "amp-plugin[flatness]"')
    out = runs / "flatness"
    return out, flatness(runs / "sgd", runs / "amp", "--output_dir", out, *QUICK)


def test_a_run_opens_with_its_weights_and_its_own_training_images(runs: Path) -> None:
    run = open_run(runs / "amp")
    assert len(run.task.train) == 60
    test = Objective(run.task.model, DataLoader(run.task.test, 100, collate_fn=collate))
    assert test.evaluate().error == pytest.approx(run.metrics["eval_error"])
    assert len(list(run.training_batches(None, 25))) == 3


def test_the_table_has_the_models_side_by_side(results: tuple[Path, str]) -> None:
    out, printed = results
    page = (out / "flatness.md").read_text()
    assert page.partition("![")[0] in printed, "before a picture is tried"
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line]
    assert rows[0] == ["", "sgd", "amp"]
    assert [row[0] for row in rows[2:]] == [
        "training loss (nats)",
        "training error (%)",
        "worst loss in the ball (nats)",
        "sharpness (nats)",
        "Hessian eigenvalue 1",
        "Hessian eigenvalue 2",
        "Hessian trace",
        "norm of the weights",
        "test error, from the run (%)",
        "trained with",
    ]
    assert rows[-1] == ["trained with", "sgd", "amp"]
    figures = json.loads((out / "flatness.json").read_text())["models"]
    for column, name in enumerate(("sgd", "amp"), 1):
        assert rows[5][column] == f"{figures[name]['sharpness']['sharpness']:.4g}"
        assert rows[6][column].startswith(f"{figures[name]['eigenvalues']['values'][0]:.4g} ±")
    assert "20 training images of cifar10_sample" in page
    assert "radius 0.2 around every tensor" in page, "the job's own epsilon"


def test_the_figures_agree_with_each_other(results: tuple[Path, str]) -> None:
    figures = json.loads((results[0] / "flatness.json").read_text())["models"]
    assert figures["sgd"] != figures["amp"]
    for found in figures.values():
        loss, line, plane = found["evaluation"]["loss"], found["line"], found["plane"]
        assert found["sharpness"]["losses"][0] == pytest.approx(loss)
        assert line["steps"] == [-0.5, -0.25, 0, 0.25, 0.5]
        assert line["loss"][2] == plane["loss"][1][1] == pytest.approx(loss)
        # The first direction of the plane is the direction of the line.
        assert [row[1] for row in plane["loss"]] == line["loss"][::2]


def test_the_pictures_are_linked(results: tuple[Path, str]) -> None:
    from PIL import Image

    page = (results[0] / "flatness.md").read_text()
    for name in ("landscape_line.png", "landscape.png"):
        assert f"({name})" in page
        with Image.open(results[0] / name) as picture:
            picture.verify()


def test_only_what_is_asked_for_is_measured(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hessian_eigenthings", None)
    options = ["--measures", "sharpness", "--images", 20, "--steps", 1, "--names", "one", "--epsilon", 0.05]
    printed = flatness(runs / "sgd", "--output_dir", tmp_path / "out", *options, "--norm", "global")
    assert "radius 0.05 around all weights together" in printed
    assert "Hessian" not in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["flatness.json", "flatness.md"]
    refused = command.run([str(runs / "sgd")])
    assert refused is not None
    assert 'pip install "amp-plugin[flatness]"' in refused


def of_other_data(runs: Path) -> None:
    record = json.loads((runs / "amp" / "run.json").read_text())
    record["settings"]["train_images"] = 50
    shutil.copytree(runs / "amp", runs / "other")
    (runs / "other" / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ["nothing"], r"'.*nothing' has no run\.json: give the output folder of a finished run"),
        (None, ["sgd", "sgd"], "folders: .*sgd is given twice"),
        (None, ["sgd", "--images", 61], "cannot take 61 of 60 images; ask for 1 to 60"),
        (None, ["sgd", "--plane_points", 4], "points must be odd"),
        (of_other_data, ["sgd", "other"], "trained on different data.*train_images 60 and 50"),
    ],
)
def test_a_mistake_is_named(
    runs: Path, tmp_path: Path, prepare: Callable[[Path], None] | None, arguments: list[Any], message: str
) -> None:
    if prepare is not None:
        prepare(runs)
    words = [str(runs / a) if str(a).isalpha() else str(a) for a in arguments]
    refused = command.run([*words, "--output_dir", str(tmp_path), "--measures", "sharpness"])
    assert refused is not None
    assert re.search(message, refused)


def bowl(curvature: float, dimensions: int) -> Landscape:
    steps = np.linspace(-1, 1, 5)
    squares = np.square(steps) if dimensions == 1 else np.square(steps)[:, None] + 2 * np.square(steps)
    return Landscape(steps, 0.01 + curvature * squares, np.minimum(30 * curvature * squares, 90))


def test_models_are_lines_in_one_panel(tmp_path: Path, drawn: list[Any]) -> None:
    scapes = {"sgd": bowl(4, 1), "amp": bowl(1, 1)}
    plot_landscapes(scapes, tmp_path / "line.png", "lines")
    loss, error = drawn[0].axes
    assert (loss.get_ylabel(), error.get_ylabel()) == ("loss (nats)", "error (%)")
    assert (loss.get_yscale(), error.get_yscale()) == ("log", "linear")
    for line, scape in zip(loss.lines, scapes.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), scape.loss)
    assert len({(line.get_linestyle(), line.get_marker()) for line in loss.lines}) == 2, "told without colour"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["sgd", "amp"]


def test_planes_share_one_scale(tmp_path: Path, drawn: list[Any]) -> None:
    overflowing = bowl(1, 2)
    overflowing.loss[0, 0] = np.inf
    plot_landscapes({"sgd": bowl(4, 2), "amp": overflowing}, tmp_path / "plane.png", "planes")
    panels = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [axes.get_title().splitlines()[0] for axes in panels] == ["sgd", "amp"] * 2
    filled = [axes.collections[0] for axes in panels]
    for left, right in (filled[:2], filled[2:]):
        assert left.norm is right.norm
        np.testing.assert_array_equal(left.levels, right.levels)
    levels = filled[0].levels
    assert levels[0] <= 0.01
    assert levels[-1] >= 12.01
    assert np.isin([0.1, 1, 10], np.round(levels, 9)).all(), "round numbers"


def test_the_first_direction_is_to_the_right(tmp_path: Path, drawn: list[Any]) -> None:
    steps = np.linspace(-1, 1, 3)
    rising = np.array([[1.0] * 3, [2.0] * 3, [3.0] * 3])  # the loss rises along the first direction
    plot_landscapes({"slope": Landscape(steps, rising, None)}, tmp_path / "slope.png", "slope")
    panel = next(axes for axes in drawn[0].axes if axes.get_title())
    first = panel.collections[0].get_paths()[0].vertices
    assert first[:, 0].max() < 0, "the lowest band lies on the left"
    assert np.ptp(first[:, 1]) == 2, "from top to bottom"


def test_landscapes_of_different_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as many directions"):
        plot_landscapes({"a": bowl(1, 1), "b": bowl(1, 2)}, tmp_path / "none.png", "none")
    nowhere = Landscape(np.zeros(3), np.full(3, np.nan), None)
    with pytest.raises(ValueError, match="no loss in the landscapes is finite"):
        plot_landscapes({"a": nowhere}, tmp_path / "none.png", "none")


def test_names_of_models_are_drawn_and_tabulated_as_they_are(runs: Path) -> None:
    out, names = runs / "names", [r"$\frac{$", "_a|b\x1b[31m\n"]
    printed = flatness(runs / "sgd", runs / "amp", *QUICK, "--measures", "line", "plane", "--names", *names,
                       "--output_dir", out)  # fmt: skip
    page = (out / "flatness.md").read_text(encoding="utf-8")
    head, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert head == r"|  | \$\\frac{\$ | \_a&#124;b\\x1b\[31m\\n |"
    assert {row.count("|") for row in rows} == {4}
    assert "\x1b" not in printed
    assert list(json.loads((out / "flatness.json").read_text())["models"]) == names
    assert {path.name for path in out.glob("*.png")} == {"landscape.png", "landscape_line.png"}


def test_a_legend_names_every_model(tmp_path: Path, drawn: list[Any]) -> None:
    line = Landscape(steps=np.linspace(-1, 1, 5), loss=np.ones(5), error=None)
    plot_landscapes({"_hidden": line, "": line, "$x^$": line}, tmp_path / "line.png", "title")
    assert len(drawn[0].legends[0].get_texts()) == 3
