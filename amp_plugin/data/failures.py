"""Tell why Hugging Face Datasets cannot read some files: its exception hides the cause, and its log has the file."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amp_plugin.files import in_one_line, innermost, trouble

_TEXTS = (".csv", ".json", ".jsonl", ".ndjson", ".tsv", ".txt")
_LINES = (".jsonl", ".ndjson")
_IN_LOG = re.compile(r"file '(.+?)' with error")
_IN_ERROR = re.compile(r"was generating data using\s+([^\n]+?)(?:, \['|\n)")


class _Collector(logging.Handler):
    def __init__(self, others: list[logging.Handler]) -> None:
        super().__init__()
        self.others, self.errors = others, []  # type: tuple[list[logging.Handler], list[str]]

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self.errors.append(record.getMessage())
        else:
            for other in self.others:
                other.handle(record)


@contextmanager
def logged_errors() -> Iterator[list[str]]:
    """Collect the errors that Datasets logs, which would stand on the terminal before the one line of ours."""
    logger = logging.getLogger("datasets")
    handlers = logger.handlers
    collector = _Collector(handlers)
    logger.handlers = [collector]
    try:
        yield collector.errors
    finally:
        logger.handlers = handlers


def reason(error: Exception, logged: list[str], path: str) -> str:
    """Tell which file of a data set cannot be read, and why.

    Args:
        error: what Datasets has raised.
        logged: what it has logged.
        path: folder of the data set, or its name on the Hub.
    """
    from datasets.table import CastError

    said = str(error)
    found = [match[1] for text in logged if (match := _IN_LOG.search(text))]
    found += [match[1] for match in _IN_ERROR.finditer(said)]
    for file in map(Path, found or sorted(map(str, Path(path).rglob("*")))):
        if problem := _problem(file):
            return f"{str(file)!r} {problem}"
    cause = innermost(error)
    why = f"{type(cause).__name__}: {in_one_line(str(cause))}" if str(cause) else type(cause).__name__
    if _IN_ERROR.search(said):  # its second paragraph tells which columns differ
        why = in_one_line(said.split("\n\n")[1])
    elif isinstance(cause, CastError):
        here, others = (", ".join(sorted(names)) for names in (cause.table_column_names, cause.requested_column_names))
        why = f"all files must have the same columns, and one has {here} where others have {others}"
    return f"{found[0]!r} cannot be read ({why})" if found else why


def _problem(path: Path) -> str | None:
    """Tell what is wrong with a file of texts, and in which line; None if nothing is, or in a file of another kind."""
    if path.suffix not in _TEXTS or not path.is_file():
        return None
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in text:
                    return f"is damaged: line {number} holds bytes that are zero"
                if path.suffix in _LINES and text.strip() and not isinstance(json.loads(text), dict):
                    return f"has a line {number} that is no JSON object"
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return f"is no text in UTF-8: line {number} has the byte {byte:#04x}; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return f"has a line {number} that is no JSON ({in_one_line(error)})"
    except OSError as error:
        return trouble(error)
    return "is empty" if number == 0 else "has no rows" if number == 1 and path.suffix in (".csv", ".tsv") else None
