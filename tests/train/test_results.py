"""Test that what fails after a training costs its own file alone, and that what can be known is known before."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from main_job import QUICK

from amp_plugin.report import append_to_ledger, read_ledger
from amp_plugin.train import job, options, results, run_folder
from amp_plugin.train.trainer import RecipeTrainer
from amp_plugin.trainer.checkpoints import SaveError

ALL = ["model.safetensors", "trainer_state.json", "all_results.json", "run.json", "README.md"]
PICTURES = ["curves.png", "confusion.png", "reliability.png"]
JOB = [*QUICK, "--max_steps", "1"]


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def failures(folder: Path, *arguments: str) -> tuple[list[str], str]:
    """Run the job, which has to fail; return the lines of the error and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as left:
        job.run([*JOB, "--output_dir", str(folder / "out"), *arguments])
    assert isinstance(left.value.code, str), "the exit code is 1"
    lines = left.value.code.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines], printed.getvalue()


DISK = OSError(28, "No space left on device")
MATHS = ValueError("Expected end of text,\n found '$'")
# What fails: where it is looked up, its name, the error, the files that are not there, and words of the message.
STAGES: dict[str, tuple[Any, str, Exception, list[str], str]] = {
    "weights": (RecipeTrainer, "save_model", DISK, ALL[:1], "could not save model.safetensors in"),
    "test": (RecipeTrainer, "final_test", torch.OutOfMemoryError("out of memory"), ["run.json"], "the final test"),
    "state": (RecipeTrainer, "save_state", DISK, ["trainer_state.json"], "could not save trainer_state.json in"),
    "metrics": (results, "write_metrics", DISK, ["all_results.json"], "could not save all_results.json in"),
    "record": (results, "write_record", DISK, ["run.json"], "could not save run.json in"),
    "ledger": (results, "append_to_ledger", DISK, [], "could not save ledger.jsonl in"),
    "table": (results, "report", MATHS, [], "the table failed: ValueError: Expected end of text, found '$'"),
    "details": (results, "card_details", KeyError("amp_epsilon"), ["README.md"], "README.md failed: KeyError"),
    "card": (RecipeTrainer, "create_model_card", DISK, ["README.md"], "could not save README.md in"),
}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("stage", STAGES)
def test_what_fails_costs_its_own_file_alone(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, error, missing, message = STAGES[stage]
    monkeypatch.setattr(where, name, failing(error))
    ledger = tmp_path / "new" / "ledger.jsonl"
    lines, printed = failures(tmp_path, "--ledger", str(ledger))
    assert len(lines) == 2, "what failed, and where the rest is"
    assert message in lines[0]
    assert str(tmp_path) in "".join(lines)
    assert lines[1] == f"the other results of the training are in {tmp_path / 'out'}"
    assert [name for name in ALL if not (tmp_path / "out" / name).exists()] == missing
    assert ledger.exists() == (stage not in ("ledger", "test"))
    assert ("train loss" in printed) == (stage != "table")


def test_a_picture_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="draws pictures")
    monkeypatch.setattr(run_folder, "plot_confusion", failing(MATHS))
    lines, _ = failures(tmp_path)
    assert f"{tmp_path / 'out' / 'confusion.png'} failed: ValueError: Expected" in lines[0]
    left = [name for name in (*ALL, *PICTURES) if not (tmp_path / "out" / name).exists()]
    assert left == ["confusion.png"]


@pytest.mark.usefixtures("no_pictures")
def test_everything_may_fail_and_each_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name, error, *_ in STAGES.values():
        if name != "final_test":
            monkeypatch.setattr(where, name, failing(error))
    lines, _ = failures(tmp_path, "--ledger", str(tmp_path / "ledger.jsonl"))
    assert len(lines) == 8, "the card fails once, in one of two ways"


