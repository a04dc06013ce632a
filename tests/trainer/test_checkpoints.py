from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from problems import small_net
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager
from transformers.trainer_utils import get_last_checkpoint

from amp_plugin import AMPTrainer, AMPTrainingArguments
from amp_plugin.trainer.checkpoints import SaveError, _clean_up
from amp_plugin.trainer.publishing import PublishingMixin

STEPS = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small_net(dropout=0.5)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(i % 4)} for i in range(16)]


def trainer_for(folder: Path, *, kind: type[Trainer] = AMPTrainer, callbacks: Any = None, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {
        "learning_rate": 0.05,
        "amp_epsilon": 0.1,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if kwargs.get("optim") == "sgd":
        del settings["amp_epsilon"]
    args = AMPTrainingArguments(str(folder), **{**settings, **kwargs})
    data: Any = images()
    return kind(model=Net(), args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}  # type: ignore[union-attr]


def resume(trainer: Trainer) -> int:
    """Train on from the last checkpoint; returns the step it was written at."""
    begun: list[int] = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)

    trainer.add_callback(Begin())
    trainer.train(resume_from_checkpoint="last")
    return begun[0]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder by their hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def checkpoints(folder: Path) -> dict[str, dict[str, str]]:
    return {path.name: contents(path) for path in sorted(folder.glob("checkpoint-*"))}


class At(TrainerCallback):
    """Calls something once, at an event of the Trainer's and a step."""

    def __init__(self, event: str, step: int, action: Callable[[], None]) -> None:
        setattr(self, event, self._call)
        self._step, self._action = step, action

    def _call(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._action()


# --- killed


def in_a_child(action: Callable[[], object]) -> int:
    """Run it in a copy of this process; returns how that ended, as `os.waitpid` says."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.alarm(60)
    random.seed(0)  # which Python seeds anew in a child
    try:
        action()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def killed_at(event: int, action: Callable[[], object]) -> bool:
    """Whether SIGKILL came at that event of the file system (from 0), before there were no more of them."""
    names = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}

    def run() -> None:
        seen = 0

        def audit(name: str, arguments: object) -> None:
            nonlocal seen
            if name in names:
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(audit)  # for good: in the child only
        action()

    ended = in_a_child(run)
    assert ended in (0, signal.SIGKILL), "the save itself failed"
    return ended == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True], ids=["a new checkpoint", "the same step again"])
def test_a_save_killed_at_any_point_leaves_whole_checkpoints(tmp_path: Path, again: bool) -> None:
    """With save_total_limit 1: the old one, both or the new one, whatever it was doing to the file system."""
    folder, kept = tmp_path / "out", tmp_path / "kept"
    trainer = trainer_for(folder, save_total_limit=1, max_steps=2)
    trainer.train()
    shutil.copytree(folder, kept)
    old = checkpoints(folder)
    if not again:
        trainer.state.global_step += 1
    trainer.state.total_flos += 1.0  # so that saving again makes another file

    def save() -> None:
        trainer._save_checkpoint(trainer.model, trial=None)

    assert in_a_child(save) == 0
    new = checkpoints(folder)
    assert len(old) == len(new) == 1
    assert old != new
    outcomes: list[str] = []
    while True:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        if not killed_at(len(outcomes), save):
            break
        _clean_up(folder)  # as the next run does first
        left = checkpoints(folder)
        assert left in (old, new, {**old, **new}), f"event {len(outcomes)}"
        assert [path.name for path in folder.iterdir()] == list(left), "leftovers"
        outcomes.append("old" if left == old else "new" if left == new else "both")
    assert outcomes == sorted(outcomes, key=["old", "both", "new"].index)
    assert ("both" in outcomes) != again
    assert len(outcomes) > 20
    assert {outcomes[0], outcomes[-1]} == {"old", "new"}


def stop() -> None:
    raise RuntimeError("stopped")


def stopped(folder: Path, step: int, **kwargs: Any) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        trainer_for(folder, callbacks=[At("on_step_end", step, stop)], **kwargs).train()


# --- resumed


def test_half_a_checkpoint_is_not_taken_for_the_last(tmp_path: Path) -> None:
    """What a killed stock Trainer leaves, somebody's copy, and what saves killed here leave: one about to replace."""
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "out"
    stopped(folder, 5)
    for name in ("checkpoint-5", "checkpoint-99-copy", "_incomplete/checkpoint-6"):
        shutil.copytree(folder / "checkpoint-2", folder / name)
    (folder / "checkpoint-5" / "trainer_state.json").unlink()
    (folder / "_incomplete" / "checkpoint-6" / "of an old run").touch()
    (folder / "checkpoint-4").rename(folder / "_incomplete" / "checkpoint-4.replaced")
    assert get_last_checkpoint(str(folder)) == str(folder / "checkpoint-5"), "the stock Trainer would take half of one"
    resumed = trainer_for(folder)
    assert resume(resumed) == 4
    assert_equal(weights(resumed), weights(whole))
    assert contents(folder / "checkpoint-6").keys() == contents(tmp_path / "whole" / "checkpoint-6").keys()


def test_a_state_may_be_read_to_a_cpu_with_an_index(tmp_path: Path) -> None:
    """There a Trainer of transformers 5.17 reads the optimizer's, in each of several processes."""
    saved = {"step": torch.arange(3), "momentum": torch.randn(2)}
    torch.save(saved, tmp_path / "optimizer.pt")
    assert_equal(torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu:0")), saved)


def test_last_starts_where_there_is_no_checkpoint_but_true_does_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no complete checkpoint to resume from in '.*out'"):
        trainer_for(tmp_path / "out").train(resume_from_checkpoint=True)
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    started = trainer_for(tmp_path / "out")
    started.train(resume_from_checkpoint="last")
    assert_equal(weights(started), weights(whole))
    again = trainer_for(tmp_path / "out")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS, "the stock loop makes one step more when it is resumed at its end"
    assert_equal(weights(again), weights(whole))


# --- the same as the stock Trainer's


class Watch(TrainerCallback):
    """Decides which evaluation is the best, and notes what is there after each save."""

    figures: ClassVar[dict[int, float]] = {1: 3.0, 2: 2.0, 3: 4.0, 4: 5.0, 5: 1.0, 6: 9.0}

    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        metrics["eval_loss"] = self.figures[state.global_step]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        files = {path.name: sorted(file.name for file in path.iterdir()) for path in Path(args.output_dir).iterdir()}
        best = {"now": state.best_model_checkpoint}
        for path in Path(args.output_dir).glob("*/trainer_state.json"):
            best[path.parent.name] = json.loads(path.read_text())["best_model_checkpoint"]
        self.seen.append((files, {name: value and Path(value).name for name, value in best.items()}))


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_steps": 1, "save_total_limit": 1, "save_only_model": True},
        {"eval_steps": 1, "save_total_limit": 2},
        {"eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True},
        {"eval_steps": 2, "save_total_limit": 2, "load_best_model_at_end": True},
        {"eval_steps": 2, "save_strategy": "best"},
    ],
    ids=str,
)
def test_the_checkpoints_are_those_of_the_stock_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"optim": "sgd", "eval_strategy": "steps", "metric_for_best_model": "loss", **settings}
    runs = []
    for kind in (Trainer, AMPTrainer):
        folder, watch = tmp_path / kind.__name__, Watch()
        trainer = trainer_for(folder, kind=kind, callbacks=[watch], **settings)
        trainer.train()
        assert Path(trainer.state.best_model_checkpoint).parent == folder
        runs.append((watch.seen, {path.name for path in folder.iterdir()}, weights(trainer)))
    assert runs[0][:2] == runs[1][:2]
    assert len(runs[0][0]) == (1 if settings.get("save_strategy") == "best" else 3)
    assert_equal(runs[0][2], runs[1][2])


def test_a_checkpoint_is_pushed_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, set[str]] = {}

    def push(self: Trainer, folder: str) -> None:
        pushed[folder] = {path.name for path in Path(folder).iterdir()}

    monkeypatch.setattr(PublishingMixin, "_push_from_checkpoint", push)
    trainer = trainer_for(tmp_path)
    trainer.args.push_to_hub = True
    trainer.train()
    assert list(pushed) == [str(tmp_path / f"checkpoint-{n}") for n in (2, 4, 6)]
    assert all({"model.safetensors", "optimizer.pt", "trainer_state.json"} < files for files in pushed.values())


