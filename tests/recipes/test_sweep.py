"""What recipes/reproduce.py starts: runs of the main job, one by one or as tasks of a cluster."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reproduce
from repository import ROOT
from reproduction import records, slurm
from reproduction.cells import Cell, Selection
from reproduction.sweep import TRAIN, Sweep
from tiny_scale import SAMPLE, TINY, run_of, written

from amp_plugin.report import append_to_ledger
from amp_plugin.train.options import parse

VALUES: dict[str, Any] = {"erm": {"learning_rate": 0.1}, "amp": {"amp_epsilon": 0.1}}
# A resumed run tells when it was resumed; times, and the Trainer's mean of the loss, are those since.
TIMES = ("seconds", "runtime", "per_second", "resumed_at_step", "train_loss")


@pytest.fixture(autouse=True)
def _children_see_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def outcome(ledger: Path) -> dict[tuple[Any, ...], dict[str, float]]:
    """Metrics but for those of time, by method and seed; a run that is there twice fails."""
    runs: dict[tuple[Any, ...], dict[str, float]] = {}
    for run in records.read(ledger):
        key = (run["settings"]["optim"], run["settings"]["seed"])
        assert key not in runs
        runs[key] = {name: value for name, value in run["metrics"].items() if not name.endswith(TIMES)}
    return runs


def test_a_cell_is_run_once_and_a_failure_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {"width": 4, "layers": [1, 1, 1, 1]}
    models = {"vgg16": {"width": -1}, "preactresnet18": narrow}
    scale = written(tmp_path, models=models, methods=["amp"], seeds=[1], tuning=None, augmentations=["none"])
    cells = [Cell(SAMPLE._replace(model=model), "amp", 1, VALUES["amp"]) for model in ("vgg16", "preactresnet18")]
    taken = Cell(SAMPLE, "amp", 2, VALUES["amp"])
    sweep = Sweep(scale, tmp_path / "ledger.jsonl", tmp_path / "runs", jobs=2)
    folder = sweep.folder / taken.name(scale)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep.run([taken, *cells])
    assert sweep.elsewhere == [taken]
    (failure,) = sweep.failures
    assert failure.cell is cells[0]
    assert "arguments: width=-1: give at least 1" in str(failure).splitlines()[-1]
    (run,) = records.read(sweep.ledger)
    assert run["evaluated_on"] == "test"
    assert run["metrics"]["passes"] == 4.0, "two epochs of two passes"
    assert run["metrics"]["best_eval_error"] <= run["metrics"]["eval_error"]
    own = sweep.folder / cells[1].name(scale)
    assert not list(own.glob("checkpoint-*"))
    tested = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    errors = [record["eval_error"] for record in tested if "eval_error" in record]
    assert (run["metrics"]["best_eval_error"], run["metrics"]["eval_error"]) == (min(errors), errors[-1])

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it has been run"))
    again = Sweep(scale, sweep.ledger, sweep.folder)
    again.run(cells[1:])
    assert "1 cells, 1 of them in" in capsys.readouterr().out


def test_a_run_that_outlives_its_sweep_keeps_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that is killed outright cannot end what it has started, which may append to the ledger later."""
    scale = written(tmp_path)
    cell = Cell(SAMPLE, "erm", 1, VALUES["erm"])
    monkeypatch.setattr(Sweep, "command", lambda *_: ["sleep", "600"])
    killed, other = (Sweep(scale, tmp_path / "ledger.jsonl", tmp_path / "runs") for _ in range(2))
    orphan = killed._start("", cell, 0)
    assert orphan is not None
    orphan.lock.close()  # as the end of the sweep's process does
    try:
        other.run([cell])
        assert other.elsewhere == [cell]
    finally:
        orphan.process.kill()
        orphan.process.wait()
    child = other._start("", cell, 0)
    assert child is not None
    child.process.kill()
    child.process.wait()
    child.lock.close()


def test_cells_that_run_at_once_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    options = {name: value for name, value in TINY["options"].items() if name != "cpu_threads"}
    for jobs, named, threads in ((1, {}, None), (3, {}, 2), (9, {}, 1), (3, {"cpu_threads": 5}, 5)):
        scale = written(tmp_path, options={**options, **named})
        sweep = Sweep(scale, tmp_path / "ledger.jsonl", tmp_path / "runs", jobs=jobs)
        command = sweep.command(Cell(SAMPLE, "erm", 1, VALUES["erm"]))
        _, _, args = parse(command[command.index(str(TRAIN)) + 1 :])
        assert args.cpu_threads == threads


