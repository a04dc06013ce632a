from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amp_plugin.metrics import classification_scores
from amp_plugin.provenance import run_record
from amp_plugin.report import append_to_ledger, plot_confusion, plot_curves, plot_reliability, series, table

RECORDS = [
    {"epoch": 1.0, "loss": 2.0, "amp_loss": 2.5, "sharpness": 0.5, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_loss": 1.9, "eval_error": 60.0},
    {"epoch": 2.0, "loss": 1.0, "amp_loss": 1.2, "sharpness": 0.2, "learning_rate": 0.01},
    {"epoch": 2.0, "eval_loss": 1.5, "eval_error": 50.0},
]
WITHOUT_AMP = [{k: v for k, v in r.items() if k not in ("amp_loss", "sharpness")} for r in RECORDS]


def logits_of(classes: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, samples)
    return random.normal(size=(samples, classes)) + 3 * np.eye(classes)[labels], labels


def test_series_takes_what_is_logged() -> None:
    assert series(RECORDS, "loss") == ([1.0, 2.0], [2.0, 1.0])
    assert series(RECORDS, "clipped") == ([], [])


def test_the_table_is_aligned() -> None:
    lines = table({"train loss": "0.1", "time": "12 s"}).splitlines()
    assert {len(line) for line in lines} == {len("train loss  12 s")}
    assert lines[2] == "time        12 s"


def test_curves_have_a_panel_for_each_kind_of_logged_quantity(tmp_path: Path, drawn: list[Any]) -> None:
    plot_curves(RECORDS, tmp_path / "amp.png", "run")
    plot_curves(WITHOUT_AMP, tmp_path / "sgd.png", "run", where="validation")
    panels = [{a.get_ylabel(): a for a in figure.axes} for figure in drawn]
    assert list(panels[0]) == ["loss (nats)", "error (%)", "sharpness (nats)", "learning rate"]
    assert list(panels[1]) == ["loss (nats)", "error (%)", "learning rate"]
    loss, worst, test = panels[0]["loss (nats)"].lines
    assert list(worst.get_ydata()) == [2.5, 1.2]
    assert list(test.get_ydata()) == [1.9, 1.5]
    assert len({(line.get_linestyle(), line.get_marker()) for line in (loss, worst, test)}) == 3, "told without colour"
    assert all(axes.get_xlabel() == "epoch" for axes in drawn[0].axes)
    legend = [text.get_text() for text in drawn[1].legends[0].get_texts()]
    assert legend == ["train, at the weights", "validation"]


def test_curves_of_one_epoch_and_of_many(tmp_path: Path, drawn: list[Any]) -> None:
    plot_curves(RECORDS[:2], tmp_path / "short.png", "run")
    long = [{**r, "epoch": r["epoch"] + 2 * i} for i in range(100) for r in RECORDS]
    plot_curves(long, tmp_path / "long.png", "run")
    assert drawn[0].axes[0].lines[0].get_marker() == "o", "a single point is seen only by its marker"
    assert drawn[1].axes[0].lines[0].get_marker() in ("", "None")
    assert [axes.get_ylim() for axes in drawn[0].axes[:2]] == [(0, 1.05 * 2.5), (0, 1.05 * 60)], (
        "all of it in the panel"
    )
    assert [f.axes[-1].get_yscale() for f in drawn] == ["linear", "log"], "one learning rate, or two decades of them"


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the records hold none of loss, amp_loss"):
        plot_curves([{"epoch": 1.0}], tmp_path / "none.png", "run")


def test_the_confusion_matrix_has_shares_of_the_true_class(tmp_path: Path, drawn: list[Any]) -> None:
    logits = np.eye(2)[[0, 0, 0, 1, 1]]
    plot_confusion(logits, np.array([0, 0, 0, 0, 1]), ["cat", "dog"], tmp_path / "two.png", "run")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[75, 25], [0, 100]])
    assert [text.get_text() for text in axes.texts] == ["75", "25", "0", "100"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_a_confusion_matrix_of_many_classes_lists_the_confusions_instead(tmp_path: Path, drawn: list[Any]) -> None:
    labels = np.repeat(np.arange(100), 4)
    predicted = labels.copy()
    predicted[4 * 7 : 4 * 7 + 3] = 42  # three of four sevens
    predicted[4 * 9] = 8
    names = [f"class {i}" for i in range(100)]
    plot_confusion(np.eye(100)[predicted], labels, names, tmp_path / "many.png", "run")
    matrix, confusions = drawn[0].axes[:2]
    assert not matrix.texts
    ticks = [
        (round(tick), text.get_text()) for tick, text in zip(matrix.get_xticks(), matrix.get_xticklabels(), strict=True)
    ]
    assert 10 < len(ticks) <= 25
    assert all(text == names[tick] for tick, text in ticks)
    assert [text.get_text() for text in confusions.get_yticklabels()] == ["class 7 → class 42", "class 9 → class 8"]
    assert [bar.get_width() for bar in confusions.patches] == [75, 25]


def test_every_class_needs_its_name(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="counts the confusions")
    with pytest.raises(ValueError, match="2 class names for logits of 3 classes"):
        plot_confusion(np.eye(3), np.arange(3), ["a", "b"], tmp_path / "three.png", "run")


def test_the_reliability_diagram_shows_the_bins_of_the_calibration_error(tmp_path: Path, drawn: list[Any]) -> None:
    logits, labels = logits_of(classes=10, samples=300)
    plot_reliability(logits, labels, tmp_path / "reliability.png", "run", n_bins=5)
    above, below = drawn[0].axes
    confidence = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)
    right = logits.argmax(axis=1) == labels
    edges = [(i / 5 < confidence) & (confidence <= (i + 1) / 5) for i in range(5)]
    filled = [inside for inside in edges if inside.any()]
    assert [bar.get_height() for bar in below.patches] == [inside.sum() for inside in edges]
    accuracies, gaps = (container.datavalues for container in above.containers)
    np.testing.assert_allclose(accuracies, [100 * right[inside].mean() for inside in filled])
    np.testing.assert_allclose(gaps, [100 * abs(right[i].mean() - confidence[i].mean()) for i in filled])
    assert [text.get_text() for text in below.texts] == [str(i.sum()) if i.any() else "" for i in edges]
    ece = classification_scores(logits, labels, n_bins=5)["ece"]
    assert f"calibration error {100 * ece:.2f} %" in drawn[0].get_suptitle()


