"""When the main job tests, saves and stops: at the right time, and with the bits of a run that is left alone."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import run_processes
from main_job import QUICK, SCRIPT
from safetensors.torch import load_file
from transformers import TrainerControl

from amp_plugin.report import read_ledger
from amp_plugin.train import cadence, job, options
from amp_plugin.train.cadence import Cadence
from amp_plugin.train.settings import settings_of

NARROW = json.dumps({"width": 4, "layers": [1, 1, 1, 1], "drop_rate": 0.3})
# Three epochs of six steps; dropout and Cutout draw random numbers.
JOB = [*QUICK, "--per_device_train_batch_size", "10", "--num_train_epochs", "3", "--model_kwargs", NARROW]
JOB += ["--augment", "cutout", "--ledger", "ledger.jsonl"]


@dataclass
class Training:
    """A training that takes the seconds that it is told, as the stock Trainer tells a callback of it."""

    epochs: int
    steps: int  # of an epoch
    step: float  # seconds of a step, the first of which takes `start` more
    test: float
    save: float
    start: float = 0.0
    now: float = 0.0
    looks: int = 0
    done: int = 0  # steps
    saved: list[float] = field(default_factory=list)
    tested: list[int] = field(default_factory=list)

    def clock(self) -> float:
        self.looks += 1
        return self.now

    def run(self, callback: Cadence) -> None:
        args: Any = SimpleNamespace(
            device=torch.device("cpu"), world_size=1, gradient_accumulation_steps=1, eval_strategy="epoch"
        )
        state: Any = SimpleNamespace(global_step=0, max_steps=self.epochs * self.steps, epoch=0.0)
        control = TrainerControl()
        callback.on_train_begin(args, state, control, model=torch.nn.Linear(1, 1), train_dataloader=range(self.steps))
        self.now += self.start
        for epoch in range(self.epochs):
            for step in range(self.steps):
                self.now += self.step
                state.global_step = self.done = self.done + 1
                state.epoch = epoch + (step + 1) / self.steps
                callback.on_step_end(args, state, control)
                self._follow(callback, args, state, control)
                if control.should_training_stop:
                    break
            control.should_evaluate = True  # as the Trainer's own callback says before ours
            callback.on_epoch_end(args, state, control)
            self._follow(callback, args, state, control)
            if control.should_training_stop:
                return

    def _follow(self, callback: Cadence, args: Any, state: Any, control: TrainerControl) -> None:
        if control.should_evaluate:
            self.now += self.test
            self.tested.append(round(state.epoch))
            callback.on_evaluate(args, state, control)
        if control.should_save:
            self.now += self.save
            self.saved.append(self.now)
            callback.on_save(args, state, control)
        control.should_evaluate = control.should_save = False


def callback_of(
    monkeypatch: pytest.MonkeyPatch, training: Training, *arguments: str, tested: float = 0.2, further: float = 0.0
) -> Cadence:
    _, _, args = options.parse(["--use_cpu", "true", *arguments])
    monkeypatch.setattr(cadence, "clock", training.clock)
    return Cadence(args, training.now, tested, further)


@pytest.mark.parametrize(
    "training",
    [
        Training(200, 1000, step=0.003, test=0.5, save=1.0, start=60.0),
        Training(200, 1000, step=0.5, test=90.0, save=5.0),
        Training(200, 1000, step=0.24, test=60.0, save=5.0),
        Training(200, 1000, step=0.06, test=0.0, save=0.1, start=20.0),
        Training(3000, 3, step=0.05, test=0.1, save=0.1),
        Training(3, 1000, step=30.0, test=100.0, save=9.0),
    ],
    ids=[
        "a GPU",
        "long epochs",
        "a test that does not fit",
        "epochs of a tenth of the time",
        "short epochs",
        "long steps",
    ],
)
def test_a_training_stops_in_time_but_not_early(monkeypatch: pytest.MonkeyPatch, training: Training) -> None:
    callback = callback_of(monkeypatch, training, "--minutes", "10")
    training.run(callback)
    assert callback.stopped
    assert training.saved == [training.now], "the stop makes the only checkpoint"
    assert training.now <= 600
    short = training.steps * training.step <= 40
    assert not short or training.done % training.steps == 0, "where epochs are short the last one is whole"
    # What may be left is a step, or a short epoch, and what is kept for a test and a checkpoint, with the margins.
    spare = 1.25 * training.step * (training.steps if short else 1) + 2.5 * (training.test + training.save) + 5
    assert training.now >= 600 - spare
    epochs = training.now / (training.steps * training.step)
    assert training.looks <= 3 * epochs + 60, "the clock is not read after each step"


def test_a_training_that_ends_in_time_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(10, 100, step=0.5, test=2.0, save=1.0)
    callback = callback_of(monkeypatch, training, "--minutes", "9.2")
    training.run(callback)
    assert not callback.stopped
    assert training.saved == []


def test_a_training_stops_at_its_end_if_no_time_is_left_for_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(10, 100, step=0.5, test=2.0, save=1.0)
    callback = callback_of(monkeypatch, training, "--minutes", str((10 * 52 + 11) / 60))
    training.run(callback)
    assert callback.stopped
    assert len(training.saved) == 1
    assert training.tested == list(range(1, 11))


@pytest.mark.parametrize(("minutes", "stops"), [(9.2, True), (10.0, False)])
def test_tests_on_corrupted_images_take_their_time_too(
    minutes: float, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten tests more than in the training above, which ends in 9.2 minutes, take 20 seconds, or 25 with the margin."""
    training = Training(10, 100, step=0.5, test=2.0, save=1.0)
    callback = callback_of(monkeypatch, training, "--minutes", str(minutes), further=10.0)
    training.run(callback)
    assert callback.stopped == stops


