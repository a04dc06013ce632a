"""Test that a run, its folder and its checkpoints belong together, and that its record tells what happened."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from main_job import QUICK

from amp_plugin.train import job, options
from amp_plugin.train.folder_lock import sole_writer
from amp_plugin.train.identity import changes, remove_results
from amp_plugin.train.settings import settings_of

EPOCHS = [*QUICK, "--save_strategy", "epoch"]
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a forked process inherits
print("process 1 on here", file=file, end="", flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def run(*arguments: str) -> str:
    """Run the job, and return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        job.main([*arguments])
    return printed.getvalue()


def start(*arguments: str) -> None:
    """Start the job, which ends with an InterruptedError when it would read its data."""

    def read_data(*_: Any) -> None:
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_task", read_data)
        job.main([*arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of two epochs with checkpoints, without pictures."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        run(*EPOCHS, "--output_dir", str(folder))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- checkpoints


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("amp_epsilon", "2.0", "amp_epsilon: 0.2 -> 2.0"),
        ("learning_rate", "0.2", "learning_rate: 0.1 -> 0.2"),
        ("per_device_train_batch_size", "10", "per_device_train_batch_size: 20 -> 10"),
        ("gradient_accumulation_steps", "2", "gradient_accumulation_steps: 1 -> 2"),
        ("seed", "1", "seed: 42 -> 1"),
        ("optim", "sgd", "optim: amp -> sgd"),
        ("optim_args", "momentum=0.5", "optim_args: momentum=0.9,nesterov=True -> momentum=0.5"),
        ("augment", "cutout", "augment: none -> cutout"),
        ("train_images", "80", "train_images: 60 -> 80"),
        ("label_noise", "0.2", "label_noise: 0.0 -> 0.2"),
        ("dataset", "cifar10", "augment: none -> plain, dataset: cifar10_sample -> cifar10"),
        ("model", "resnet18", "model: preactresnet18 -> resnet18"),
        ("bf16", "true", "bf16: false -> true"),
        ("adam_beta1", "0.5", "adam_beta1: 0.9 -> 0.5"),
        ("label_smoothing_factor", "0.1", "label_smoothing_factor: 0.0 -> 0.1"),
        ("dataloader_drop_last", "true", "dataloader_drop_last: false -> true"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_before_the_data(
    finished: Path, option: str, value: str, told: str
) -> None:
    last = str(finished / "checkpoint-6")
    for which in ("last", "true", last):
        with pytest.raises(ValueError, match="was made with other settings") as raised:
            start(*EPOCHS, "--output_dir", str(finished), "--resume_from_checkpoint", which, f"--{option}", value)
        assert str(raised.value).startswith(f"{last!r} was made with other settings: {told}; ")


def test_all_settings_that_differ_are_listed_at_once(finished: Path) -> None:
    other = ["--model_kwargs", '{"width": 8}', "--seed", "3", "--resume_from_checkpoint", "last"]
    with pytest.raises(ValueError, match=r'model_kwargs: \{.*"width": 4\} -> \{"width": 8\}, seed: 42 -> 3; give'):
        start(*EPOCHS, "--output_dir", str(finished), *other)


@pytest.mark.parametrize(
    "same",
    [
        ["--model_kwargs", '{"layers":[1,1,1,1], "width":4}'],
        ["--per_device_eval_batch_size", "100", "--eval_strategy", "no", "--logging_strategy", "no"],
        ["--save_total_limit", "1", "--ledger", "ledger.jsonl", "--hub_license", "apache-2.0", "--minutes", "9"],
        ["--dataloader_num_workers", "1", "--cpu_threads", "2"],
    ],
)
def test_what_decides_no_outcome_may_differ(finished: Path, same: list[str]) -> None:
    with pytest.raises(InterruptedError):
        start(*EPOCHS, "--output_dir", str(finished), "--resume_from_checkpoint", "last", *same)


def test_the_config_of_a_run_continues_it(finished: Path) -> None:
    folder = ["--output_dir", str(finished), "--use_cpu", "true", "--resume_from_checkpoint", "true"]
    with pytest.raises(InterruptedError):
        start(str(finished / "config.yaml"), *folder)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_made_longer_and_says_so(copied: Path) -> None:
    more = [*EPOCHS, "--output_dir", str(copied), "--resume_from_checkpoint", "last", "--num_train_epochs", "3"]
    printed = run(*more)
    assert "note: the run is given another length: num_train_epochs: 2.0 -> 3.0;" in printed
    assert "continues after step 6 of 9" in printed
    with pytest.raises(ValueError, match=r"checkpoint-9' is 3 epochs old, which is more than the 1 asked for"):
        run(*more, "--num_train_epochs", "1")
    with pytest.raises(ValueError, match=r"checkpoint-9' is 9 steps old, which is more than the 4 asked for"):
        run(*more, "--max_steps", "4")


def test_a_checkpoint_that_does_not_tell_its_settings_is_taken_and_told(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunSettings"]
    path.write_text(json.dumps(state))
    with pytest.raises(InterruptedError):
        start(*EPOCHS, "--output_dir", str(copied), "--resume_from_checkpoint", "last", "--seed", "1")
    assert "checkpoint-6' does not tell the settings of its run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_a_part_of_the_state_is_refused(copied: Path, name: str) -> None:
    (copied / "checkpoint-6" / name).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-6' lacks {name}: "):
        start(*EPOCHS, "--output_dir", str(copied), "--resume_from_checkpoint", "last")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_file_that_is_cut_short_is_named(copied: Path, name: str, kept: float) -> None:
    path = copied / "checkpoint-6" / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"^'{path}' is damaged") as raised:
        start(*EPOCHS, "--output_dir", str(copied), "--resume_from_checkpoint", "last")
    assert "\n" not in str(raised.value)


def test_a_changed_byte_in_the_optimizer_is_found(copied: Path) -> None:
    path = copied / "checkpoint-6" / "optimizer.pt"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"optimizer\.pt' is damaged"):
        start(*EPOCHS, "--output_dir", str(copied), "--resume_from_checkpoint", "last")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint .*: it has no trainer_state.json; give the folder"):
        start(*EPOCHS, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(tmp_path))
    with pytest.raises(ValueError, match="there is no complete checkpoint to resume from in"):
        start(*EPOCHS, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "true")


def test_a_setting_that_was_not_recorded_had_its_default() -> None:
    settings = settings_of(*options.parse(QUICK))
    older = {name: value for name, value in settings.items() if name != "lr_gamma"}
    assert changes({**older, "an_option_of_old": 1}, settings) == {}
    assert changes(older, {**settings, "lr_gamma": 0.5}) == {"lr_gamma": (0.1, 0.5)}
    assert changes({**settings, "adam_beta2": 0.9}, settings) == {"adam_beta2": (0.9, 0.999)}


# --- folders


def test_a_new_run_does_not_mix_with_old_checkpoints(finished: Path) -> None:
    for resume in ([], ["--resume_from_checkpoint", "false"]):
        with pytest.raises(ValueError, match=r"holds checkpoint-6 of an earlier run: --resume_from_checkpoint last"):
            start(*EPOCHS, "--output_dir", str(finished), *resume)


def test_the_default_folder_is_not_given_to_other_settings(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / str(options.parse(QUICK)[2].output_dir)
    folder.mkdir(parents=True)
    shutil.copy(finished / "run.json", folder)
    with pytest.raises(ValueError, match=r"holds a finished run with other settings: amp_epsilon: 0.2 -> 2.0, num_tra"):
        start(*QUICK, "--amp_epsilon", "2.0", "--num_train_epochs", "5")
    with pytest.raises(InterruptedError):
        start(*QUICK)
    with pytest.raises(InterruptedError):
        start(*QUICK, "--amp_epsilon", "2.0", "--output_dir", "another")


@pytest.mark.usefixtures("no_pictures")
def test_nothing_of_an_earlier_run_is_in_the_card_of_a_later_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("curves.png", "confusion.png", "landscape.png", "photo.png", "run.json", "README.md"):
        (folder / name).write_text("of an earlier run")
    run(*QUICK, "--output_dir", str(folder))
    assert sorted(path.name for path in folder.glob("*.png")) == ["photo.png"], "which is the user's"
    assert "curves.png" not in (folder / "README.md").read_text()
    assert not (folder / "_lock").exists()


def test_results_that_are_not_there_are_removed_in_silence(tmp_path: Path) -> None:
    remove_results(tmp_path)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the folder tmp_path as `sole_writer` does."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "_lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_jobs_do_not_write_to_one_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    command = [*QUICK, "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=rf"another job \(process 1 on here\) is writing to '{tmp_path}': wait"):
        start(*command)
    with pytest.raises(InterruptedError):
        start(*QUICK, "--output_dir", str(tmp_path / "other"))
    holder.kill()
    holder.wait()
    assert (tmp_path / "_lock").exists()
    with pytest.raises(InterruptedError):
        start(*command)
    assert not (tmp_path / "_lock").exists()


def test_a_forked_process_does_not_keep_a_folder(tmp_path: Path) -> None:
    """A data worker lives on for some seconds after its parent has been killed."""
    note = tmp_path / "worker"

    def job_with_worker() -> None:
        with sole_writer(tmp_path):
            if (worker := os.fork()) == 0:
                time.sleep(60)
            else:
                note.write_text(str(worker))
            os.kill(os.getpid(), signal.SIGKILL)

    parent = torch.multiprocessing.get_context("fork").Process(target=job_with_worker)
    parent.start()
    parent.join()
    try:
        assert (tmp_path / "_lock").exists()
        with sole_writer(tmp_path):
            os.kill(int(note.read_text()), 0)  # the worker is there
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)


# --- the record


@pytest.mark.parametrize(("wish", "bf16", "fp16"), [("bf16", True, False), ("fp16", False, True), ("no", False, False)])
def test_the_launchers_precision_is_a_setting(
    monkeypatch: pytest.MonkeyPatch, wish: str, bf16: bool, fp16: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", wish)
    parsed = options.parse(QUICK)
    settings = settings_of(*parsed)
    assert (settings["bf16"], settings["fp16"]) == (bf16, fp16)
    assert parsed[2].mixed_precision == wish


def test_an_option_wins_over_the_launchers_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    training = options.parse([*QUICK, "--bf16", "true"])[2]
    assert (training.bf16, training.fp16, training.mixed_precision) == (True, False, "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="accelerate launch --mixed_precision fp8: this job computes in"):
        options.parse(QUICK)


@pytest.mark.usefixtures("no_pictures")
def test_the_record_tells_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    more = ["--gradient_accumulation_steps", "2", "--optim_args", "momentum=0.7", "--num_train_epochs", "1"]
    printed = run(*QUICK, *more, "--output_dir", str(tmp_path))
    assert ", bf16; results in" in printed
    assert "| computed on | cpu, 1 thread, bf16 mixed precision |" in (tmp_path / "README.md").read_text()
    assert "bf16: true" in (tmp_path / "config.yaml").read_text()
    made = json.loads((tmp_path / "run.json").read_text())["execution"]
    assert made["precision"] == "bf16"
    assert (made["device"], made["threads"], made["processes"]) == ("cpu", 1, 1)
    assert made["effective_batch"] == 40
    assert made["optimizer"]["classes"][-2:] == ["AMP", "SGD"]
    assert made["optimizer"]["momentum"] == 0.7
    assert made["scheduler"] == "MultiStepLR"