def test_pictures_are_on_opaque_white_whatever_the_users_style(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="draws pictures")
    logits, labels = logits_of(classes=3, samples=30)
    with matplotlib.style.context("dark_background"):
        plot_curves(RECORDS, tmp_path / "curves.png", "run")
        plot_confusion(logits, labels, ["a", "b", "c"], tmp_path / "confusion.png", "run")
        plot_reliability(logits, labels, tmp_path / "reliability.png", "run")
        assert matplotlib.rcParams["figure.facecolor"] == "black", "and the style stays"
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert image.size[0] >= 400
            colours = image.convert("RGBA").getcolors(1 << 24)
            assert max(colours)[1] == (255, 255, 255, 255) or path.stem == "confusion"
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_the_ledger_grows_by_one_line_a_run(tmp_path: Path) -> None:
    ledger = tmp_path / "new" / "ledger.jsonl"
    for seed in (1, 2):
        append_to_ledger(ledger, run_record({"seed": seed, "folder": tmp_path}, {"error": 3.0}))
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [r["settings"]["seed"] for r in records] == [1, 2]
    assert records[0]["metrics"] == {"error": 3.0}
    assert {"torch", "timm", "transformers"} <= records[0]["versions"].keys()


NAMES = ["$x^$", r"$\frac{$", "_hidden", "", "two\nlines", "\x1b[31mred", "\u202eabc", "名前", "\udc80", "a|`<b>"]


@pytest.mark.parametrize("more", [0, 20], ids=["with numbers", "with a list of confusions"])
def test_names_of_classes_are_drawn_as_they_are(tmp_path: Path, drawn: list[Any], more: int) -> None:
    names = NAMES + [f"$^{i}$" for i in range(more)]
    title = f"{' '.join(NAMES)}: " + "long " * 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(*logits_of(len(names), 100), names, tmp_path / "confusion.png", title)
    shown = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    known = [r"\$x^\$", r"\$\frac{\$", "\u200b_hidden", "\u200b", r"two\nlines", r"\x1b[31mred", r"\u202eabc"]
    assert shown[:4] == (known[:8:2] if more else known[:4])
    assert more or shown[4:7] == known[4:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph is missing
        assert drawn[0]._suptitle.get_window_extent().width < drawn[0].bbox.width, "the title is within the picture"


def test_titles_and_legends_are_drawn_as_they_are(tmp_path: Path, drawn: list[Any]) -> None:
    plot_curves(RECORDS, tmp_path / "curves.png", r"run $\frac{$" "\nsecond line", where="_$x^$")
    plot_reliability(*logits_of(3, 50), tmp_path / "reliability.png", "$x^$")
    assert drawn[0]._suptitle.get_text() == "run \\$\\frac{\\$\nsecond line"
    assert "\u200b_\\$x^\\$" in [text.get_text() for text in drawn[0].legends[0].get_texts()]
