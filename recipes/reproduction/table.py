"""The tables, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

from guides.page import table

from reproduction.comparison import AMP, Row, paired, reference_of
from reproduction.published import Figure, Setting, published
from reproduction.records import Record

_MEASURES = {  # by metric: heading and digits
    "eval_error": ("test error %, last epoch", 2),
    "best_eval_error": ("best", 2),
    "eval_nll": ("NLL", 3),
    "eval_ece": ("ECE", 3),
}
_COMPARED = {"eval_error": 2, "eval_nll": 3}
_LIBRARIES = ("torch", "transformers")
_NOTE = """\
Mean ± standard deviation over seeds. "Best" is the lowest test error of the epochs that were tested, so the test images
chose it; it stands here because the released code reports it. "ERM minus method" and "AMP minus method" are means over
the seeds that both have, with a 95 % interval by Student's t: positive where the method is better; not corrected for
the number of methods. "Passes" counts forward and backward passes over the training images."""


def markdown(tables: Mapping[Setting, Sequence[Row]], with_paper: bool) -> str:
    """Render all tables with a heading each, and below them what the columns mean and what made the runs.

    Args:
        tables: rows by setting, as `reproduction.comparison.rows_of` returns them; not empty.
        with_paper: whether the published figures stand beside ours.
    """
    parts = [
        f"### {setting.dataset}, {setting.model}, augmentation {setting.augment}\n\n"
        + _table(rows, published().results.get(setting, {}) if with_paper else {})
        for setting, rows in tables.items()
    ]
    runs = [run for rows in tables.values() for row in rows for run in row.runs.values()]
    return "\n\n".join([*parts, _NOTE, _origin(runs)])


def _table(rows: Sequence[Row], paper: Mapping[str, Figure]) -> str:
    heads = ["method", "seeds", *(head for head, _ in _MEASURES.values()), "passes"]
    heads += ["paper: error %", "paper: NLL"] if paper else []
    others = {"ERM": reference_of(rows), "AMP": reference_of(rows, AMP)}
    heads += [f"{name} minus method: {measure}" for name in others for measure in ("error", "NLL")]
    lines = []
    for row in rows:
        cells = [row.label(), str(len(row.runs))]
        cells += [spread(row.numbers(name), digits) for name, (_, digits) in _MEASURES.items()]
        cells.append(" to ".join(f"{n:g}" for n in sorted(set(row.numbers("passes")))) or "-")
        cells += _figure(paper.get(row.method)) if paper else []
        lines.append([*cells, *differences(others.values(), row, _COMPARED)])
    return table(heads, lines)


def spread(numbers: Sequence[float], digits: int) -> str:
    """Render mean and standard deviation."""
    if not numbers:
        return "-"
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def _figure(figure: Figure | None) -> list[str]:
    if figure is None:
        return ["-", "-"]
    return [f"{figure.mean:.2f} ± {figure.std:.3f}", "-" if figure.nll is None else f"{figure.nll:.3f}"]


def differences(others: Iterable[Row | None], row: Row, digits: Mapping[str, int]) -> list[str]:
    """Render each other row minus this one, for each of the measures whose digits are given."""
    found = [(paired(other, row, name), n) for other in others for name, n in digits.items()]
    return [f"{f.mean:+.{n}f} [{f.low:+.{n}f}, {f.high:+.{n}f}]" if f else "-" for f, n in found]


def _origin(runs: Sequence[Record]) -> str:
    commits = sorted({str(run.get("commit"))[:12] for run in runs})
    versions = {name: sorted({str(run.get("versions", {}).get(name)) for run in runs}) for name in _LIBRARIES}
    said = "; ".join(f"{name} {', '.join(some)}" for name, some in versions.items())
    return f"{len(runs)} runs; commits {', '.join(commits)}; {said}."
