"""Let Ctrl-C end a command where there is nothing to lose yet, or nothing any more, without a traceback."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # as a shell reports SIGINT
_STDERR = 2


def leave_while_importing() -> None:
    """Let Ctrl-C end this process at once if it is about to run a command of this package; imports take seconds.

    `run_command` takes that back. Python calls the program "-m" until it has found the module that it is to run.
    """
    module = sys.argv[:1] == ["-m"] and any(word.startswith("amp_plugin") for word in sys.orig_argv)
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "train.py"
    if module or (sys.argv[:1] != [""] and Path(*sys.argv[:1]).resolve() == recipe):
        _replace(signal.default_int_handler, _tell_and_leave)


def raise_when_interrupted() -> None:
    """Let Ctrl-C raise a KeyboardInterrupt again after the imports."""
    _replace(_tell_and_leave, signal.default_int_handler)


def leave_when_interrupted_again() -> None:
    """Let another Ctrl-C end this process, which is about to leave, at once."""
    _replace(signal.default_int_handler, _leave)


def _replace(old: Any, new: Any) -> None:
    """Leave a handler of others as it is, and so a signal that is ignored in the background."""
    try:
        if signal.getsignal(signal.SIGINT) is old:
            signal.signal(signal.SIGINT, new)
    except ValueError:  # this is not the main thread
        pass


def _tell_and_leave(*_: object) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # every process of a launcher is interrupted, and one tells
        os.write(_STDERR, b"\ninterrupted\n")
    _leave()


def _leave(*_: object) -> None:
    os._exit(INTERRUPTED)
