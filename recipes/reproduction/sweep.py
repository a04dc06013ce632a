"""Run cells, some at a time, each in a process of its own under ``accelerate launch``."""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import torch

from amp_plugin.report.ledger import check_ledger
from amp_plugin.train.run_folder import RECORD
from amp_plugin.trainer.checkpoints import check_writable
from reproduction import records
from reproduction.cells import Cell
from reproduction.scale import Scale

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
LOG = "log.txt"
_STARTING = 20.0  # seconds that a child needs to import everything, before its own minutes begin
_GRACE = 10.0  # seconds from asking a child to end to ending it
_LINES = 15  # number of lines of a log that are shown


class Failure(NamedTuple):
    """A cell that could not be run, the exit status of its process, and the log of what it printed."""

    cell: Cell
    status: int
    log: Path

    def __str__(self) -> str:
        """Show the end of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
        head = f"failed with status {self.status}: {self.cell}; {self.log} ends:"
        return "\n".join([head, *(f"    {line}" for line in lines)])


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    cell: Cell
    folder: Path
    lock: IO[str]
    slot: int
    number: str
    start: float


@dataclass
class Sweep:
    """Runs cells that do not stand in the ledger yet.

    Every cell has a folder with a lock, which its process inherits: whoever finds it taken, even after the sweep that
    took it was killed and left the process behind, leaves that cell alone.
    """

    scale: Scale
    ledger: Path  # file to which train.py appends finished runs
    folder: Path  # folder of the cells' folders
    data_root: Path | None = None  # argument of train.py; None for the Hub
    jobs: int = 1  # number of cells that run at the same time
    minutes: float | None = None  # the sweep stops before so many, with checkpoints; None for no limit
    failures: list[Failure] = field(default_factory=list)  # cells that could not be run
    elsewhere: list[Cell] = field(default_factory=list)  # cells that another sweep is running
    stopped: list[Cell] = field(default_factory=list)  # cells that ended early, or did not begin, as time was over
    _begun: float = field(default_factory=time.monotonic, init=False)

    def check(self) -> None:
        """Raise an error where a cell could not be run, or its run not be kept: in the folders and in the ledger."""
        if self.data_root is not None and not self.data_root.is_dir():
            raise ValueError(f"--data_root {self.data_root} is no folder")
        check_writable(self.folder)
        check_ledger(self.ledger)

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the cells in this order; whatever ends this function ends the processes that it has started."""
        pending = self.pending(cells)
        print(f"{len(cells)} cells, {len(cells) - len(pending)} of them in {self.ledger}", flush=True)
        todo = deque((f"[{i}/{len(pending)}]", cell) for i, cell in enumerate(pending, 1))
        slots, running = deque(range(self.jobs)), list[_Child]()
        # SIGTERM, which e.g. a job's time limit sends, ends a sweep as Ctrl-C does.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while todo or running:
                if self._minutes_left() <= 0:
                    self.stopped += [cell for _, cell in todo]
                    todo.clear()
                while todo and slots:
                    if child := self._start(*todo.popleft(), slots[0]):
                        slots.popleft()
                        running.append(child)
                for child in [c for c in running if c.process.poll() is not None]:
                    running.remove(child)
                    slots.append(child.slot)
                    self._finish(child)
                time.sleep(0.1)
        finally:
            _end(running)
            signal.signal(signal.SIGTERM, before)

    def pending(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that do not stand in the ledger."""
        known = records.read(self.ledger)
        return [cell for cell in cells if records.find(cell, self.scale, known) is None]

    def command(self, cell: Cell) -> list[str]:
        """Return the command that runs the cell, and continues it."""
        # Without --quiet its own traceback would end the log of a run that failed.
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", *self.scale.launch]
        output = ["--output_dir", str(self.folder / cell.name(self.scale)), "--ledger", str(self.ledger)]
        data = [] if self.data_root is None else ["--data_root", str(self.data_root)]
        # The cell's own options come later and win.
        shared = ["--cpu_threads", str(max(1, _cores() // self.jobs))] if self.jobs > 1 else []
        shared += [] if self.minutes is None else ["--minutes", f"{max(self._minutes_left(), 0.001):.3f}"]
        # "last" is the last complete checkpoint, or the start if there is none.
        resume = ["--resume_from_checkpoint", "last", "--save_total_limit", "1", "--disable_tqdm", "true"]
        return [*launch, str(TRAIN), *shared, *records.train_argv(cell, self.scale), *data, *output, *resume]

    def _minutes_left(self) -> float:
        """Return the minutes that a cell which begins now may take."""
        return math.inf if self.minutes is None else self.minutes - (time.monotonic() - self._begun + _STARTING) / 60

    def _start(self, number: str, cell: Cell, slot: int) -> _Child | None:
        """Start a cell, unless another sweep runs it or has run it by now."""
        folder = self.folder / cell.name(self.scale)
        folder.mkdir(parents=True, exist_ok=True)
        lock, done = (folder / "lock").open("w", encoding="utf-8"), ""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.elsewhere.append(cell)
            done = "is being run"
        if done or not self.pending([cell]):
            lock.close()
            _say(number, cell, f"{done or 'has been run'} by another sweep")
            return None
        command = self.command(cell)
        with (folder / LOG).open("a", encoding="utf-8") as log:
            print(shlex.join(command), file=log, flush=True)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(_device(slot) if self.jobs > 1 else {})},
                pass_fds=[lock.fileno()],
                start_new_session=True,  # so that it can be ended with all that it has started
            )
        _say(number, cell, f"started; {folder / LOG}")
        return _Child(process, cell, folder, lock, slot, number, time.monotonic())

    def _finish(self, child: _Child) -> None:
        status = child.process.returncode
        known = records.find(child.cell, self.scale, records.read(self.ledger))
        if status == 0 and known is not None:
            for checkpoint in child.folder.glob("checkpoint-*"):  # the weights are saved beside them
                shutil.rmtree(checkpoint, ignore_errors=True)
            metrics = known["metrics"]
            where = "validation" if child.cell.trial else "test"
            figures = f"{where} error {metrics['eval_error']:.2f} %, NLL {metrics.get('eval_nll', math.nan):.3f}"
            _say(child.number, child.cell, f"{figures}; {time.monotonic() - child.start:.0f} s")
        elif status == 0 and not (child.folder / RECORD).exists():
            self.stopped.append(child.cell)
            _say(child.number, child.cell, "stopped; the same command continues")
        else:
            if status == 0:
                with (child.folder / LOG).open("a", encoding="utf-8") as log:
                    print("error: the run ended well, but the ledger does not have these settings", file=log)
            self.failures.append(Failure(child.cell, status, child.folder / LOG))
            _say(child.number, child.cell, f"FAILED with status {status}")
        child.lock.close()


def _say(number: str, cell: Cell, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {number} {cell}: {what}", flush=True)


def _device(slot: int) -> dict[str, str]:
    """Give each of the jobs that run at the same time a GPU of its own, if there are several."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else {}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(children: Sequence[_Child]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(KeyboardInterrupt):  # a second one shortens the grace
            for child in children:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, kind)
            until = time.monotonic() + _GRACE
            while time.monotonic() < until and any(child.process.poll() is None for child in children):
                time.sleep(0.05)
    for child in children:
        child.process.wait()
