"""Let one job at a time write to an output folder."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from amp_plugin.trainer.checkpoints import explained

_LOCK = "_lock"  # uploads to the Hub leave out names that begin with "_"


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder that exists, for as long as this process lives at most.

    The system lets go of the lock when the process ends, however it ends, and the processes that load its data do not
    inherit the lock: a job that is restarted at once after a kill finds the folder free.

    Raises:
        ValueError: Another process holds the folder.
    """
    path = folder / _LOCK
    if sys.platform == "win32":
        from filelock import FileLock, Timeout

        try:
            with FileLock(path, timeout=0):
                yield
        except Timeout:
            raise _taken(folder, "") from None
        return
    import fcntl

    with contextlib.ExitStack() as stack:
        with explained("the lock", folder):
            file = stack.enter_context(path.open("a+", encoding="utf-8", errors="replace"))
        try:
            # Not flock, which a forked process inherits: a data worker outlives its killed parent for some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise _taken(folder, file.read()) from None
        except OSError as error:  # some network file systems have no locks
            print(f"note: {str(folder)!r} cannot be locked ({error.strerror}): let no other job write there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raise a ValueError if another process holds a folder; the folder is neither made nor held."""
    path = folder / _LOCK
    if sys.platform == "win32" or not path.exists():
        return
    import fcntl

    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _taken(folder, file.read()) from None
        except OSError:  # this file system has no locks
            pass


def _taken(folder: Path, holder: str) -> ValueError:
    who = f" ({holder})" if holder else ""
    return ValueError(
        f"another job{who} is writing to {str(folder)!r}: wait for its end, or choose another --output_dir"
    )