def test_tests_are_at_every_few_epochs_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(11, 3, step=1.0, test=1.0, save=1.0)
    training.run(callback_of(monkeypatch, training, "--eval_every_epochs", "4"))
    assert training.tested == [4, 8, 11]
    assert training.looks == 1, "nothing asks for the time"


def test_checkpoints_are_minutes_apart_at_the_ends_of_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(40, 30, step=1.0, test=0.0, save=2.0)
    training.run(callback_of(monkeypatch, training, "--save_minutes", "1.5"))
    # 3 epochs of 30 s, then the checkpoint; 2 s of which are gone in the epochs that follow
    apart = [b - a for a, b in zip([0.0, *training.saved], training.saved, strict=False)]
    assert set(apart) == {92.0}
    long = Training(2, 1000, step=1.0, test=0.0, save=0.0)
    long.run(callback_of(monkeypatch, long, "--save_minutes", "1.4"))
    apart = [b - a for a, b in zip([0.0, *long.saved], long.saved, strict=False)]
    assert max(apart) <= 2 * 84 + 84 / 10 + 1
    assert min(apart) >= 84
    assert 1000.0 in long.saved, "the end of the epoch"


@pytest.mark.parametrize("option", ["--minutes", "--save_minutes", "--eval_every_epochs"])
def test_the_numbers_must_be_positive(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be (above 0 and finite|at least 1), got 0"):
        options.parse([option, "0"])


def test_the_best_model_needs_checkpoints_where_tests_are() -> None:
    with pytest.raises(ValueError, match="requires the save and eval strategy to match"):
        options.parse(["--save_minutes", "1", "--load_best_model_at_end", "true"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--minutes 1 --save_strategy best --metric_for_best_model eval_error", "at other times than --save_strategy"),
        ("--save_minutes 1 --save_strategy best --metric_for_best_model eval_error", "at other times than"),
        ("--minutes 1 --save_only_model true", "which --save_only_model leaves incomplete"),
    ],
)
def test_what_could_leave_no_checkpoint_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options.parse(arguments.split(" "))


@pytest.mark.usefixtures("no_pictures")
def test_a_stop_keeps_the_checkpoint_that_continues_beside_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_after(8, monkeypatch)
    command = [*JOB, "--output_dir", "out", "--minutes", "100", "--save_total_limit", "1", "--save_strategy", "epoch"]
    job.main([*command, "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_nll"])
    kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == [6, 8], "the only test was at step 6"


def test_the_times_are_no_settings_of_a_run_but_the_tests_are() -> None:
    one, other = (
        settings_of(*options.parse(["--use_cpu", "true", *more]))
        for more in ([], ["--minutes", "3", "--save_minutes", "2", "--eval_every_epochs", "5"])
    )
    assert {n for n in one.keys() | other.keys() if one.get(n) != other.get(n)} == {"eval_every_epochs"}


class Clock:
    """A clock on which each look is so many seconds after the one before."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a job that is timed stop after this step."""
    look = Cadence._look

    def stopping_look(self: Cadence, args: Any, state: Any, control: Any, at_end: bool = False) -> None:
        look(self, args, state, control, at_end)
        self._next_look = state.global_step + 1
        if state.global_step == step:
            self.stopped = control.should_training_stop = control.should_save = True

    monkeypatch.setattr(Cadence, "_look", stopping_look)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is left alone."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        job.main([*JOB, "--output_dir", "out"])
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of epochs, without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in r.items() if not n.endswith(("_runtime", "per_second"))} for r in lines if "epoch" in r]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("seconds", "stops"), [(2.0, [5, 9]), (7.0, [1, 3])], ids=["later", "at once"])
def test_a_job_that_is_stopped_continues_to_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    alone: Path,
    seconds: float,
    stops: list[int],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.setattr(job, "clock", lambda: 0.0)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    command = [*JOB, "--output_dir", "out", "--minutes", "0.4"]
    stopped = []
    for _ in range(2):
        monkeypatch.setattr(cadence, "clock", Clock(seconds))
        job.main(command)
        said, last = capsys.readouterr().out.splitlines()[-2:]
        found = re.fullmatch(r"stopped at step (\d+) of 18, before --minutes 0.4; this continues:", said)
        assert found is not None, said
        stopped.append(int(found[1]))
        assert (tmp_path / "out" / f"checkpoint-{found[1]}").is_dir()
        python, script, *command = shlex.split(last)
        assert (python, script) == ("python", str(SCRIPT))
        assert command[-2:] == ["--resume_from_checkpoint", "last"]
        assert command.count("--resume_from_checkpoint") == 1
        left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("checkpoint-")}
        assert left == {"config.yaml", "metrics.jsonl"}, "a run that has not ended reports nothing"
        of_epochs = [r["epoch"] for r in records(tmp_path / "out") if "train_loss" not in r]
        assert of_epochs == [n for n in (1.0, 2.0) if 6 * n <= stopped[-1] for _ in range(2)], "each logged and tested"
        assert not (tmp_path / "ledger.jsonl").exists()
    assert stopped[0] < stopped[1]
    monkeypatch.setattr(cadence, "clock", Clock(0.0))
    job.main(command)
    here, there = weights(tmp_path / "out"), weights(alone / "out")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    (ours,), (theirs,) = read_ledger(tmp_path / "ledger.jsonl"), read_ledger(alone / "ledger.jsonl")
    assert ours["settings"] == theirs["settings"]
    assert ours["metrics"]["eval_nll"] == theirs["metrics"]["eval_nll"]


