"""Show how the training goes."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
_SHOWN = ("loss", "amp_loss", "perturbed_loss", "sharpness", "clipped", "eval_error_%", "eval_nll")


class EpochLine(ProgressCallback):
    """Show a progress bar, and a line for every test and every epoch instead of a dict for every log.

    Without a terminal, or with --disable_tqdm, there is no bar; the line then tells the rate and the time left.
    """

    training_bar: Any
    first_step = 0  # optimizer steps of an earlier run, which this run continues

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Start the bar where the training starts."""
        self.current_step = self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        self._examples = len(train_dataloader.dataset)
        self._start = time.monotonic()
        self._marked = self._start, state.epoch or 0.0  # the rate is measured from here
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            dynamic_ncols=True,
            disable=args.disable_tqdm or None,  # None switches the bar off where stderr is no terminal
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
        """Show no second bar: a test takes a moment."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line when the training's figures are there and, if a test follows, the test's too."""
        logs = logs or {}
        untested = "loss" in logs and args.logging_strategy == "epoch" and not control.should_evaluate
        if not state.is_world_process_zero or self.training_bar is None or not (untested or "eval_error" in logs):
            return
        train: dict[str, Any] = next((r for r in reversed(state.log_history) if "loss" in r), {})
        tested = {} if untested else {"eval_error_%": logs["eval_error"], "eval_nll": logs["eval_nll"]}
        shown = {**train, **tested}
        figures = [f"{name} {shown[name]:.3f}" for name in _SHOWN if name in shown]
        if self.training_bar.disable:
            # The steps left, and the tests among them, are taken to last as long as the steps before.
            share = (state.max_steps - state.global_step) / max(1, state.global_step - self.first_step)
            left = tqdm.format_interval(share * (time.monotonic() - self._start))
            figures += [self._rate(state, testing=logs.get("eval_runtime", 0.0)), f"{left} left"]
        self._write("  ".join([f"epoch {logs['epoch']:>5.1f}", *figures]))
        self._marked = time.monotonic(), state.epoch or 0.0

    def _rate(self, state: Any, testing: float = 0.0) -> str:
        """Return the training examples a second since the mark, without the seconds that a test took."""
        since, epoch = self._marked
        seconds = time.monotonic() - since - testing
        return f"{(state.epoch - epoch) * self._examples / max(seconds, 1e-9):,.0f} images/s"

    def _write(self, line: str) -> None:
        self.training_bar.write(line)
        sys.stdout.flush()  # a file is otherwise written at the end