def test_a_checkpoint_just_in_time_is_complete(tmp_path: Path) -> None:
    """The stock one begins by making the folder and putting a note into it."""

    def save() -> None:
        CheckpointManager(trainer).execute_jit_checkpoint()
        stop()

    trainer = trainer_for(tmp_path / "out", callbacks=[At("on_step_end", 3, save)])
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    (tmp_path / "out" / "checkpoint-5").mkdir()
    (tmp_path / "out" / "checkpoint-5" / "checkpoint-is-incomplete.txt").touch()
    resumed = trainer_for(tmp_path / "out")
    assert resume(resumed) == 3
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    assert_equal(weights(resumed), weights(whole))


# --- full disks and unwritable folders


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file can be larger than so many bytes, whoever writes it, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", [None, "model.safetensors", "rng_state.pth"])
def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(tmp_path: Path, name: str | None) -> None:
    class Full(AMPTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            limit: Any = nullcontext()
            if self.state.global_step == 4:  # a byte too few for this file, or for any
                same = tmp_path / "out" / "checkpoint-2" / str(name)
                limit = small_files(same.stat().st_size - 1 if name else 0)
            with limit:
                super()._save_checkpoint(*args, **kwargs)

    with pytest.raises(SaveError) as raised:
        trainer_for(tmp_path / "out", kind=Full).train()
    start = re.escape(f"could not save checkpoint-4 in '{tmp_path / 'out'}': File too large (")
    then = re.escape(f"MiB free). The last complete checkpoint is '{tmp_path / 'out' / 'checkpoint-2'}'; mend this (if")
    assert re.fullmatch(rf'{start}[0-9,]+ {then}.*continue with resume_from_checkpoint="last"', str(raised.value))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    resumed = trainer_for(tmp_path / "out")
    resumed.train(resume_from_checkpoint="last")
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_failure_after_the_writing_is_one_clear_error_too(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems tell at the end; a checkpoint of the same name that has made way already comes back."""
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.train()
    before = checkpoints(tmp_path)
    rename = Path.rename

    def fail(path: Any, *args: Any) -> None:
        if call == "fsync" or path.parts[-2:] == ("_incomplete", "checkpoint-2"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        rename(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), fail)
        with pytest.raises(SaveError, match=r"Disk quota exceeded .*checkpoint-2'; mend"):
            trainer._save_checkpoint(trainer.model, trial=None)
    assert checkpoints(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("error", [RuntimeError("odd"), ValueError("odd")], ids=repr)
def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path, error: Exception) -> None:
    class Odd(AMPTrainer):
        def _save_scaler(self, output_dir: str) -> None:
            raise error

    with pytest.raises(type(error), match=r"^odd$"):
        trainer_for(tmp_path, kind=Odd).train()


def test_an_unwritable_folder_is_found_before_training(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "out")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").touch()
    with pytest.raises(SaveError, match=r"cannot write to '.*out': it is a file, not a folder; choose another"):
        trainer.train()
    assert trainer.state.global_step == 0
