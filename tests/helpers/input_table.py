"""What comes of inputs to the options of every command: INPUTS.md.

python tests/helpers/input_table.py > tests/records/INPUTS.md    # a minute
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import transformers
from option_inputs import OK, Begins, Command, Ending, ending, inputs_of, name_of
from repository import ROOT
from transformers import TrainingArguments

from amp_plugin.data import DatasetError
from amp_plugin.hub import HubError
from amp_plugin.text import in_code, in_markdown, shortened, visible
from amp_plugin.train import job, options
from amp_plugin.train.command_line import CommandLine
from amp_plugin.trainer.checkpoints import SaveError

# Data and model are made for these, as they are looked at there; for the others that takes too long.
_MADE = {field for kind in (options.DataArguments, options.ModelArguments) for field in kind.__dataclass_fields__}
_TINY = ["--train_images", "60", "--model_kwargs", '{"width": 4, "layers": [1, 1, 1, 1]}']
_ERRORS = (DatasetError, HubError, SaveError, ValueError, OSError)

Endings = dict[str, dict[str, dict[tuple[str, ...], Ending]]]  # by command, option and words


def _begin(*configuration: Any, **_: Any) -> Any:
    raise Begins(*configuration)


def _train(argv: list[str]) -> None:
    made = any(word.partition("=")[0].lstrip("-") in _MADE for word in argv)
    parsed: list[Any] = []

    def parse(*args: Any) -> Any:
        parsed[:] = options.parse(*args)
        return parsed

    with contextlib.ExitStack() as held:
        for name, stand_in in {
            "parse": parse,
            "check_room" if made else "make_task": lambda *a, **k: _begin(*parsed),
            "plan": lambda *a: _begin(*parsed),
            "set_cpu_threads": lambda requested: 1,
            "keep_freed_memory": lambda: None,
        }.items():
            held.enter_context(patch.object(job, name, stand_in))
        job.main(argv)


def trainings() -> Command:
    """The main job."""

    def given(name: str) -> list[str]:
        words = ["--use_cpu", "true", *(_TINY if name in _MADE else [])]
        return [*words, *([] if name == "output_dir" else ["--output_dir", "out"])]

    return Command(_options(CommandLine(options.TYPES)), _train, _ERRORS, given)


def _parsed_by_argparse(main: Callable[[list[str]], object], works: Iterable[str], *given: str) -> Command:
    """A command whose configuration is what argparse returns; its work begins with a call of any of `works`."""
    parse, found = argparse.ArgumentParser.parse_known_args, []

    def remember(parser: argparse.ArgumentParser, *args: Any) -> Any:
        known = parse(parser, *args)
        found.append((parser, known[0]))
        return known

    def run(argv: list[str]) -> None:
        found.clear()
        with contextlib.ExitStack() as held:
            held.enter_context(patch.object(argparse.ArgumentParser, "parse_known_args", remember))
            for work in works:
                held.enter_context(patch(work, lambda *_, **__: _begin(found[0][1])))
            main(argv)

    with place(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Begins):
        run(list(given))
    return Command(_options(found[0][0]), run, _ERRORS, lambda name: [] if f"--{name}" in given else list(given))


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def _without_cuda(main: Callable[[list[str]], object]) -> Callable[[list[str]], object]:
    def run(argv: list[str]) -> None:
        with patch("torch.cuda.is_available", lambda: False):
            main(argv)

    return run


def _as_script(main: Callable[[], object]) -> Callable[[list[str]], object]:
    """A main function that reads the command line of its process."""

    def run(argv: list[str]) -> None:
        with patch.object(sys, "argv", ["script.py", *argv]):
            main()

    return run


@cache
def commands() -> dict[str, Command]:
    """All commands that have options, by name."""
    names = ("reproduce", "benchmark", "benchmarks.device", "epsilon_sweep", "epsilon_ladder", "make_sample")
    reproduce, benchmark, device, sweep, ladder, sample = map(importlib.import_module, names)
    flatness, hub = (importlib.import_module(f"amp_plugin.{name}.__main__") for name in ("flatness", "hub"))
    cells = ["reproduction.sweep.Sweep.run", "reproduction.sweep.Sweep.pending", "reproduction.price.price"]
    tables = ["reproduce.choose", "reproduce.rows_of", "reproduction.trade_off.seconds_of"]
    in_folder, on_cpu = ["--output", "out"], ["--device", "cpu"]
    by = _parsed_by_argparse
    return {
        "train.py": trainings(),
        "reproduce.py": by(reproduce.main, [*cells, *tables], "--methods", "erm", "amp"),
        "benchmark.py": by(benchmark.main, ["benchmark.measure"], "--only", "counts"),
        "benchmark.py --device": by(
            _without_cuda(device.main), ["benchmarks.device.parts", "benchmarks.device.draw"], *on_cpu
        ),
        "epsilon_sweep.py": by(sweep.main, ["epsilon_sweep.write_part"]),
        "epsilon_ladder.py": by(ladder.main, [cells[0], "epsilon_ladder.found_in"]),
        "make_sample.py": by(_as_script(sample.main), ["make_sample.load_images"], *in_folder),
        "python -m amp_plugin.flatness": by(flatness.main, ["amp_plugin.flatness.__main__.open_run"], "a_folder"),
        "python -m amp_plugin.hub": by(hub.main, ["amp_plugin.hub.__main__.push_folder"], "a_folder", "ann/model"),
    }


@contextlib.contextmanager
def place() -> Iterator[None]:
    """Work in a new folder, with what the inputs name: a folder and a file that is a text."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("a_folder").mkdir()
            Path("a_file.txt").write_text("a text\n")
            yield
        finally:
            os.chdir(before)


