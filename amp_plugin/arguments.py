"""Command lines beside the main job's: an error is a ValueError of one line, and a value is checked as it is read."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from amp_plugin.intervals import demand
from amp_plugin.suggest import did_you_mean


class OneLine(argparse.ArgumentParser):
    """Raise a ValueError of one line where argparse would print the usage and exit."""

    may_be_blank: tuple[str, ...] = ()  # options that mean something without any characters

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError."""
        raise ValueError(re.sub(r"^argument ([^:/]+)[^:]*", r"\1", message))

    def check_texts(self, values: argparse.Namespace) -> None:
        """Refuse a text without characters, which is a variable of the shell that is not set, most of the time."""
        for action in self._actions:
            value = getattr(values, action.dest, None)
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str) or value == action.default:
                    continue
                if not text.strip() and action.dest not in self.may_be_blank:
                    name = f"--{action.dest}" if action.option_strings else action.dest
                    self.error(f"{name} is empty; give a value{', or leave it out' if action.option_strings else ''}")
                if "\0" in text:
                    self.error(f"--{action.dest} has a NUL character: {text!r}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check that a value is one of the option's choices; argparse's own message has no suggestion."""
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            said = f"invalid choice: {value!r}{did_you_mean(str(value), known)}; choose one of {', '.join(known)}"
            raise argparse.ArgumentError(action, said)


class Parser(OneLine):
    """Parse options that are written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the values by option."""
        known, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("-"):
                name = word.partition("=")[0]
                self.error(f"no option {name!r}{did_you_mean(name, self._option_string_actions)}; --help lists them")
            self.error(f"unexpected {word!r}; --help tells what there is to say")
        self.check_texts(known)
        return known


def number(kind: type[int] | type[float], interval: str) -> Callable[[str], Any]:
    """Return what reads a number in an interval, such as ``"[1, inf)"``, as the ``type`` of an argument."""

    def read(text: str) -> int | float:
        value = kind(text)
        if must := demand(interval, value):
            raise argparse.ArgumentTypeError(f"must be {must}, got {value}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def path(text: str) -> Path:
    """Read a path, as the ``type`` of an argument."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


def words(text: str) -> list[str]:
    """Read a text of several arguments as a shell would, as the ``type`` of an argument."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def different(names: Sequence[Any] | None, option: str) -> None:
    """Raise a ValueError if a value of an option is given twice."""
    if twice := [name for i, name in enumerate(names or ()) if name in (names or ())[:i]]:
        raise ValueError(f"{option}: {twice[0]} is given twice")
