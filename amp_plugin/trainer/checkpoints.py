"""`CheckpointMixin`: checkpoints that survive failures, so that ``checkpoint-N`` is complete or not there.

The stock Trainer writes straight into ``checkpoint-N`` and deletes old checkpoints in place, so a process that is
killed meanwhile leaves half a checkpoint, which the next run takes for the last one. The mixin has the files written
into ``_incomplete``, a folder beside the checkpoints, and renames the checkpoint when every process has written its
share. A checkpoint that is to be deleted is renamed away first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from amp_plugin.trainer.resuming import ResumingMixin, read_trainer_state
from amp_plugin.whole_file import sync, whole_file

LAST = "last"
# The Trainer's uploads to the Hub leave out names that begin with "_".
_INCOMPLETE = "_incomplete"
_SAVED = "saved"
_REPLACED = ".replaced"
_MEBIBYTE = 2**20

# Several processes on CPUs resume at "cpu:0" under transformers 5.17: a name of the CPU that torch.load does not know.
torch.serialization.register_package(100, lambda _: None, lambda read, place: read if place == "cpu:0" else None)


class SaveError(OSError):
    """A file could not be saved; the message tells why, which checkpoint is still there and what to do."""


class CheckpointMixin(ResumingMixin):
    """Checkpoints of any `transformers.Trainer` that stay intact when the process is killed or the disk is full.

    The mixin stands before the Trainer: ``class MyTrainer(CheckpointMixin, Trainer)``. It takes the renaming of a
    folder to be atomic, which POSIX file systems promise and mounted object stores do not.

    Raises:
        SaveError: From `train`: before the training starts, the output folder cannot be written to; later, in every
            process, one process could not write its share of a checkpoint. All earlier checkpoints are complete.
    """

    _write_errors: list[Exception] | None = None  # a list while a checkpoint is being written

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Clean up after a killed run, then train as the Trainer does.

        Args:
            resume_from_checkpoint: folder of a checkpoint; True for the last complete checkpoint in the output folder,
                which must exist; or "last" for the last complete checkpoint, or for a start from the beginning if
                there is none.
            *args: further arguments of the Trainer's method.
            **kwargs: further arguments of the Trainer's method.

        Raises:
            ValueError: `resume_from_checkpoint` is True, but there is no complete checkpoint; or a file of the
                checkpoint is damaged, or belongs to another training.
        """
        folder = Path(str(self.args.output_dir))
        if self.args.save_strategy != SaveStrategy.NO:
            check_writable(folder)
        if self.args.should_save:
            _clean_up(folder)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True or resume_from_checkpoint == LAST:
            last = last_checkpoint(folder)
            if last is None and resume_from_checkpoint is True:
                raise ValueError(f"there is no complete checkpoint to resume from in {str(folder)!r}")
            resume_from_checkpoint = last
        if isinstance(resume_from_checkpoint, str) and (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).exists():
            read_trainer_state(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:  # the training was resumed at its end, which the stock loop would notice after one more step
            self.control.should_training_stop = True

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(super()._get_output_dir(trial))
        return folder if self._write_errors is None else os.path.join(folder, _INCOMPLETE)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._write_errors is None:
            self._save_whole(Path(output_dir or str(self.args.output_dir)), state_dict)
            return
        try:
            super()._save(output_dir, state_dict)
        except Exception as error:
            if not _is_write_error(error):
                raise
            # The error is raised later: here the other processes may be waiting for this one.
            self._write_errors.append(error)

    def _save_whole(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Save as the stock method does; weights that are in the folder stay until the new ones are written."""
        written = folder / _INCOMPLETE / _SAVED
        if not self.args.should_save:
            super()._save(str(written), state_dict)  # takes part in the communication alone
            return
        written.mkdir(parents=True, exist_ok=True)
        try:
            super()._save(str(written), state_dict)
            _move(folder, written, "*")
        except Exception:
            with contextlib.suppress(OSError, SafetensorError), safe_open(written / SAFE_WEIGHTS_NAME, "pt"):
                for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME):  # another file failed
                    _move(folder, written, name)
            raise
        finally:
            shutil.rmtree(written, ignore_errors=True)
            with contextlib.suppress(OSError):
                written.parent.rmdir()

    def save_state(self) -> None:
        """Save the state as the stock method does, whole or not at all."""
        if self.is_world_process_zero():
            with whole_file(Path(str(self.args.output_dir), TRAINER_STATE_NAME)) as new:
                self.state.save_to_json(str(new))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._together(folder, name) as self._write_errors:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._write_errors = None
            self._find_best(folder, name)
        with self._together(folder, name):
            if self.args.should_save:
                _complete(folder, name)
                self._rotate(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._write_errors is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        folder = Path(str(self.args.output_dir))
        best = str(self.state.best_model_checkpoint)
        if (folder / Path(best).name).is_dir():  # the folder was renamed, or copied from one that is still there
            self.state.best_model_checkpoint = best = os.path.join(folder, Path(best).name)
        super()._load_best_model()
        # The stock method would delete them in place.
        if self.args.should_save and self.args.save_total_limit == 1 and os.path.isdir(best):
            _discard(folder, [c for c in sort_checkpoints(str(folder)) if not os.path.samefile(c, best)])

    def _find_best(self, folder: Path, name: str) -> None:
        """Record the best checkpoint under its final name, where the stock method did not find a checkpoint yet."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == name or (folder / best).is_dir()):
            self.state.best_model_checkpoint = os.path.join(folder, best)
        if self.args.should_save:
            self.state.save_to_json(str(folder / _INCOMPLETE / name / TRAINER_STATE_NAME))

    def _rotate(self, folder: Path) -> None:
        """Delete the oldest checkpoints beyond the limit, but neither the newest nor the best checkpoint."""
        limit, best = self.args.save_total_limit or 0, self.state.best_model_checkpoint
        if limit > 0:
            checkpoints = sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)
            protected = {checkpoints[-1], *([] if best is None else [str(Path(best))])}
            _discard(folder, checkpoints[: -max(limit, len(protected))])

    @contextlib.contextmanager
    def _together(self, folder: Path, name: str) -> Iterator[list[Exception]]:
        """Wait until every process has written its share; if a process could not, clean up and raise in every one."""
        errors: list[Exception] = []
        try:
            yield errors
        except Exception as error:
            if not (errors or _is_write_error(error)):
                raise
            errors.append(error)
        reasons = [_reason(error, folder) for error in errors]
        if self.args.world_size > 1:
            reasons = gather_object(reasons)
        if not reasons:
            return
        if self.args.should_save:
            _clean_up(folder)
        last = last_checkpoint(folder)
        left = "There is no complete checkpoint yet" if last is None else f"The last complete checkpoint is {last!r}"
        raise SaveError(
            f"could not save {name} in {str(folder)!r}: {reasons[0]}. {left}; mend this (if the disk is full: make"
            f' room, or lower save_total_limit), then continue with resume_from_checkpoint="{LAST}"'
        ) from (errors[0] if errors else None)


def last_checkpoint(folder: Path) -> str | None:
    """Return the complete checkpoint of the highest step in a folder; None if no checkpoint is complete.

    The stock Trainer writes its state last, so half a checkpoint that the stock Trainer left is not taken either.
    """
    states = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    steps = [state.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for state in states]
    last = max(filter(str.isdigit, steps), key=int, default=None)
    return None if last is None else os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{last}")


@contextlib.contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever a library raises when it cannot write into a `SaveError` that tells why."""
    try:
        yield
    except SaveError:
        raise
    except Exception as error:
        if not _is_write_error(error):
            raise
        raise SaveError(f"could not save {what} in {str(folder)!r}: {_reason(error, folder)}") from error


def check_writable(folder: Path) -> None:
    """Make the folder if need be, and raise a `SaveError` unless files can be written there."""
    if problem := _write_problem(folder):
        raise SaveError(f"cannot write to {str(folder)!r}: {problem}; choose another output_dir")


def _complete(folder: Path, name: str) -> None:
    """Give a written checkpoint its final name; an old checkpoint of that name is kept until the new one is there."""
    written, final = folder / _INCOMPLETE / name, folder / name
    for path in (*written.rglob("*"), written):
        # A file may lack its end: torch 2.9 does not tell that it could not write the last bytes.
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            raise OSError(f"{path.name} could not be written whole")
        sync(path)
    if final.exists():
        final.rename(written.with_name(f"{name}{_REPLACED}"))
    written.rename(final)
    sync(folder)
    _clean_up(folder)


def _move(folder: Path, written: Path, names: str) -> None:
    """Move files that are written, also those in folders of their own, to where they belong."""
    for path in sorted(path for path in written.rglob(names) if path.is_file()):
        final = folder / path.relative_to(written)
        final.parent.mkdir(exist_ok=True)
        sync(path)
        path.replace(final)


def _clean_up(folder: Path) -> None:
    """Remove what a killed run was writing or deleting, and put back a checkpoint that it was about to replace."""
    incomplete = folder / _INCOMPLETE
    for replaced in incomplete.glob(f"*{_REPLACED}"):
        final = folder / replaced.name.removesuffix(_REPLACED)
        if not final.exists():
            replaced.rename(final)
    shutil.rmtree(incomplete, ignore_errors=True)


def _discard(folder: Path, checkpoints: list[str]) -> None:
    """Delete checkpoints so that no checkpoint is ever there in part."""
    for checkpoint in checkpoints:
        (folder / _INCOMPLETE).mkdir(exist_ok=True)
        Path(checkpoint).rename(folder / _INCOMPLETE / Path(checkpoint).name)
    _clean_up(folder)


def _is_write_error(error: Exception) -> bool:
    """Whether an error means that a file could not be written."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    # torch's writer of zip files raises bare RuntimeErrors, with various words.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, RuntimeError) and frames[-1].f_globals["__name__"] == torch.serialization.__name__


def _reason(error: Exception, folder: Path) -> str:
    """Return the system's reason, where the library's own words do not tell it ("unexpected pos 576 vs 470")."""
    said = error.strerror if isinstance(error, OSError) else None
    reason = said or _write_problem(folder) or str(error)
    with contextlib.suppress(OSError):
        reason += f" ({shutil.disk_usage(folder).free / _MEBIBYTE:,.0f} MiB free)"
    return reason


def _write_problem(folder: Path) -> str | None:
    """Return why a small file cannot be written in the folder, which is made if need be; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_MEBIBYTE))
    except FileExistsError:
        return "it is a file, not a folder"
    except OSError as error:
        return error.strerror or str(error)
    return None
