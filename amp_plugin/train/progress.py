"""What the main job shows while it trains."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback


class EpochLine(ProgressCallback):
    """A progress bar, and a line for every epoch instead of a dict for every log."""

    training_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, unless --disable_tqdm."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=args.disable_tqdm)
            if state.global_step:
                self.training_bar.write(f"continues after step {state.global_step} of {state.max_steps}")
        self.current_step = 0

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar: a test takes a moment."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line when both the training's and the test's figures are there."""
        if not state.is_world_process_zero or self.training_bar is None or "eval_error" not in (logs or {}):
            return
        train: dict[str, Any] = next((r for r in reversed(state.log_history) if "loss" in r), {})
        shown = {**train, "eval_error_%": logs["eval_error"], "eval_nll": logs["eval_nll"]}
        names = ("loss", "amp_loss", "sharpness", "clipped", "eval_error_%", "eval_nll")
        figures = "  ".join(f"{name} {shown[name]:.3f}" for name in names if name in shown)
        self.training_bar.write(f"epoch {logs['epoch']:>5.1f}  {figures}")
