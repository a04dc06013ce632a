"""The tables, in Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from guides.page import table

from amp_plugin.data.corruptions import CORRUPTIONS
from amp_plugin.report.style import AMBER, BLUE, VERMILION, legend_below, picture
from amp_plugin.text import for_matplotlib, in_markdown
from reproduction.comparison import AMP, REFERENCE, Row, interval, paired, reference_of
from reproduction.published import Figure, Setting, published
from reproduction.records import Record

_MEASURES = {  # by metric: heading and digits
    "eval_error": ("test error %, last epoch", 2),
    "best_eval_error": ("best", 2),
    "eval_nll": ("NLL", 3),
    "eval_ece": ("ECE", 3),
}
DIGITS = {"eval_error": 2, "eval_nll": 3}  # of the differences
# Tests on corrupted images stand beside the clean ones, and have the differences that the first table lacks.
_PAIRS = {"error": 2, "nll": 3, "ece": 3}
_WORDS = {"error": "error %", "nll": "NLL", "ece": "ECE"}
_FURTHER = {"eval_ece": 3, **{f"corrupted_{name}": digits for name, digits in _PAIRS.items()}}
_PANELS = {"eval_error": "test error %, last epoch", "eval_nll": "test NLL"}
_SEED: dict[str, Any] = {"markersize": 4, "markeredgewidth": 0.8, "zorder": 3}
_LIBRARIES = ("torch", "transformers")
_NOTE = """\
Mean ± standard deviation over seeds. "Best" is the lowest test error of the epochs that were tested, so the test images
chose it; it stands here because the released code reports it. "ERM minus method" and "AMP minus method" are means over
the seeds that both have, with a 95 % interval by Student's t: positive where the method is better; not corrected for
the number of methods. "Passes" counts forward and backward passes over the training images."""
_PAPER_NOTE = """\
A standard error is the published standard deviation over the root of the number of seeds here; the published mean's own
error is left out, because it is not published of how many runs it is."""
_CORRUPTED_NOTE = """\
"Corrupted" is the mean over Gaussian noise, Gaussian blur, less contrast and JPEG compression at the five severities of
[CIFAR-10-C](https://arxiv.org/abs/1903.12261), on {} of the test images, spread evenly. The last table of a setting has
the error under each of them."""


def markdown(tables: Mapping[Setting, Sequence[Row]], with_paper: bool) -> str:
    """Render all tables with a heading each, and below them what the columns mean and what made the runs."""
    parts = []
    for setting, rows in tables.items():
        paper = published().results.get(setting, {}) if with_paper else {}
        parts += [f"### {in_markdown(_title(setting, rows))}", _table(rows, paper)]
        if any(row.numbers("corrupted_error") for row in rows):
            parts += ["On corrupted test images:", *_corrupted(rows)]
    runs = [run for rows in tables.values() for row in rows for run in row.runs.values()]
    counts = {run["settings"].get("corrupted_test_images") for run in runs} - {None}
    images = " or ".join(f"{count:,}" for count in sorted(counts))
    corrupted = [_CORRUPTED_NOTE.format(images)] if counts else []
    return "\n\n".join([*parts, _NOTE, *([_PAPER_NOTE] if with_paper else []), *corrupted, _origin(runs)])


def _title(setting: Setting, rows: Sequence[Row]) -> str:
    noise = sorted({run["settings"].get("label_noise", 0.0) for row in rows for run in row.runs.values()})
    said = f", label noise {' and '.join(f'{n:g}' for n in noise)}" if any(noise) else ""
    return f"{setting.dataset}, {setting.model}, augmentation {setting.augment}{said}"


def _table(rows: Sequence[Row], paper: Mapping[str, Figure]) -> str:
    heads = ["method", "seeds", *(head for head, _ in _MEASURES.values()), "passes"]
    heads += ["paper: error %", "paper: NLL", "error minus paper's, in standard errors"] if paper else []
    others = {"ERM": reference_of(rows), "AMP": reference_of(rows, AMP)}
    heads += [f"{name} minus method: {measure}" for name in others for measure in ("error", "NLL")]
    lines = []
    for row in rows:
        cells = [in_markdown(row.label()), str(len(row.runs))]
        cells += [spread(row.numbers(name), digits) for name, (_, digits) in _MEASURES.items()]
        cells.append(" to ".join(f"{n:g}" for n in sorted(set(row.numbers("passes")))) or "-")
        cells += _figure(row, paper.get(row.method)) if paper else []
        lines.append([*cells, *differences(others.values(), row, DIGITS)])
    return table(heads, lines)


def _corrupted(rows: Sequence[Row]) -> list[str]:
    """Render the tests on corrupted images beside those on clean ones, and below them the error of each corruption."""
    others = {"ERM": reference_of(rows), "AMP": reference_of(rows, AMP)}
    both = {f"{images}_{name}": digits for name, digits in _PAIRS.items() for images in ("eval", "corrupted")}
    heads = [*map(_in_words, both), *(f"{name} minus method: {_in_words(key)}" for name in others for key in _FURTHER)]
    lines, errors = [], []
    for row in rows:
        if not row.numbers("corrupted_error"):
            continue
        first = [in_markdown(row.label()), str(len(row.numbers("corrupted_error")))]
        cells = [spread(row.numbers(key), digits) for key, digits in both.items()]
        lines.append([*first, *cells, *differences(others.values(), row, _FURTHER)])
        errors.append([*first, *(spread(row.numbers(f"corrupted_{kind}_error"), 2) for kind in CORRUPTIONS)])
    by_kind = [f"error %, {kind.name}" for kind in CORRUPTIONS.values()]
    return [table(["method", "seeds", *heads], lines), table(["method", "seeds", *by_kind], errors)]


def _in_words(metric: str) -> str:
    images, _, name = metric.partition("_")
    return f"{'clean' if images == 'eval' else images} {_WORDS[name]}"


def spread(numbers: Sequence[float], digits: int) -> str:
    """Render mean and standard deviation."""
    if not numbers:
        return "-"
    known = len(numbers) > 1 and all(map(math.isfinite, numbers))  # stdev refuses what is not finite
    spread = f" ± {stdev(numbers):.{digits}f}" if known else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def _figure(row: Row, figure: Figure | None) -> list[str]:
    """Render what is published for a row, and how far the row's error is from that.

    The standard error is the published standard deviation over the root of the number of seeds here; how many runs the
    published mean is of is not known, and its own error is left out.
    """
    if figure is None:
        return ["-", "-", "-"]
    away = (row.mean("eval_error") - figure.mean) / (figure.std / len(row.runs) ** 0.5)
    return [
        f"{figure.mean:.2f} ± {figure.std:.3f}",
        "-" if figure.nll is None else f"{figure.nll:.3f}",
        f"{away:+.1f}",
    ]


def differences(others: Iterable[Row | None], row: Row, digits: Mapping[str, int]) -> list[str]:
    """Render each other row minus this one, for each of the measures whose digits are given."""
    found = [(paired(other, row, name), n) for other in others for name, n in digits.items()]
    return [f"{f.mean:+.{n}f} [{f.low:+.{n}f}, {f.high:+.{n}f}]" if f else "-" for f, n in found]


def _origin(runs: Sequence[Record]) -> str:
    commits = sorted({str(run.get("commit"))[:12] for run in runs})
    versions = {name: sorted({str(run.get("versions", {}).get(name)) for run in runs}) for name in _LIBRARIES}
    said = "; ".join(f"{name} {', '.join(some)}" for name, some in versions.items())
    return f"{len(runs)} runs; commits {', '.join(commits)}; {said}."


def draw(tables: Mapping[Setting, Sequence[Row]], path: Path, title: str, with_paper: bool) -> None:
    """Draw error and NLL of every method to a PNG, a pair of panels for each setting, of what `markdown` renders."""
    heights = [0.9 + 0.3 * len(rows) for rows in tables.values()]
    with picture(path, title, (10.5, 0.8 + sum(heights)), markdown(tables, with_paper)) as figure:
        grid: Any = figure.subplots(len(tables), 2, squeeze=False, height_ratios=heights)
        for axes, (setting, rows) in zip(grid, tables.items(), strict=True):
            paper = published().results.get(setting, {}) if with_paper else {}
            for panel, (name, head) in zip(axes, _PANELS.items(), strict=True):
                _panel(panel, rows, name)
                panel.set_xlabel(head)
                for place, row in enumerate(rows):
                    if figures := paper.get(row.method):
                        published_value = figures.mean if name == "eval_error" else figures.nll
                        panel.plot([published_value], [place], "D", color=AMBER, markersize=5, label="the paper's")
            axes[0].set_yticks(range(len(rows)), [for_matplotlib(row.label()) for row in rows])
            axes[1].set_yticks(range(len(rows)), [""] * len(rows))
            axes[0].set_title(for_matplotlib(_title(setting, rows)), loc="left")
        legend_below(figure)


def _panel(axes: Any, rows: Sequence[Row], name: str) -> None:
    if reference := reference_of(rows):
        axes.axvline(reference.mean(name), color="0.4", linestyle="--", linewidth=1, label="ERM's mean")
    for place, row in enumerate(rows):
        numbers = row.numbers(name)
        colour, bar = (VERMILION, " (ERM)") if row.method == REFERENCE else (BLUE, "")
        axes.plot(numbers, [place] * len(numbers), "o", color="0.3", markerfacecolor="white", label="a seed", **_SEED)
        if found := interval(numbers):
            label = f"mean, 95 % interval{bar}"
            axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2, label=label)
        axes.plot([row.mean(name)], [place], "s", color=colour, markersize=5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
