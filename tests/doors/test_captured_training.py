"""A Trainer's steps as graphs: recorded and replayed on a CPU, they are those of Python to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import on_tape
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from amp_plugin import AMPTrainer, AMPTrainingArguments
from amp_plugin.core import captured_call

EPOCHS, BATCH, EXAMPLES = 5, 4, 22  # the last batch has 2
BALL: dict[str, Any] = {"amp_epsilon": 0.1, "amp_inner_lr": 0.5}
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.125,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": EPOCHS,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 7,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


class Net(nn.Module):
    """A classifier with BatchNorm, which counts the calls of Python."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
        self.config = SimpleNamespace()
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += self.training
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def dataset() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 5, generator=generator)
    labels = torch.randint(3, (EXAMPLES,), generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


class Rates(TrainerCallback):
    """Sees the learning rates of the groups."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


class FusedTrainer(AMPTrainer):
    """Takes the kernels of a captured step in any step; another kernel rounds otherwise."""

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: Any = None) -> tuple[Any, Any]:
        optimizer, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return optimizer, kwargs | {"fused": True}


def trained(folder: Path, *, resume: str | None = None, **settings: Any) -> AMPTrainer:
    args = AMPTrainingArguments(str(folder), **{**SETTINGS, **settings})
    trainer = FusedTrainer(model=Net(), args=args, train_dataset=dataset(), eval_dataset=dataset()[:6])  # type: ignore[arg-type]
    trainer.rates = Rates()  # type: ignore[attr-defined]
    trainer.add_callback(trainer.rates)  # type: ignore[attr-defined]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def records(trainer: AMPTrainer) -> list[dict[str, float]]:
    timed = ("runtime", "per_second")
    return [{k: v for k, v in r.items() if not k.endswith(timed)} for r in trainer.state.log_history]


def assert_same(a: AMPTrainer, b: AMPTrainer) -> None:
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=name)
    for x, y in zip(*(t.optimizer.state_dict()["state"].values() for t in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert records(a) == records(b)
    assert a.rates.seen == b.rates.seen  # type: ignore[attr-defined]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(captured_call.RECORDERS, "cpu", on_tape)


@pytest.mark.parametrize(
    "settings",
    [
        BALL,
        {"optim": "sgd"},
        {"optim": "amp_adamw_torch", "learning_rate": 0.01, **BALL},
        {"gradient_accumulation_steps": 2, **BALL},
        {"amp_inner_iter": 2, "amp_norm": "global", "amp_batch_norm": "all", **BALL},
        {"max_grad_norm": 0.0, **BALL},
        {"bf16": True, **BALL},
    ],
    ids=str,
)
def test_replayed_steps_are_those_of_python(
    settings: dict[str, Any], tmp_path: Path, tape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings.get("optim") == "sgd":
        monkeypatch.setattr(AMPTrainingArguments, "compares_with_amp", True)
    eager, captured = (trained(tmp_path, **settings, amp_capture=capture) for capture in (False, True))
    assert captured.model.calls < 0.6 * eager.model.calls
    assert_same(eager, captured)
