"""recipes/train.py, of which one process fails in one step after the training; test_several_processes.py runs it.

python tests/helpers/failing_stage.py RANK STEP ERROR [arguments of train.py]
"""

from __future__ import annotations

import builtins
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repository import ROOT

from amp_plugin.train.results import Steps

rank, failing, error, *arguments = sys.argv[1:]
plain = Steps.do


def do(steps: Steps, what: Path | str, step: Callable[[], Any], **options: Any) -> Any:
    """Make a step of this process, or fail in its place."""

    def fail() -> None:
        if error == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise getattr(builtins, error)("of this process")

    here = os.environ.get("RANK") == rank and str(getattr(what, "name", what)) == failing
    return plain(steps, what, fail if here else step, **options)


if __name__ == "__main__":
    Steps.do = do  # type: ignore[assignment]
    program = ROOT / "recipes" / "train.py"
    sys.path[0], sys.argv = str(program.parent), [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")
