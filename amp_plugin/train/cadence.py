"""Decide when the main job tests and saves, and stop it with a checkpoint before its time is over."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from amp_plugin.text import for_shell
from amp_plugin.train.options import RecipeArguments
from amp_plugin.trainer.checkpoints import last_checkpoint

clock = time.monotonic

_MARGIN = 1.25  # what is to come may take so many times what it took before
_LOOKS = 10  # the clock is read about so often in the shorter of `--minutes` and `--save_minutes`
_REPORT = 10.0  # seconds from the final test to the end of the process: tables, pictures and model card
_LEAVING = 2.0  # seconds from the last checkpoint to the end of the process
_WRITTEN = 50e6  # bytes a second that are written, until a checkpoint has been


class Cadence(TrainerCallback):
    """Follow `--eval_every_epochs`, `--save_minutes` and `--minutes` in a training of the stock Trainer.

    A test or a checkpoint is made as the Trainer makes any other, after the callback has asked for it. The first
    process's clock decides for all processes. The clock is read when the device has finished, at the end of each epoch
    and some times within a long one, so that no step waits for it: after a look, every process knows at which step
    the next look is. A stop is at the end of an epoch where epochs are short beside the minutes, because the means that
    are logged of an epoch are then those of the whole epoch, and after a step where an epoch is long.

    Args:
        args: options of the run.
        start: time on `clock` from which `--minutes` counts.
        tested: number of examples in a test for each training example.
        further: number of tests of that size that come after the final one.
    """

    def __init__(self, args: RecipeArguments, start: float, tested: float, further: float = 0.0) -> None:
        self.stopped = False  # whether the training ended early, with a checkpoint
        self._every = args.eval_every_epochs
        self._limit = math.inf if args.minutes is None else 60 * args.minutes
        self._period = math.inf if args.save_minutes is None else 60 * args.save_minutes
        self._start, self._tested, self._further = start, tested, further
        self._step = 0.0  # seconds of a step; 0 until they are known
        self._test: float | None = None  # seconds of a test; None until there was one

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Look at the clock after the first step; the second step is the first that is measured."""
        timed = min(self._limit, self._period) < math.inf
        self._epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)  # in steps
        self._next_look = state.global_step + 1 if timed else math.inf
        self._saved, self._seen, self._seen_step = clock(), 0.0, -1
        # A checkpoint holds the weights and, with most optimizers, two more numbers for each.
        self._save = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) / _WRITTEN

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock where that was announced, unless the epoch or the training ends here."""
        within = state.global_step % self._epoch and state.global_step < state.max_steps
        if within and state.global_step >= self._next_look:
            self._look(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the test in most epochs, but not in the last one, and look at the clock."""
        if self.stopped:  # within the epoch, whose end the Trainer announces all the same
            control.should_log = control.should_evaluate = control.should_save = False
            return
        ended = state.global_step >= state.max_steps
        if args.eval_strategy == "epoch" and round(state.epoch) % self._every and not ended:
            control.should_evaluate = False
        if self._next_look < math.inf:
            self._look(args, state, control, at_end=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure a test that follows a look."""
        if self._seen_step == state.global_step:
            now = clock()
            self._test, self._seen = now - self._seen, now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure a checkpoint that follows a look."""
        if self.stopped:
            # The Trainer would load the best checkpoint now, and with save_total_limit=1 delete the one that continues.
            state.best_model_checkpoint = None
        self._saved = clock()
        if self._seen_step == state.global_step:
            self._save, self._seen = self._saved - self._seen, self._saved

    def _look(self, args: Any, state: Any, control: Any, at_end: bool = False) -> None:
        """Decide in all processes whether to save, whether to stop and when to look again."""
        if args.device.type != "cpu":
            torch.accelerator.synchronize()  # the host runs ahead of the device
        now = clock()
        if state.global_step > self._seen_step >= 0:
            self._step = (now - self._seen) / (state.global_step - self._seen_step)
        self._seen, self._seen_step = now, state.global_step
        # Within an epoch a checkpoint waits twice as long, for the end of the epoch.
        save = control.should_save or now - self._saved >= (1 if at_end else 2) * self._period
        test = self._tested * self._epoch * self._step if self._test is None else self._test
        due = test * control.should_evaluate + self._save * save
        room = self._start + self._limit - now - _LEAVING - _MARGIN * (due + self._save)
        steps, stop = self._steps_to_next_look(state, room, _MARGIN * test, at_end)
        decision = [(bool(save or stop), stop, state.global_step + steps)]
        if args.world_size > 1:
            broadcast_object_list(decision)
        control.should_save, self.stopped, self._next_look = decision[0]
        control.should_training_stop |= self.stopped

    def _steps_to_next_look(self, state: Any, room: float, test: float, at_end: bool) -> tuple[int, bool]:
        """Return the steps to make before the next look, and whether the training has to stop instead.

        The `room` is the seconds until a checkpoint has to be begun, and `test` those of the test that ends an epoch.
        """
        step = _MARGIN * self._step
        left = min(self._epoch - state.global_step % self._epoch, state.max_steps - state.global_step)
        if left == 0:
            return 1, room < (1 + self._further) * test + _REPORT
        if not step:
            return 1, room < 0
        steps = min(left, max(1, int(min(self._limit, self._period) / _LOOKS / step)))
        if left * step + test <= room:
            return steps, False
        if at_end and self._epoch * step <= self._limit / _LOOKS:
            return steps, True
        steps = min(steps, max(1, int(room / 2 / step)))
        return steps, steps * step + test * (steps == left) > room


def stop_line(args: RecipeArguments, argv: Sequence[str], step: int, steps: int) -> str:
    """Tell that the training has stopped, and the command that continues; `argv` is what the command was given."""
    stopped = f"stopped at step {step:,} of {steps:,}, before --minutes {args.minutes:g}"
    return f"{stopped}; this continues:\n{continuing(args, argv)}"


def interruption(args: RecipeArguments, argv: Sequence[str], step: int) -> str:
    """Tell what is left of a training that its user interrupts; `argv` is what the command was given."""
    last = last_checkpoint(Path(str(args.output_dir)))
    if last is None:
        hint = "; --save_strategy epoch makes them" if args.save_strategy == "no" else ""
        return f"stopped at step {step:,}, with no checkpoint to continue from{hint}"
    return f"stopped at step {step:,}; this continues after {last}: {continuing(args, argv)}"


def continuing(args: RecipeArguments, argv: Sequence[str]) -> str:
    """Return the command that continues after the last checkpoint; `argv` is what the command was given."""
    program = ["-m", "amp_plugin.train"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
    launcher = ["torchrun", "--nproc_per_node", str(args.world_size)] if args.world_size > 1 else ["python"]
    if precision := os.environ.get("ACCELERATE_MIXED_PRECISION"):  # set by accelerate launch
        cpu = ["--cpu"] if args.device.type == "cpu" else []
        launcher = ["accelerate", "launch", *cpu, "--num_processes", str(args.world_size)]
        launcher += ["--mixed_precision", precision]
    resume = [] if args.checkpoint_to_resume() == "last" else ["--resume_from_checkpoint", "last"]
    command = for_shell([*launcher, *program, *argv, *resume])
    if args.hub_token:
        command = command.replace(args.hub_token, "TOKEN")
    return command