@pytest.mark.usefixtures("no_pictures")
def test_a_job_that_is_stopped_between_epochs_leaves_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_after(6, monkeypatch)
    command = [*JOB, "--output_dir", "out", "--minutes", "100", "--resume_from_checkpoint", "last"]
    job.main(command)
    assert not (tmp_path / "ledger.jsonl").exists()
    job.main(command)
    ours, theirs = ([r for r in records(folder / "out") if "train_loss" not in r] for folder in (tmp_path, alone))
    assert ours == theirs


@pytest.mark.usefixtures("no_pictures")
def test_fewer_tests_leave_the_training_and_the_means_of_each_epoch_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = [*JOB, "--model_kwargs", '{"width": 4, "layers": [1, 1, 1, 1]}', "--output_dir"]
    job.main([*plain, "every"])
    capsys.readouterr()
    job.main([*plain, "few", "--eval_every_epochs", "2"])
    said = capsys.readouterr().out
    every, few = weights(tmp_path / "every"), weights(tmp_path / "few")
    assert all(torch.equal(every[name], few[name]) for name in every)
    ours, theirs = records(tmp_path / "few"), records(tmp_path / "every")
    tests = [r for r in ours if "eval_error" in r]
    assert [r["epoch"] for r in tests] == [2.0, 3.0]
    assert tests == [r for r in theirs if r.get("epoch") in (2.0, 3.0) and "eval_error" in r]
    assert [r for r in ours if "loss" in r] == [r for r in theirs if "loss" in r]
    assert read_ledger(tmp_path / "ledger.jsonl")[1]["metrics"]["best_eval_error"] == min(
        r["eval_error"] for r in tests
    )
    lines = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert [("eval_error_%" in line, "loss" in line) for line in lines] == [(False, True), (True, True), (True, True)]


def test_all_processes_stop_at_the_step_that_the_first_one_decides(tmp_path: Path) -> None:
    """The others' clocks say that there is no hurry."""
    program = tmp_path / "stopped.py"
    program.write_text(
        "import itertools, os, sys\n"
        "from amp_plugin.train import cadence, job\n"
        "ticks = itertools.count(0.0, 2.0 if os.environ['RANK'] == '0' else 1e-6)\n"
        "cadence.clock, job.clock = ticks.__next__, lambda: 0.0\n"
        "job.main(sys.argv[1:])\n"
    )
    run_processes(2, program, *JOB, "--output_dir", "out", "--minutes", "0.4", folder=tmp_path)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    assert not (tmp_path / "ledger.jsonl").exists()
    assert int(checkpoint.name.split("-")[1]) < 9, "of three epochs of three steps"