_PLACES = {"{folder}": "a_folder", "{file}": "a_file.txt", "{missing}": "missing/below"}


def in_place(words: Iterable[str]) -> list[str]:
    """Return words with the names of folders and files put in."""
    said = []
    for word in words:
        for name, path in _PLACES.items():
            word = word.replace(name, path)
        said.append(word)
    return said


def endings() -> Endings:
    """Give all inputs to all commands; an option with values that are taken is given the first and the last of them."""
    found: Endings = {}
    for name, command in commands().items():
        found[name] = {}
        for action in command.actions:
            of_option = found[name][name_of(action)] = {}

            def end(words: tuple[str, ...], command: Command = command, option: str = action.dest) -> Ending:
                with place():
                    return ending(command, in_place(words), option)

            inputs = [tuple(words) for words in inputs_of(action)]
            of_option |= {words: end(words) for words in inputs}
            taken = [words for words in inputs if of_option[words].outcome == OK]
            if taken:
                twice = (*taken[0], *taken[-1])
                of_option[twice] = end(twice)
    return found


def sections(found: Endings) -> dict[str, str]:
    """The table in parts, by title: options and inputs with one outcome share a row."""
    titles: dict[str, dict[tuple[str, ...], tuple[list[str], list[str]]]] = {}
    for command, by_option in found.items():
        for option, by_words in by_option.items():
            stock = command == "train.py" and option in TrainingArguments.__dataclass_fields__
            rows = titles.setdefault(
                f"{command}, options of transformers {transformers.__version__}" if stock else command, {}
            )
            outcomes: dict[str, list[str]] = {}
            for words, end in by_words.items():
                outcomes.setdefault(_template(option, words, end.outcome), []).append(_input(option, words))
            for outcome, inputs in outcomes.items():
                rows.setdefault((outcome, *inputs), ([], inputs))[0].append(option)
    tables = {}
    for title, rows in titles.items():
        lines = ["| options | inputs | outcome |", "| --- | --- | --- |"]
        for (outcome, *_), (names, inputs) in rows.items():
            options, said = " ".join(in_code(f"--{name}") for name in names), ", ".join(dict.fromkeys(inputs))
            lines.append(f"| {options} | {said} | {in_markdown(outcome)} |")
        tables[title] = "\n".join(lines)
    return tables


def _input(option: str, words: tuple[str, ...]) -> str:
    if len(words) > 1:
        return "twice"
    name, equals, value = words[0].partition("=")
    if not name.endswith(option):
        return "its name cut short"
    return in_code(shortened(value, 20)) if equals else "no value"


def _template(option: str, words: tuple[str, ...], outcome: str) -> str:
    """Return an outcome without the value and the option's name, so that outcomes of one kind are the same text."""
    if len(words) > 1 and outcome == OK:
        return "ok; the last one counts"
    name, _, value = in_place(words)[-1].partition("=")
    text = outcome.replace(str(ROOT), "").replace(f"'{name}'" if not name.endswith(option) else name, "NAME")
    text = re.sub(rf"--{option}\b", "NAME", text)
    plain = (value, visible(value), " ".join(value.split())) if len(value) > 3 else ()
    text = text.replace(repr(value), "VALUE")
    for said in plain:
        text = re.sub(rf"(?<!\w){re.escape(said)}(?!\w)", "VALUE", text)
    return re.sub(r"got (?!VALUE)\S+?(?=;|$)", "got VALUE", text)


def table(found: Endings) -> str:
    """The record as a Markdown document."""
    count = sum(len(by_words) for by_option in found.values() for by_words in by_option.values())
    taken = sum(end.outcome == OK for o in found.values() for w in o.values() for end in w.values())
    head = f"""# Inputs and what comes of them

Made by `python tests/helpers/input_table.py > tests/records/INPUTS.md`; do not edit. Each option of each command is
given values of its type and of others, no value, two values, and a name that is cut short: {count:,} inputs, of which
{taken:,} are taken and the others end in one line, before any work is done. A value that is taken is in the
configuration as it was given, or a line says why not. In the outcomes NAME is the option's, VALUE the input; what a
library says is left to the library. `{{folder}}` is a folder, `{{file}}` a text, `{{missing}}` a path below nothing.
"""
    return "\n".join([head, *(f"## {title}\n\n{text}\n" for title, text in sections(found).items())])


if __name__ == "__main__":
    sys.path.append(str(ROOT / "recipes"))
    print(table(endings()), end="")
