"""Inputs for every option of a command, made of the options' own types, and what comes of each.

A command runs in this process, as far as to where its work begins: a training, a measurement, a page.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import signal
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers.hf_argparser import string_to_bool

from amp_plugin.command import in_one_line
from amp_plugin.train.json_options import JSON_OPTIONS

OK = "ok"
_NUMBERS = ("", "wide", "nan", "inf", "-1", "-0.5", "0", "0.5", " 3 ", "9" * 30)
_SWITCHES = ("", "maybe", "true", "no")
_TEXTS = (" ", "nosuch", "two\nlines", "caf\udce9", "{folder}", "{file}", "{missing}")
_OBJECTS = ("", "{", "[1]", "{}", '{"nosuch": 1}', '{"a": 1, "a": 2}', "nosuch", "{folder}", "{file}", "[" * 9999)
_SECONDS = 20  # until an input counts as one that never ends


class Begins(BaseException):
    """The work of a command would begin, with this configuration; no code of a command catches it."""

    def __init__(self, *configuration: Any) -> None:
        self.configuration = configuration


class Command(NamedTuple):
    """A command to give inputs to.

    Attributes:
        actions: its options.
        main: what it does with a command line; raises `Begins` in place of its work.
        mistakes: errors that end it in one line.
        given: options beside the one that is tried.
    """

    actions: list[argparse.Action]
    main: Callable[[list[str]], object]
    mistakes: tuple[type[BaseException], ...]
    given: Callable[[str], list[str]] = lambda name: []


class Ending(NamedTuple):
    """How a command ended, what it printed, and its configuration where its work would have begun."""

    outcome: str  # OK, or the error's line
    printed: str = ""
    configuration: tuple[Any, ...] = ()


def name_of(action: argparse.Action) -> str:
    """Return an option's first name."""
    return next(word for word in action.option_strings if word.startswith("--")).lstrip("-")


def inputs_of(action: argparse.Action) -> Iterator[list[str]]:
    """Yield the words of one option, wrong and right: a value each, none, and a name that misses its last letter."""
    name = f"--{name_of(action)}"
    yield [f"{name[:-1]}=1"]
    if action.nargs == 0:
        yield [name]
        yield [f"{name}=1"]
        return
    for value in _values(action):
        yield [f"{name}={value}"]
    if action.nargs != "?":
        yield [name]


def _values(action: argparse.Action) -> tuple[str, ...]:
    kind = getattr(action.type, "__name__", "")
    if action.type is string_to_bool:
        return _SWITCHES
    if action.choices is not None:
        words = [str(word) for word in action.choices]
        return ("", "nosuch", words[0].upper(), words[-1][:-1], words[0], words[-1])
    if kind in ("int", "float"):
        return _NUMBERS
    return _OBJECTS if action.dest in JSON_OPTIONS else _TEXTS


def ending(command: Command, words: list[str], name: str) -> Ending:
    """Run a command up to where its work begins; an end that no user can read is an AssertionError."""
    words = [*command.given(name), *words]
    with contextlib.ExitStack() as held:
        printed = held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        told = held.enter_context(contextlib.redirect_stderr(io.StringIO()))
        held.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        held.enter_context(_as_before(os.environ))
        held.enter_context(_at_most(_SECONDS))
        try:
            command.main(words)
        except Begins as begun:
            return Ending(OK, printed.getvalue(), begun.configuration)
        except command.mistakes as error:
            if "usage:" not in told.getvalue() and str(error).strip():
                return Ending(_own_words(in_one_line(error), error))
            raise AssertionError(f"{words} ends in {error!r}, and {told.getvalue()!r}") from error
        except Exception as error:
            raise AssertionError(
                f"{words} ends in a traceback: {''.join(traceback.format_exception(error))}"
            ) from error
    raise AssertionError(f"{words} did nothing")


@contextlib.contextmanager
def _as_before(environment: Any) -> Iterator[None]:
    before = dict(environment)
    try:
        yield
    finally:
        environment.clear()
        environment.update(before)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _own_words(line: str, error: BaseException) -> str:
    """Replace the words of a library in an error, which differ from version to version, by the library's name."""
    cause: BaseException | None = error
    while cause is not None:
        package = _raised_in(cause)
        said = " ".join(str(cause).split())
        if package and said:
            whole, beginning = " ".join(line.split()), " ".join(said.split()[:3])
            if said in whole:
                return whole.replace(said, f"({package} tells why)")
            if beginning in whole:  # shortened
                return f"{whole[: whole.index(beginning)]}({package} tells why)"
        cause = cause.__cause__
    return line


def _raised_in(error: BaseException) -> str:
    """Name the library whose code raised an error; the name is empty for this project's code."""
    frames = traceback.extract_tb(error.__traceback__)
    places = {key: Path(sysconfig.get_path(key)) for key in ("purelib", "stdlib")}
    file = Path(frames[-1].filename) if frames else Path()
    if file.is_relative_to(places["purelib"]):
        return file.relative_to(places["purelib"]).parts[0]
    return "Python" if file.is_relative_to(places["stdlib"]) and file.name != "argparse.py" else ""


def asked_for(action: argparse.Action, words: list[str]) -> Any:
    """Return the value that words on a command line ask of an option, as its type reads it."""
    values = [word.partition("=")[2] for word in words if "=" in word]
    if not values:
        return action.const
    read: Any = json.loads if action.dest in JSON_OPTIONS else action.type or str
    return read(values[-1])


def is_what_was_asked(value: Any, asked: Any) -> bool:
    """Compare a value of a configuration with what was asked for; transformers makes objects of some words."""
    if dataclasses.is_dataclass(value):
        return all(getattr(value, name) == part for name, part in asked.items())
    if isinstance(asked, bool) and value in ("all", "no"):
        value = value == "all"
    if isinstance(asked, dict) and isinstance(value, str):
        value = json.loads(value)
    value = getattr(value, "value", value)
    return value in (asked, [asked])
