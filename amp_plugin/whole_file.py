"""Write files whole or not at all, whatever ends the process or fills the disk meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield another name in the folder of a file to write to; the file gets what was written there if all of it was.

    The other name begins with "_", as what uploads to the Hub leave out. A process that is killed leaves that name, and
    the next one writes it anew.
    """
    new = path.with_name(f"_{path.name}")
    try:
        yield new
        sync(new)
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a value as JSON, whole or not at all; what JSON cannot hold becomes text."""
    write_text(path, json.dumps(value, default=str, **options) + "\n")


def sync(path: Path) -> None:
    """Write a file to the disk, so that a power failure after a renaming does not lose it and late errors show."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
