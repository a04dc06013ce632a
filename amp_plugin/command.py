"""Run a command: one line tells what ended it, and an output that is closed or full stops no work."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from amp_plugin.interrupts import INTERRUPTED, leave_when_interrupted_again, raise_when_interrupted
from amp_plugin.text import for_terminal, print_all_characters

_STDERR = 2
_CLOSED = 141  # as a shell reports SIGPIPE
_PATIENCE = 30.0  # seconds for the same mistake to reach the first process, which may take some of them to end
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)


class Output(io.RawIOBase):
    """Write to a descriptor, until an error; then to nowhere."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.error = descriptor, 0  # the error's number
        self.at_work = True  # the user waits for more than this output

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Tell whether a user sees the output."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Say yes."""
        return True

    def write(self, data: Any, /) -> int:
        """Return the number of bytes that were written or dropped."""
        if not self.error:
            try:
                return os.write(self._descriptor, data)
            except OSError as error:
                self.error = error.errno or errno.EIO
                if self.at_work and self._descriptor != _STDERR:
                    _tell(f"the output cannot be written any more ({error.strerror}); the work goes on")
        return len(data)


def run_command(main: Callable[[], object], mistakes: tuple[type[Exception], ...]) -> None:
    """Call the main function of a command, and end the process unless all went well.

    A reader that has gone, as in ``train.py | head``, or a full disk below the output does not end a training: the
    results are worth more than what is printed. The exit code tells it at the end.

    Args:
        main: what the command does. A text that it returns, or exits with, is told as an error; of the processes of a
            launcher that have one, the first tells it, and another only where the first has none.
        mistakes: errors whose message tells the user all.
    """
    outputs: list[Output] = []
    code: Any
    try:
        raise_when_interrupted()
        outputs += [output for name in ("stdout", "stderr") if (output := _outlive(name)) is not None]
        print_all_characters()
        code = main()
    except KeyboardInterrupt as interrupt:
        leave_when_interrupted_again()
        if _is_first():  # every process of a launcher is interrupted, and one tells
            _tell(f"\ninterrupted{f': {interrupt}' if str(interrupt) else ''}")
        code = INTERRUPTED
    except SystemExit as left:
        code = left.code
    except mistakes as error:
        code = f"error: {in_one_line(error)}"
    except OSError as error:
        code = f"error: {in_words(error)}"
    if isinstance(code, str) and not _is_first():
        # Most likely the first process meets the same, tells it, and the launcher then ends this one.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_PATIENCE)
    for output in outputs:
        output.at_work = False
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    errors = [output.error for output in outputs if output.error]
    if errors and not code:
        code = _CLOSED if errno.EPIPE in errors else 1
    if code:
        sys.exit(for_terminal(code) if isinstance(code, str) else code)


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def in_one_line(error: Exception) -> str:
    """Return the message of an error, which may quote a name or a library's text of several lines."""
    return " ".join(map(str.strip, str(error).splitlines())).strip() or type(error).__name__


def in_words(error: OSError) -> str:
    """Tell what the system refuses, and what to set where that is a cache of a library."""
    said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    said = "\n".join(" ".join(line.split()) for line in said.splitlines()) or type(error).__name__
    home = os.path.expanduser("~")
    cached = "cache" in str(error.filename).lower() or str(error.filename).startswith(os.path.join(home, "."))
    if error.errno in _UNWRITABLE and cached:
        said += "; the caches need a folder that can be written to: set HF_HOME, or XDG_CACHE_HOME for all of them"
    return said


def _tell(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr)


def _outlive(name: str) -> Output | None:
    """Let a standard stream outlive its reader; a stream that is a test's or a notebook's own stays as it is."""
    stream = getattr(sys, name)
    if stream is None:  # it was closed before the start; no file that is opened later shall get its descriptor
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
            pass
        setattr(sys, name, os.fdopen(descriptor, "w"))
    elif stream is getattr(sys, f"__{name}__"):
        stream.flush()
        output = Output(stream.fileno())
        like = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(output), **like))
        return output
    return None
