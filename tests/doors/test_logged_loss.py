"""The losses that the loop adds up: chosen by the device as the stock Trainer's loop chooses them on the host."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.counting import CountCalls
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from amp_plugin import AMPTrainer, AMPTrainingArguments
from amp_plugin.doors import trainer
from amp_plugin.doors.logged_loss import FiniteLoss, loss_for_log

NAN, INF = math.nan, math.inf
# What is added to the losses of the micro-batches; the gradients stay finite.
LOST = [NAN, 0.0, 0.0, -INF, INF, NAN, 0.0, 0.0, 0.0, 0.0, NAN, 0.0]


class Net(nn.Module):
    """A model whose losses are lost where its batch says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor, lost: Tensor) -> dict[str, Tensor]:
        return {"loss": self.linear(x).square().mean() + lost.sum()}


class Overrides(AMPTrainer):
    """A Trainer with a training step of its own, which sees the losses as they are."""

    seen: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        assert type(loss) is Tensor
        self.seen.append(loss.item())
        return loss


def trained(kind: type[Trainer], folder: Path, optim: str = "sgd", **more: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(3, generator=generator), "lost": torch.tensor(lost)} for lost in LOST]
    settings: dict[str, Any] = {"num_train_epochs": 2, "logging_steps": 1, "learning_rate": 0.1, **more}
    args = (AMPTrainingArguments if issubclass(kind, AMPTrainer) else TrainingArguments)(
        str(folder),
        optim=optim,
        optim_args="momentum=0.5",
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    made = kind(Net(), args, train_dataset=data)
    if isinstance(made, Overrides):
        made.seen = []
    made.train()
    assert args.logging_nan_inf_filter == settings.get("logging_nan_inf_filter", True)
    assert type(made._tr_loss) is Tensor
    return [
        {name: value for name, value in record.items() if "runtime" not in name and "second" not in name}
        for record in made.state.log_history
    ]


@pytest.mark.parametrize("kind", [AMPTrainer, Overrides])
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize(("steps", "accumulation"), [(1, 1), (4, 1), (1, 3), (2, 5)])
def test_the_logs_are_the_stock_trainers(
    kind: Any, filtered: bool, steps: int, accumulation: int, tmp_path: Path
) -> None:
    settings = {
        "logging_steps": steps,
        "gradient_accumulation_steps": accumulation,
        "logging_nan_inf_filter": filtered,
    }
    stock, ours = (trained(k, tmp_path, **settings) for k in (Trainer, kind))
    assert repr(ours) == repr(stock)  # NaN equals nothing, but reads the same
    assert any(math.isnan(record.get("loss", 0.0)) for record in stock) != filtered


@pytest.mark.parametrize("accumulation", [1, 5])
def test_the_logs_of_amp_are_those_of_the_loops_own_choice(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"optim": "amp", "logging_steps": 2, "gradient_accumulation_steps": accumulation}
    ours = trained(Overrides, tmp_path, **settings)
    monkeypatch.setattr(trainer, "loss_for_log", lambda _, loss: loss)
    assert ours == trained(Overrides, tmp_path, **settings)
    assert any(record.get("amp_passes") == 2.0 for record in ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 7e-9, NAN, INF])
@pytest.mark.parametrize("before", [0.0, 1.0 / 3.0, 1e30])
def test_the_sum_is_the_loops_to_the_bit(dtype: torch.dtype, value: float, before: float) -> None:
    loss, total = torch.tensor(value, dtype=dtype), torch.tensor(before)
    expected = total + (total / 3 if not loss.isfinite() else loss)
    state = {"_tr_loss": total, "_globalstep_last_logged": 5, "is_in_train": True}
    loop: Any = SimpleNamespace(
        **state, state=SimpleNamespace(global_step=7), args=SimpleNamespace(logging_nan_inf_filter=True)
    )
    total += (chosen := loss_for_log(loop, loss))
    assert type(chosen) is FiniteLoss
    assert type(total) is Tensor
    assert torch.equal(total, expected.float())
    assert not torch.isnan(chosen)
    assert type(chosen + 1) is Tensor


def test_outside_the_loop_a_loss_is_what_it_is(tmp_path: Path) -> None:
    args = AMPTrainingArguments(str(tmp_path), optim="sgd", report_to="none", use_cpu=True)
    made = AMPTrainer(Net(), args)
    made.create_optimizer_and_scheduler(1)
    made.current_gradient_accumulation_steps = 1
    loss = made.training_step(made.model, {"x": torch.ones(1, 3), "lost": torch.tensor([NAN])})
    assert type(loss) is Tensor
    assert loss.isnan()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_waits_for_the_device(accumulation: int, tmp_path: Path) -> None:
    """The stock Trainer asks for every loss whether it is NaN, and if not, whether it is infinite."""

    class Counts(TrainerCallback):
        def __init__(self) -> None:
            self.count = CountCalls()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:  # AMP looks, in its first steps, at what they change
                self.count.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                self.count.__exit__(None, None, None)

    waits = {}
    for kind, optim in ((Trainer, "sgd"), (AMPTrainer, "sgd"), (AMPTrainer, "amp")):
        counts = Counts()

        class Watched(kind):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, callback: TrainerCallback = counts, **kwargs: Any) -> None:
                super().__init__(*args, callbacks=[callback], **kwargs)

        settings = {"logging_steps": 100, "gradient_accumulation_steps": accumulation}
        trained(Watched, tmp_path, optim, **settings)
        assert counts.count.kernels
        waits[kind, optim] = sum(counts.count.syncs.values())
    assert waits.pop((Trainer, "sgd")) >= accumulation
    assert set(waits.values()) == {0}
