"""recipes/train.py, which kills itself where a plan says so; test_failures.py runs it in processes of its own.

    python tests/helpers/failing_train.py DIARY [arguments of train.py]

DIARY is a JSON Lines file. What is to happen is read from ``DIARY.plan``, a JSON list of kills in their order::

    {"rank": 1, "step": 3, "where": "descent"}    # SIGKILL when 3 steps are done and the weights are at theta + delta
    {"rank": 0, "step": 3, "where": "ascent"}     # ... and the gradient for the ascent is to be computed
    {"rank": 0, "step": 4, "where": "save", "event": 7}    # at that event of the file system while step 4 is saved
    {"rank": 1, "step": 4, "where": "full"}       # not a kill: no file can be written while step 4 is saved

What happened is appended to DIARY: starts, steps and kills.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from repository import ROOT
from transformers import TrainerCallback

import amp_plugin

RANK = int(os.environ.get("RANK", "0"))
DIARY = Path(sys.argv[1])
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


def note(**entry: Any) -> None:
    with DIARY.open("a") as diary:
        diary.write(json.dumps({**entry, "time": time.time()}) + "\n")


def next_event() -> dict[str, Any]:
    """The first event of the plan that has not happened; empty if there is none, or if it is another process's."""
    entries = [json.loads(line) for line in DIARY.read_text().splitlines()] if DIARY.exists() else []
    done = sum(entry["what"] == "kill" for entry in entries)
    plan = json.loads(Path(f"{DIARY}.plan").read_text())
    return plan[done] if done < len(plan) and plan[done]["rank"] == RANK else {}


class FailingTrainer(amp_plugin.AMPTrainer):
    """`AMPTrainer` that dies as planned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(Diary())
        self._events = 0

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        perturbed = self.amp is not None and self.amp.perturbed
        if model.training and self._due("descent" if perturbed else "ascent"):
            self._die()
        return super().compute_loss(model, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._due("save"):
            sys.addaudithook(self._audit)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self._due("full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
        try:
            super()._save_checkpoint(model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def _audit(self, name: str, arguments: tuple[object, ...]) -> None:
        if name in EVENTS and self._due("save"):
            if self._events == PLANNED["event"]:
                self._die(at=f"{name} {Path(str(arguments[0])).name}")
            self._events += 1

    def _due(self, where: str) -> bool:
        return PLANNED.get("where") == where and PLANNED["step"] == self.state.global_step

    def _die(self, **facts: Any) -> None:
        planned = dict(PLANNED)
        PLANNED.clear()  # the note is an event of the file system too
        note(what="kill", **planned, **facts)
        os.kill(os.getpid(), signal.SIGKILL)


class Diary(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if RANK == 0:
            note(what="start", step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if RANK == 0:
            note(what="step", step=state.global_step)


PLANNED = next_event()
if __name__ == "__main__":
    amp_plugin.AMPTrainer = FailingTrainer  # type: ignore[misc]
    program = ROOT / "recipes" / "train.py"
    sys.path[0], sys.argv = str(program.parent), [str(program), *sys.argv[2:]]
    runpy.run_path(str(program), run_name="__main__")
