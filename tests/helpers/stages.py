"""What is there when the main job fails at any stage, and that the same command goes on from there.

``python tests/helpers/stages.py`` writes the table to STAGES.md; test_stages.py checks that it is what happens. The job
runs in this process, which forks at each stage: one child for each failure meets it there and ends as a user's process
would, and another one then continues from a copy of what it left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from main_job import QUICK
from PIL import Image
from repository import RECORDS
from safetensors import safe_open

from amp_plugin.report import read_ledger
from amp_plugin.report.style import picture
from amp_plugin.text import in_cell
from amp_plugin.train import corrupted, job, results, run_folder
from amp_plugin.train.trainer import RecipeTrainer
from amp_plugin.trainer.checkpoints import CheckpointMixin

PAGE = RECORDS / "STAGES.md"
KILLED, INTERRUPTED, FULL, FULL_ON = "killed", "Ctrl-C", "disk full", "disk full from here on"
TAKEN, FAILS = "a folder in its place", "fails"
WRITING = (KILLED, INTERRUPTED, FULL, FULL_ON, TAKEN)
OTHER = (KILLED, INTERRUPTED, FAILS)
# In the order in which they come: what is written there, and what may happen.
STAGES: dict[str, Sequence[str]] = {
    "config.yaml": WRITING,
    "a line of metrics.jsonl": (KILLED, INTERRUPTED, FULL, FULL_ON),
    "checkpoint-3": (KILLED, INTERRUPTED, FULL, FULL_ON),
    "loading the best checkpoint": OTHER,
    "model.safetensors": WRITING,
    "the final test": OTHER,
    "trainer_state.json": WRITING,
    "the test on corrupted images": OTHER,
    "metrics.jsonl": WRITING,
    "all_results.json": WRITING,
    "the record": OTHER,
    "run.json": WRITING,
    "ledger.jsonl": WRITING,
    "the table": OTHER,
    "curves.png": WRITING,
    "confusion.png": WRITING,
    "reliability.png": WRITING,
    "README.md": WRITING,
    "the push": OTHER,
}
FILES = ["model.safetensors", "trainer_state.json", "all_results.json", "run.json", "ledger.jsonl"]
FILES += ["curves.png", "confusion.png", "reliability.png", "README.md"]
_SETTINGS = [*QUICK, "--save_strategy", "epoch", "--load_best_model_at_end", "true", "--metric_for_best_model", "nll"]
_SETTINGS += ["--push_to_hub", "true", "--corrupted_test_images", "20"]
_FULL = 100  # bytes that no file is as small as
_NO_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)


@dataclass(frozen=True)
class Outcome:
    """What a failure at a stage leads to."""

    stage: str
    failure: str
    code: int  # below 0: the signal that ended the process
    said: list[str]  # on standard error
    left: list[str]  # the results that are there, whole
    broken: list[str]  # files that are there in part, under names that are taken for whole ones
    again: str  # what the same command with --resume_from_checkpoint last comes to


class Explorer:
    """Make a run in this process, and fork at its stages."""

    def __init__(self, folder: Path, chosen: Callable[[str, str], bool]) -> None:
        self.folder, self.chosen, self.outcomes = folder, chosen, list[Outcome]()
        self._reference = folder / "reference"
        self._is_child = False
        self._met: set[str] = set()

    def explore(self) -> list[Outcome]:
        """Meet each failure that was chosen at its stage."""
        with self._patched():
            assert self._forked(lambda: self._job(self._reference))[0] == 0
            self._job(self.folder / "here", explore=True)
        return self.outcomes

    def _job(self, folder: Path, *arguments: str, explore: bool = False) -> None:
        """Run the job; a child never returns."""
        folder.mkdir(exist_ok=True)
        command = [*_SETTINGS, "--output_dir", str(folder / "out"), "--ledger", str(folder / "ledger.jsonl")]
        code: Any = 0
        self._exploring = explore
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                job.run([*command, *arguments])
        except SystemExit as left:
            code = left.code
        except BaseException:
            if not self._is_child:
                raise
            traceback.print_exc()
            code = "traceback"
        self._exploring = False
        if self._is_child:
            if isinstance(code, str):
                print(code, file=sys.stderr)
            sys.stderr.flush()
            os._exit(1 if isinstance(code, str) else int(code or 0))
        assert code == 0, code

    def _forked(self, work: Callable[[], object] | None = None) -> tuple[int, str]:
        """Do some work in a child, or go on there without; return its exit code and its errors here, and "" there."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            self._is_child, self._exploring = True, False
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stderr = os.fdopen(writing, "w")
            os.close(reading)
            if work is not None:
                work()
            return 0, ""
        os.close(writing)
        with os.fdopen(reading) as errors:
            said = errors.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

    def _stage(self, name: str, step: Callable[[], Any], file: Path | None, half: int = 0) -> Any:
        """Make a step of the job: as it is, or in a child for each failure."""
        if not self._exploring or name in self._met:
            return step()
        self._met.add(name)
        for failure in STAGES[name]:
            if self.chosen(name, failure):
                before = self.folder / "before"
                shutil.copytree(self.folder / "here", before)
                code, said = self._forked()
                if self._is_child:
                    return self._meet(failure, step, file, half)
                self.outcomes.append(self._look(name, failure, code, said))
                shutil.rmtree(self.folder / "here")
                before.rename(self.folder / "here")
        return step()

    def _meet(self, failure: str, step: Callable[[], Any], file: Path | None, half: int) -> Any:
        """Let a failure happen in the step: the disk gets full, or the process is killed, in the middle of a file."""
        if failure == INTERRUPTED:
            raise KeyboardInterrupt
        if file is None and failure == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == FAILS:
            raise MemoryError("out of memory")
        assert file is not None
        if failure == TAKEN:
            file.unlink(missing_ok=True)
            (file / "within").mkdir(parents=True)
            return step()
        if failure == KILLED:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL if failure == FULL_ON else half, _NO_LIMIT[1]))
        try:
            return step()
        finally:
            if failure == FULL:
                resource.setrlimit(resource.RLIMIT_FSIZE, _NO_LIMIT)

    def _look(self, stage: str, failure: str, code: int, said: str) -> Outcome:
        """Look at what a child left, and continue from a copy of it, elsewhere."""
        here, again = self.folder / "here", self.folder / "again"
        left = [name for name in FILES if _is_whole(_path_of(here, name))]
        shown = re.sub(r" \([\d,]+ MiB free\)", "", said.replace(f"{here}/", "").replace(str(here), "."))
        lines = [line for line in shown.splitlines() if line.strip()]
        shutil.copytree(here, again)
        for path in list(again.rglob("within")):
            shutil.rmtree(path.parent)
        resumed, complained = self._forked(lambda: self._job(again, "--resume_from_checkpoint", "last"))
        if resumed:
            ended = complained.replace(f"{again}/", "").strip()
        elif missing := [name for name in FILES if not _is_whole(_path_of(again, name))]:
            ended = f"lacks {', '.join(missing)}"
        else:
            ended = "equal" if self._equals_reference(again) else "whole, but different"
        shutil.rmtree(again)
        return Outcome(stage, failure, code, lines, left, list(_broken(here)), ended)

    def _equals_reference(self, folder: Path) -> bool:
        """Compare the weights, the figures and the ledger with those of a run that met no failure."""
        ours, reference = folder / "out", self._reference / "out"
        same = (ours / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
        errors = [json.loads((f / "run.json").read_text())["metrics"]["eval_nll"] for f in (ours, reference)]
        return same and errors[0] == errors[1] and 1 <= len(read_ledger(folder / "ledger.jsonl")) <= 2

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        """Put the stages where the job makes them; small pictures are drawn, and nothing is pushed."""
        with contextlib.ExitStack() as stack:

            def replace(where: Any, name: str, new: Any) -> Any:
                old = getattr(where, name)
                stack.enter_context(mock.patch.object(where, name, new))
                return old

            def do(steps: results.Steps, what: Path | str, step: Callable[[], Any], **options: Any) -> Any:
                name, file = (what, None) if isinstance(what, str) else (what.name, what)
                half = 0 if file is None else self._half(file)
                return plain_do(steps, what, lambda: self._stage(name, step, file, half), **options)

            plain_do = replace(results.Steps, "do", do)

            def config(path: Path, *arguments: Any) -> None:
                self._stage("config.yaml", lambda: plain_config(path, *arguments), path, self._half(path))

            plain_config = replace(job, "write_config", config)

            def line(records: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
                path = Path(args.output_dir, "metrics.jsonl")
                half = path.stat().st_size + 20
                whole = lambda: plain_line(records, args, state, control, **others)  # noqa: E731
                self._stage("a line of metrics.jsonl", whole, path, half)

            plain_line = replace(run_folder.RecordsFile, "on_log", line)

            def checkpoint(trainer: Any, *arguments: Any) -> None:
                name = f"checkpoint-{trainer.state.global_step}"
                if name not in STAGES:
                    return plain_checkpoint(trainer, *arguments)
                path = Path(trainer.args.output_dir, name)
                half = self._half(path.parent / "model.safetensors")
                return self._stage(name, lambda: plain_checkpoint(trainer, *arguments), path, half)

            plain_checkpoint = replace(RecipeTrainer, "_save_checkpoint", checkpoint)

            def best(trainer: Any, *arguments: Any) -> None:
                self._stage("loading the best checkpoint", lambda: plain_best(trainer), None)

            plain_best = replace(CheckpointMixin, "_load_best_model", best)

            replace(RecipeTrainer, "init_hf_repo", lambda trainer: setattr(trainer, "hub_model_id", "ann/run"))
            replace(RecipeTrainer, "_push_from_checkpoint", lambda trainer, folder: None)
            replace(results, "publish", lambda trainer: None)
            replace(corrupted, "SEVERITIES", (5,))  # in a fifth of the time
            for name in ("plot_curves", "plot_confusion", "plot_reliability"):
                replace(run_folder, name, _draw)
            yield

    def _half(self, file: Path) -> int:
        """Return half the size of a file of the run that met no failure; a ledger grows by a line."""
        whole = _path_of(self._reference, file.name)
        return whole.stat().st_size // 2 if whole.exists() else 0


def _path_of(folder: Path, name: str) -> Path:
    return folder / name if name == "ledger.jsonl" else folder / "out" / name


def _draw(*arguments: Any, **options: Any) -> None:
    (path,) = (a for a in arguments if isinstance(a, Path))
    with picture(path, "", (1, 1)):
        pass


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0 and _problem(path) is None


def _problem(path: Path) -> str | None:
    """Return what is wrong with a file that is not whole."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            zipfile.ZipFile(path).close()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "ledger.jsonl":
            read_ledger(path)
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".yaml":
            assert "seed" in yaml.safe_load(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.name == "README.md":
            assert path.read_text().rstrip().endswith("}\n```"), "the citation is its end"
    except Exception as error:
        return repr(error)
    return None


def _broken(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_file() and not any(part.startswith("_") for part in inner.parts) and _problem(path):
            yield str(inner)


def explore(chosen: Callable[[str, str], bool] = lambda stage, failure: True) -> list[Outcome]:
    """Meet failures at the stages; all, or those that are chosen."""
    with tempfile.TemporaryDirectory() as folder:
        return Explorer(Path(folder), chosen).explore()


def row(outcome: Outcome) -> str:
    """Return the outcome as a row of the table."""
    ended = f"{outcome.code}" if outcome.code >= 0 else signal.Signals(-outcome.code).name
    said = re.sub(r"python \S+stages\.py .* --resume", "python train.py ... --resume", " / ".join(outcome.said[:1]))
    more = f" (and {len(outcome.said) - 1} more)" if outcome.said[1:] else ""
    lacking = [name for name in FILES if name not in outcome.left]
    few = len(outcome.left) < len(lacking)
    left = ", ".join(outcome.left) if few else f"all but {', '.join(lacking)}" if lacking else "all"
    broken = f"; in part: {', '.join(outcome.broken)}" if outcome.broken else ""
    cells = (outcome.stage, outcome.failure, ended, f"{said}{more}", f"{left or 'none'}{broken}", outcome.again)
    return f"| {' | '.join(map(in_cell, cells))} |"


def table() -> str:
    """Return the page."""
    heads = ["at", "what happens", "exit", "what is said", "results there", "then"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *map(row, explore())]
    return "\n".join([_HEAD, *lines])


_HEAD = f"""\
# Stages of the main job, and what is left when it fails there

Made by `python tests/helpers/stages.py`; do not edit. The stages are in the order in which they come; those from
`model.safetensors` on are after the training. The job has checkpoints and keeps the best one. Its results are
{", ".join(FILES[:5])},
{", ".join(FILES[5:])}.

*Killed*, and a disk that gets full, is in the middle of a file: the system refuses what is beyond half of its bytes
(`RLIMIT_FSIZE`), or ends the process for it; or, from here on, beyond {_FULL} bytes. "Exit" is the exit code, or the
signal; "results there" are whole files, and "in part" names those that are not whole but look so. "Then" is what the
same command with `--resume_from_checkpoint last` comes to, in a copy of the folder under another name: *equal* means
that it ends well with all results whole, and weights and figures to the bit those of a run that met no failure.
"""

if __name__ == "__main__":
    if cells := sys.argv[1:]:
        for found in explore(lambda stage, failure: f"{stage}: {failure}" in cells):
            print(row(found))
    else:
        PAGE.write_text(table() + "\n")
