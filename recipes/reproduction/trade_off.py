"""What the cheaper modes of AMP cost, and what they keep of its gain: a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from guides.page import table

from amp_plugin.report.style import AMBER, BLUE, GREEN, PINK, SKY, VERMILION, legend_below, picture
from amp_plugin.text import for_matplotlib, in_markdown
from reproduction.comparison import AMP, REFERENCE, Row, paired, reference_of
from reproduction.published import Method, Setting, methods
from reproduction.table import DIGITS, differences, spread

SECTION = "Ascent policies"  # section of the benchmark
_MAKE_IT = "make it with benchmark.py --only ascents --sizes 0.3M --batch_sizes 50"
_MEASURES = {"eval_error": "test error %", "eval_nll": "test NLL"}
# Okabe and Ito's have fewer colours than there are modes; the second round has another mark.
_STYLES = [(colour, mark) for mark in "sDv" for colour in (VERMILION, BLUE, GREEN, PINK, AMBER, SKY)]
_NOTE = """\
Passes and seconds are of a step, as multiples of ERM's: passes as each run counted them, seconds as
`benchmark.py --only ascents` measured them for this network, in turns in one run. "ERM minus mode" and "AMP minus mode"
are paired over the seeds that both have, with a 95 % interval by Student's t, positive where the mode is better;
compare by them, for the means before them are over different seeds. "Kept" is the first as a share of AMP's own over
the same seeds; it is left out where AMP's own interval contains 0, for then nothing is known to be kept."""


class Mode(NamedTuple):
    """The runs of a way to train, and what a step costs in passes and in seconds, as multiples of the reference's."""

    row: Row
    passes: float
    seconds: float

    def method(self) -> Method:
        """Return the method of the runs. Its label lacks the hyper-parameters, which all modes share."""
        return methods()[self.row.method]


def seconds_of(benchmark: Path) -> dict[str, float]:
    """Return the ratios of `benchmark.py --only ascents` by policy, from the JSON Lines that it wrote."""
    try:
        lines = benchmark.read_text(encoding="utf-8").splitlines() if benchmark.exists() else []
        rows = [row for row in map(json.loads, lines) if row.get("section") == SECTION]
        ratios = {str(row["name"]): float(row["ratio"]) for row in rows}
        one_case = len({row["case"] for row in rows}) == 1
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{benchmark} is not what benchmark.py writes: {error!r}; {_MAKE_IT}") from error
    if not one_case:
        raise ValueError(f"{benchmark} must have the ascent policies of one network and batch size; {_MAKE_IT}")
    return ratios


def is_mode(method: Method) -> bool:
    """Tell whether a method is ERM, ERM for longer, or AMP with a policy and nothing else."""
    plain = method.options.keys() <= {"optim", "amp_ascent", "epochs_times"} and len(method.sources) == 1
    return plain and (method.ascent is not None or method.sources == (REFERENCE,))


def modes_of(rows: Sequence[Row], seconds: Mapping[str, float]) -> list[Mode]:
    """Return ERM, ERM for longer, and AMP with each policy, where they ran with the hyper-parameters they share."""
    reference, amp = reference_of(rows), reference_of(rows, AMP)
    if reference is None:
        return []
    passes = reference.mean("passes")
    if not passes > 0:
        raise ValueError(f"the ledger does not tell the passes of {reference.label()}")
    shared = {REFERENCE: reference.values, AMP: None if amp is None else amp.values}
    modes = []
    for row in rows:
        method = methods()[row.method]
        if not is_mode(method) or row.values != shared.get(method.sources[0], row.values):
            continue
        if method.ascent is not None:
            if method.ascent not in seconds:
                raise ValueError(
                    f"the benchmark has no seconds of {method.ascent}: run benchmark.py --only ascents anew"
                )
            cost = seconds[method.ascent]
        else:
            cost = float(method.options.get("epochs_times", 1))  # the same step, so many times as often
        modes.append(Mode(row, row.mean("passes") / passes, cost))
    return sorted(modes, key=lambda mode: (mode.row.method != REFERENCE, mode.passes, mode.seconds))


def markdown(tables: Mapping[Setting, Sequence[Mode]]) -> str:
    """Render a table for each setting, and what its columns mean."""
    whats = ("ERM minus mode", "AMP minus mode", "kept")
    compared = [f"{what}: {head}" for what in whats for head in _MEASURES.values()]
    heads = ["mode", "passes", "seconds", "seeds", *_MEASURES.values(), *compared]
    parts = []
    for setting, modes in tables.items():
        rows, lines = [mode.row for mode in modes], []
        reference, amp = reference_of(rows), reference_of(rows, AMP)
        for mode in modes:
            cells = [
                in_markdown(mode.method().label),
                f"{mode.passes:.2f}",
                f"{mode.seconds:.2f}",
                str(len(mode.row.runs)),
            ]
            cells += [spread(mode.row.numbers(name), digits) for name, digits in DIGITS.items()]
            cells += differences((reference, amp), mode.row, DIGITS)
            shares = [kept(reference, amp, mode.row, name) for name in _MEASURES]
            lines.append([*cells, *("-" if share is None else f"{share:.0%}" for share in shares)])
        parts.append(f"### {in_markdown(f'{setting.dataset}, {setting.model}')}\n\n{table(heads, lines)}")
    return "\n\n".join([*parts, _NOTE])


def kept(reference: Row | None, amp: Row | None, row: Row, name: str) -> float | None:
    """Return the share of AMP's gain in one measure.

    The share is None where AMP's own gain is not told from 0, or where fewer than two seeds have all three.
    """
    if reference is None or amp is None or row in (reference, amp):
        return None
    gain = paired(reference, amp, name)
    by_seed = [some.measured(name) for some in (reference, amp, row)]
    seeds = set.intersection(*map(set, by_seed))
    if gain is None or gain.low <= 0 <= gain.high or len(seeds) < 2:
        return None
    erm, full, ours = (mean(some[seed] for seed in seeds) for some in by_seed)
    return (erm - ours) / (erm - full)


def draw(tables: Mapping[Setting, Sequence[Mode]], path: Path) -> None:
    """Draw error and NLL against the measured seconds, two panels a setting; SGD for longer is joined to SGD."""
    title = "What the ascent costs, and what it brings"
    styles = dict(zip((name for name, method in methods().items() if is_mode(method)), _STYLES, strict=False))
    with picture(path, title, (10.5, 0.9 + 3.6 * len(tables)), markdown(tables)) as figure:
        grid = figure.subplots(len(tables), len(_MEASURES), squeeze=False)
        for axes, (setting, modes) in zip(grid, tables.items(), strict=True):
            for panel, (name, head) in zip(axes, _MEASURES.items(), strict=True):
                plain = [(mode.seconds, mode.row.mean(name)) for mode in modes if mode.method().ascent is None]
                panel.plot(*zip(*plain, strict=True), color="0.5", linestyle="--", linewidth=1, zorder=1)
                for mode in modes:
                    numbers = mode.row.numbers(name)
                    colour, mark = styles[mode.row.method]
                    panel.plot([mode.seconds] * len(numbers), numbers, "o", color=colour, markersize=3, alpha=0.5)
                    label = f"{for_matplotlib(mode.method().label)}: {mode.passes:.2f} passes"
                    panel.plot([mode.seconds], [mode.row.mean(name)], mark, color=colour, markersize=7, label=label)
                panel.set_title(for_matplotlib(setting.dataset), loc="left")
                panel.set(xlabel="seconds of a training, SGD = 1 (measured)", ylabel=head)
        legend_below(figure, 3)