@pytest.mark.usefixtures("no_pictures")
def test_new_weights_do_not_keep_an_older_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("an earlier run")
    monkeypatch.setattr(RecipeTrainer, "final_test", failing(MATHS))
    lines, _ = failures(tmp_path)
    assert f"{tmp_path / 'out'} gets no run.json" in lines[0]
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.usefixtures("no_pictures")
def test_the_weights_are_there_before_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecipeTrainer, "final_test", failing(KeyboardInterrupt()))  # type: ignore[arg-type]
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(KeyboardInterrupt):
        job.main([*JOB, "--output_dir", str(tmp_path)])
    assert (tmp_path / "model.safetensors").is_file()


class Publishing:
    """The trainer of a finished training that is to be published."""

    optimizer, state, failures = None, SimpleNamespace(log_history=[], global_step=1, epoch=1.0), ()
    hub_model_id = "ann/out"

    def __init__(self, folder: Path) -> None:
        arguments = ["--output_dir", str(folder), *JOB]
        self.parsed = options.parse(arguments)
        self.args, self.pushes = self.parsed[2], 0
        self.args.push_to_hub = True

    def is_world_process_zero(self) -> bool:
        return True

    def push_to_hub(self) -> None:
        self.pushes += 1

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: SimpleNamespace(metrics={"eval_error": 1.0})


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_lacks_something_is_not_published(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = Publishing(tmp_path)
    monkeypatch.setattr(results, "passes_made", lambda *args: 1.0)
    monkeypatch.setattr(results, "draw_pictures", lambda *args: None)
    monkeypatch.setattr(results, "execution", lambda *args: {})
    monkeypatch.setattr(results, "card_details", failing(MATHS) if fails else lambda *args, **kwargs: {})
    task: Any = SimpleNamespace(dataset="cifar", class_names=list, fingerprints={}, to_corrupt=None)
    trained = {"train_loss": 1.0, "seconds": 1.0}
    steps = results.save_results(trainer, task, trainer.parsed, trained, [], None)
    assert trainer.pushes == (not fails)
    assert len(steps.failures) == 2 * fails
    assert not fails or f"python -m amp_plugin.hub {tmp_path} ann/out" in steps.failures[1]


def refused(*arguments: str) -> str:
    with pytest.raises((ValueError, SaveError)) as left:
        job.main([*JOB, *arguments])
    return str(left.value)


def test_a_ledger_that_cannot_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecipeTrainer, "__init__", failing(AssertionError("too late")))
    out = ["--output_dir", str(tmp_path / "out"), "--ledger"]
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "text").write_text("a line of a text\n")
    assert f"ledger {str(tmp_path)!r} is a folder" in refused(*out, str(tmp_path))
    for file in ("picture", "text"):
        kept = (tmp_path / file).read_bytes()
        assert f"{tmp_path / file}" in refused(*out, str(tmp_path / file))
        assert (tmp_path / file).read_bytes() == kept
    assert f"{tmp_path / 'text'} is no folder" in refused(*out, str(tmp_path / "text" / "ledger.jsonl"))


def test_a_ledger_whose_last_line_is_not_ended_takes_another(tmp_path: Path) -> None:
    record = {"settings": {"seed": 0}, "metrics": {"eval_error": 1.0}}
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(json.dumps(record))
    append_to_ledger(ledger, record)
    assert read_ledger(ledger) == [record, record]


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", "not JSON", '{"settings": [], "metrics": {}}', "\x00"),
        '{"settings": {"seed": 0, "optim": "sgd"}, "metrics": {"eval_error": "low"}}',
    ],
)
def test_a_record_that_cannot_be_compared_is_known_before(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecipeTrainer, "__init__", failing(AssertionError("too late")))
    (tmp_path / "run.json").write_text(text)
    said = refused("--output_dir", str(tmp_path / "out"), "--compare_with", str(tmp_path))
    assert said.startswith(f"--compare_with {str(tmp_path)!r}: ")
    assert re.search("is not a record of runs", said)


def test_a_disk_without_room_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(RecipeTrainer, "__init__", failing(AssertionError("too late")))
    said = refused("--output_dir", str(tmp_path / "out"))
    assert re.search(r"has 0 MiB free, and the weights of this model takes? about \d+ MiB; make room", said)
    assert "a checkpoint of this model" in refused("--output_dir", str(tmp_path / "out"), "--save_strategy", "epoch")