def test_a_sweep_stops_in_time_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = written(tmp_path)
    begun, later = (Cell(SAMPLE, "erm", seed, VALUES["erm"]) for seed in (1, 2))
    sweep = Sweep(scale, tmp_path / "ledger.jsonl", tmp_path / "runs", minutes=5)
    left = iter([5.0])  # and then the time is over
    monkeypatch.setattr(Sweep, "_minutes_left", lambda _: next(left, 0.0))
    sweep.run([begun, later])
    assert sweep.stopped == [later, begun]
    assert (sweep.failures, sweep.elsewhere) == ([], [])
    assert records.read(sweep.ledger) == []
    assert capsys.readouterr().out.count("stopped; the same command continues") == 1
    checkpoints = (sweep.folder / begun.name(scale)).glob("checkpoint-*")
    assert [path.name for path in checkpoints] == ["checkpoint-1"]
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    again = Sweep(scale, sweep.ledger, sweep.folder)
    again.run([begun])
    assert [run["metrics"]["resumed_at_step"] for run in records.read(sweep.ledger)] == [1]
    assert again.stopped == again.failures == []


@pytest.mark.parametrize("option", ["--jobs", "--at_once"])
def test_the_command_says_how_many_at_once_and_for_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    scale = written(tmp_path)
    swept: list[Sweep] = []

    def run(self: Sweep, cells: list[Cell]) -> None:
        swept.append(self)
        self.stopped += cells

    monkeypatch.setattr(Sweep, "run", run)
    command = ["--scale", str(scale.path), "--tune", "--output_dir", str(tmp_path / "runs")]
    reproduce.main([*command, option, "3", "--minutes", "2.5"])
    assert (swept[0].jobs, swept[0].minutes) == (3, 2.5)
    assert "6 cells are left, as the time is over; the same command continues" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--minutes: must be above 0 and finite, got 0\.0"):
        reproduce.main([*command, "--minutes", "0"])


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_sweep_continues_to_the_same_ledger(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the first runs ends all processes; the same command makes what was left."""
    scale = written(tmp_path, options={**TINY["options"], "num_train_epochs": 40})
    chosen_values = {"preactresnet18": {"none": {"cifar10_sample": {m: {"values": v} for m, v in VALUES.items()}}}}
    scale.chosen_path.write_text(json.dumps(chosen_values))
    command = ["--scale", str(scale.path), "--methods", "erm", "amp", "--seeds", "1", "--jobs", "2", "--output_dir"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    sweep = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "reproduce.py"), *command, str(parts)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while sweep.poll() is None and not list(parts.glob("*/checkpoint-*")):
        time.sleep(0.02)
    sweep.send_signal(signal.SIGINT)
    said, _ = sweep.communicate(timeout=60)
    assert said.endswith("interrupted; the same command continues\n"), said
    assert not subprocess.run(["pgrep", "-f", str(parts)], capture_output=True, text=True).stdout
    before = outcome(parts / "ledger.jsonl")
    assert len(before) < 2
    reproduce.main([*command, str(parts)])
    reproduce.main([*command, str(whole)])
    assert outcome(parts / "ledger.jsonl") == outcome(whole / "ledger.jsonl")
    assert len(outcome(whole / "ledger.jsonl")) == 2
    resumed = [r for r in records.read(parts / "ledger.jsonl") if r["metrics"].get("resumed_at_step")]
    assert resumed, "not from the beginning"


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fake one on the PATH that leaves its arguments in a file."""
    told = tmp_path / "told"
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\necho Submitted batch job 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    return told


def test_cells_become_tasks_of_a_job_array(
    tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = written(tmp_path)
    folder = tmp_path / "runs"
    trials = Selection(scale).trials()
    append_to_ledger(folder / "ledger.jsonl", run_of(trials[2], scale))
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path / "task"}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    common = ["--scale", str(scale.path), "--tune", "--output_dir", str(folder)]
    reproduce.main([*common, "--slurm", "--sbatch_args", "--gres=gpu:1 --time=1:00"])
    assert "5 of 6 cells" in (said := capsys.readouterr().out)
    assert said.endswith("Submitted batch job 7\n")
    gres, time, script = sbatch.read_text().split()
    assert (gres, time) == ("--gres=gpu:1", "--time=1:00")
    assert "#SBATCH --array=0-1,3-5\n" in Path(script).read_text()
    subprocess.run(["bash", script], env={"SLURM_ARRAY_TASK_ID": "3"}, check=True)
    _, *arguments = (tmp_path / "task").read_text().splitlines()
    assert arguments == [*common, "--task", "3"]
    started: list[Cell] = []
    monkeypatch.setattr(Sweep, "run", lambda self, cells: started.extend(cells))
    reproduce.main(arguments)
    assert started == [trials[3]]


def test_without_slurm_the_script_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no sbatch here; on the cluster's login node: sbatch --qos=x .*\.sbatch"):
        slurm.submit(slurm.write_script(tmp_path, [0], []), ["--qos=x"])
    with pytest.raises(ValueError, match="--task 6: the cells chosen here are 0 to 5"):
        reproduce.main(["--scale", str(written(tmp_path).path), "--tune", "--task", "6", "--output_dir", str(tmp_path)])
