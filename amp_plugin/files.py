"""Read files that come from elsewhere: whatever is wrong with one is told in a line that names the file."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import type_validator
from safetensors import safe_open

_LONGEST = 200


class FileError(ValueError):
    """A file cannot be used; the message names it, and tells what is wrong and what to do."""


@contextlib.contextmanager
def blamed(path: Path, advice: str) -> Iterator[None]:
    """Turn whatever is raised while a file is read into a `FileError`, which ends with the advice."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # what a library raises at damage may be anything
        raise FileError(f"{str(path)!r} {trouble(error)}; {advice}") from error


def read_text(path: Path, advice: str) -> str:
    """Return what a file in UTF-8 says, without the mark that some editors put at its beginning."""
    with blamed(path, advice):
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path, advice: str) -> Any:
    """Return what a file in JSON says."""
    text = read_text(path, advice)
    with blamed(path, advice):
        return json.loads(text)


def check_safetensors(path: Path, advice: str) -> None:
    """Raise a `FileError` unless a file has as many bytes as its tensors need; their numbers are not read."""
    with blamed(path, advice), safe_open(path, "pt"):
        pass


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], path: Path, advice: str) -> None:
    """Raise a `FileError` if a value in a file is not of its type."""
    if wrong := misfit(values, hints):
        raise FileError(f"{str(path)!r} is damaged ({wrong}); {advice}")


def misfit(values: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    """Tell the first value that is not of its type, where an integer is a float too; the text is empty without one."""
    wrong = (name for name, hint in hints.items() if name in values and not _fits(values[name], hint))
    return next((f"{name} is {in_one_line(repr(values[name]))}" for name in wrong), "")


def trouble(error: BaseException) -> str:
    """Say what is wrong with a file, as the rest of a sentence that begins with its name."""
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a file"
    if isinstance(error, OSError):
        return f"cannot be read ({in_one_line(error.strerror or error)})"
    if isinstance(error, UnicodeDecodeError):
        return f"is no text in UTF-8 (byte {error.start} is {error.object[error.start]:#04x})"
    if isinstance(error, RecursionError):
        return "is damaged (it is nested too deeply)"
    if isinstance(error, pickle.UnpicklingError):  # torch's message says how to run the code in it
        return "is damaged (it holds more than numbers and tensors)"
    return f"is damaged ({in_one_line(error)})"


def in_one_line(said: object) -> str:
    """Return a library's message without the paragraphs of advice that may follow it; a bare error has its name."""
    text = " ".join(str(said).split()).rstrip(".") or type(said).__name__
    if isinstance(said, (LookupError, TypeError, AttributeError)):  # their message alone says little
        text = f"{type(said).__name__}: {text}"
    return text if len(text) < _LONGEST else text[:_LONGEST].rpartition(". ")[0] or f"{text[:_LONGEST]} ..."


def innermost(error: BaseException) -> BaseException:
    """Return the error that began a chain of errors."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return error


def _fits(value: Any, hint: Any) -> bool:
    for candidate in (value, float(value)) if type(value) is int and abs(value) < 2**1000 else (value,):
        with contextlib.suppress(TypeError):
            type_validator("", candidate, hint)
            return True
    return False
