"""Test what a run of the main job leaves in its folder and with trackers, in this process, on the bundled sample."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from main_job import QUICK, metrics_of
from PIL import Image
from transformers import TrainerState
from transformers.trainer_utils import PredictionOutput

from amp_plugin.train import job, options
from amp_plugin.train.progress import EpochLine
from amp_plugin.train.run_folder import RecordsFile, draw_pictures, write_config
from amp_plugin.train.settings import settings_of
from amp_plugin.trainer.checkpoints import SaveError

SETTINGS = [
    *(*QUICK, "--logging_strategy", "steps", "--logging_steps", "1"),
    *("--save_strategy", "epoch", "--label_smoothing_factor", "0.1"),
]
TRAINED = ("loss", "amp_loss", "sharpness", "clipped", "perturbation_norm", "grad_norm", "learning_rate")


def run(*arguments: str) -> str:
    """Run the job, and return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        job.main([*arguments])
    return printed.getvalue()


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Make a run; return its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    tracked = ["--report_to", "tensorboard"] if "tensorboard" in job.get_available_reporting_integrations() else []
    return folder, run(*SETTINGS, *tracked, "--output_dir", str(folder))


def test_the_pictures_are_there_and_named(whole: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib", reason="draws pictures")
    folder, printed = whole
    for path in (folder / "curves.png", folder / "confusion.png", folder / "reliability.png"):
        assert f": {path}\n" in printed
        with Image.open(path) as picture:
            picture.verify()


def test_the_records_are_those_of_the_trainer(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    assert records_of(folder) == json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [r["step"] for r in records_of(folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records_of(folder) if "eval_error" in r] == [3, 6], "the final test is not logged twice"


def test_tensorboard_has_every_figure_at_its_step(whole: tuple[Path, str]) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="reads TensorBoard's files"
    )
    folder, _ = whole
    (events,) = folder.glob("runs/*/events.*")
    read = accumulator.EventAccumulator(str(events))
    read.Reload()
    names = {f"train/{name}": name for name in TRAINED}
    names |= {f"eval/{name}": f"eval_{name}" for name in ("loss", "error", "accuracy", "nll", "ece")}
    for tag, name in names.items():
        expected = [(r["step"], np.float32(r[name])) for r in records_of(folder) if name in r]
        assert [(scalar.step, scalar.value) for scalar in read.Scalars(tag)] == expected, tag
        assert expected


@pytest.mark.usefixtures("no_pictures")
def test_the_config_makes_the_same_run_again(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = whole
    config = str(folder / "config.yaml")
    assert settings_of(*options.parse([config])) == settings_of(*options.parse(SETTINGS))
    assert options.parse([config])[2].label_smoothing_factor == 0.1, "a stock setting that was changed"
    run(config, "--output_dir", str(tmp_path / "again"))
    before, after = map(metrics_of, (folder, tmp_path / "again"))
    for name in ("loss", "amp_loss", "train_loss", "eval_error", "eval_nll", "eval_ece"):
        assert after[name] == before[name]
    assert (tmp_path / "again" / "config.yaml").read_text() == (folder / "config.yaml").read_text()


def test_the_config_tells_what_cannot_be_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    somewhere = tmp_path / "somewhere"
    somewhere.mkdir()
    parsed = options.parse([*SETTINGS, "--data_root", str(somewhere), "--lr_scheduler_type", "cosine"])
    monkeypatch.setattr(type(parsed[2]), "world_size", 2)
    write_config(tmp_path / "config.yaml", *parsed)
    text = (tmp_path / "config.yaml").read_text()
    assert "torchrun --nproc_per_node 2" in text
    assert "give --data_root again" in text
    assert str(somewhere) not in text
    assert options.parse([str(tmp_path / "config.yaml")])[2].lr_scheduler_type == "cosine"


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_is_broken_off_keeps_its_records_and_continues_them(
    whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*SETTINGS, "--output_dir", str(tmp_path / "part"), "--resume_from_checkpoint", "last"]
    with monkeypatch.context() as patch:

        def break_off(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise InterruptedError

        patch.setattr(EpochLine, "on_step_end", break_off)
        with pytest.raises(InterruptedError):
            run(*command)
    kept = records_of(tmp_path / "part")
    assert [r["step"] for r in kept if "loss" in r] == [1, 2, 3, 4, 5]
    printed = run(*command)
    assert "continues after step 3 of 6" in printed
    for records in zip(records_of(tmp_path / "part"), records_of(whole[0]), strict=True):
        mine, other = ([record.get(name) for name in (*TRAINED, "step", "eval_nll")] for record in records)
        assert mine == other
    assert sorted(p.name for p in (tmp_path / "part").glob("*metrics*")) == ["metrics.jsonl"]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_without_tests_is_tested_and_logged_once(tmp_path: Path) -> None:
    run(*SETTINGS, "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--output_dir", str(tmp_path))
    (record,) = (r for r in records_of(tmp_path) if "eval_error" in r)
    assert record["step"] == 1
    assert record["eval_nll"] == metrics_of(tmp_path)["eval_nll"]


def test_only_the_main_process_writes_records(tmp_path: Path) -> None:
    record = {"loss": math.nan, "epoch": 1.0, "step": 3}
    state = TrainerState(log_history=[record], is_world_process_zero=False)
    file = RecordsFile(tmp_path / "metrics.jsonl")
    file.on_train_begin(None, state, None)
    file.on_log(None, state, None)
    assert not list(tmp_path.iterdir())
    state.is_world_process_zero = True
    file.on_log(None, state, None)
    assert records_of(tmp_path) == [{"loss": None, "epoch": 1.0, "step": 3}], "JSON has no NaN"


def test_a_record_that_cannot_be_written_is_told_and_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = tmp_path / "metrics.jsonl", TrainerState(log_history=[{"loss": 1.0}], is_world_process_zero=True)
    path.mkdir()
    file = RecordsFile(path)
    with pytest.raises(SaveError, match=r"could not save metrics\.jsonl in .*: Is a directory"):
        file.on_train_begin(None, state, None)
    file.on_log(None, state, None)
    file.on_log(None, state, None)
    (told,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"note: could not save metrics\.jsonl in .*: Is a directory .*; the training goes on", told)
    path.rmdir()
    path.write_text('{"half a li')
    state.log_history.append({"loss": 2.0})
    file.on_log(None, state, None)
    assert records_of(tmp_path) == [{"loss": 1.0}, {"loss": 2.0}], "all of them"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorboard", 'tensorboard is not installed (pip install "amp-plugin[tensorboard]")'),
        ("wandb", "wandb is not installed (pip install wandb)"),
        ("tensorbord", "tracker 'tensorbord' is unknown; did you mean 'tensorboard'?"),
    ],
)
def test_a_tracker_that_cannot_be_used_stops_the_job_at_once(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(ValueError, match=re.escape(message)):
        job.main([*SETTINGS, "--report_to", name, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_without_a_library_one_line_says_so(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="draws pictures")
    for name in (missing, f"{missing}.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    tested = PredictionOutput(np.eye(2), np.arange(2), {})
    draw_pictures(tmp_path, "run", [{"epoch": 1.0, "loss": 1.0}], tested, ["a", "b"], "test")
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf'pictures left out: {missing}\S* is missing \(pip install "amp-plugin\[plots\]"\)', line)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps_of(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch, disable_tqdm: bool = False) -> str:
    """Show two epochs of two steps, continued after the first; return the standard output."""
    monkeypatch.setattr("sys.stderr", stderr)
    state = TrainerState(max_steps=4, global_step=2, epoch=1.0, num_train_epochs=2, is_world_process_zero=True)
    args: Any = SimpleNamespace(disable_tqdm=disable_tqdm)
    line: Any = EpochLine()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        line.on_train_begin(args, state, None, train_dataloader=SimpleNamespace(dataset=range(100)))
        line.on_epoch_begin(args, state, None)
        for step in (3, 4):
            state.global_step, state.epoch = step, step / 2
            line.on_step_end(args, state, None)
        state.log_history = [{"loss": 1.5}]
        line.on_log(args, state, None, logs={"epoch": 2.0, "eval_error": 7.0, "eval_nll": 0.5, "eval_runtime": 0.0})
        line.on_train_end(args, state, None)
    return printed.getvalue()


LINE = r"epoch   2\.0  loss 1\.500  eval_error_% 7\.000  eval_nll 0\.500"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    printed = steps_of(terminal, monkeypatch)
    assert re.fullmatch(rf"continues after step 2 of 4\n{LINE}\n", printed)
    bars = [bar for bar in terminal.getvalue().split("\r") if "steps" in bar]
    assert re.search(r"^ *50%\|.*\| 2/4 steps \[00:00<\?", bars[0]), "begins where the run continues"
    assert re.search(r"^epoch 2/2: 100%\|.*\| 4/4 steps \[\d\d:\d\d<00:00, [\d,]+ images/s\]", bars[-1])


def test_without_a_terminal_the_line_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr, disable_tqdm in ((io.StringIO(), False), (Terminal(), True)):
        printed = steps_of(stderr, monkeypatch, disable_tqdm)
        assert re.fullmatch(rf"continues after step 2 of 4\n{LINE}  [\d,]+ images/s  00:00 left\n", printed)
        assert stderr.getvalue() == ""


def test_a_recipe_that_is_deleted_during_the_training_still_gives_the_cards_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 7\nweight_decay: 0.001\n")
    monkeypatch.setattr(EpochLine, "on_epoch_begin", lambda *args, **kwargs: recipe.unlink(missing_ok=True))
    run(str(recipe), *SETTINGS, "--max_steps", "2", "--output_dir", str(tmp_path / "out"))
    assert not recipe.exists()
    assert re.search(r"--seed 7 .*--weight_decay 0\.001 ", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
