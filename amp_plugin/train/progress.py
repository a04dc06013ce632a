"""What the main job shows while it trains."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


class EpochLine(ProgressCallback):
    """A progress bar, and a line for every epoch instead of a dict for every log.

    Without a terminal, or with --disable_tqdm, there is no bar; the line then tells the rate and the time left.

    Attributes:
        first_step: number of optimizer steps that were made before, by the run that this one continues.
    """

    training_bar: Any
    first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Start the bar where the training starts."""
        self.current_step = self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        self._examples = len(train_dataloader.dataset)
        self._start = time.monotonic()
        self._mark(state)
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            dynamic_ncols=True,
            disable=args.disable_tqdm or None,  # None: where stderr is no terminal
            smoothing=0,  # tests take their time too
            bar_format=_BAR,
        )
        if state.global_step:
            self._write(f"continues after step {state.global_step} of {state.max_steps}")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the epoch on the bar."""
        if state.is_world_process_zero:
            self.training_bar.set_description(f"epoch {int(state.epoch or 0) + 1}/{state.num_train_epochs}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            self.training_bar.set_postfix_str(self._rate(state), refresh=False)
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar: a test takes a moment."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line when both the training's and the test's figures are there."""
        if not state.is_world_process_zero or self.training_bar is None or "eval_error" not in (logs or {}):
            return
        train: dict[str, Any] = next((r for r in reversed(state.log_history) if "loss" in r), {})
        shown = {**train, "eval_error_%": logs["eval_error"], "eval_nll": logs["eval_nll"]}
        names = ("loss", "amp_loss", "perturbed_loss", "sharpness", "clipped", "eval_error_%", "eval_nll")
        figures = [f"{name} {shown[name]:.3f}" for name in names if name in shown]
        if self.training_bar.disable:
            figures += [self._rate(state, testing=logs.get("eval_runtime", 0.0)), f"{self._left(state)} left"]
        self._write("  ".join([f"epoch {logs['epoch']:>5.1f}", *figures]))
        self._mark(state)

    def _mark(self, state: Any) -> None:
        """Measure the rate from here."""
        self._marked = time.monotonic(), state.epoch or 0.0

    def _rate(self, state: Any, testing: float = 0.0) -> str:
        """Training examples a second since the mark; `testing` are the seconds of it that a test took."""
        since, epoch = self._marked
        seconds = time.monotonic() - since - testing
        return f"{(state.epoch - epoch) * self._examples / max(seconds, 1e-9):,.0f} images/s"

    def _left(self, state: Any) -> str:
        """The time that the steps left will take if they, and the tests among them, take as long as those before."""
        share = (state.max_steps - state.global_step) / max(1, state.global_step - self.first_step)
        return str(tqdm.format_interval(share * (time.monotonic() - self._start)))

    def _write(self, line: str) -> None:
        self.training_bar.write(line)
        sys.stdout.flush()  # a file is otherwise written at the end
