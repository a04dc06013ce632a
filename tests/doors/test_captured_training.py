"""A Trainer's steps as graphs: recorded and replayed on a CPU, they are those of Python to the bit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import on_tape
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments
from amp_plugin.core import captured_call, move
from amp_plugin.doors import captured_training

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


class Change(TrainerCallback):
    """Changes a hyper-parameter after the twelfth step."""

    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step == 12:
            optimizer.param_groups[0][self.name] = self.value


class Halve(TrainerCallback):
    """Halves some gradients between the clipping and the step: in place, or by other tensors."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for p in model.parameters() if state.global_step % 4 == 3 else ():
            if state.global_step % 8 == 3:
                p.grad.mul_(0.5)
            else:
                p.grad = p.grad * 0.5


class Intervene(TrainerCallback):
    """Changes the model or the optimizer between two steps, once they are captured."""

    def __init__(self, change: Callable[[Any, Any], None], step: int = 11) -> None:
        self.change, self.step = change, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.change(kwargs["model"], kwargs["optimizer"])


def freeze(model: Any, optimizer: Any) -> None:
    model.body[0].requires_grad_(False)


def other_memory(model: Any, optimizer: Any) -> None:
    for p in model.parameters():
        p.data = p.data * 0.75


def load_optimizer(model: Any, optimizer: Any) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["momentum_buffer"].mul_(0.5)
    optimizer.load_state_dict(state)


def climb_twice(model: Any, optimizer: Any) -> None:
    optimizer.optimizer.inner_iter = 2


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


def trained(
    folder: Path,
    *,
    resume: str | None = None,
    rows: Any = None,
    callbacks: Any = None,
    fused: bool = True,
    **settings: Any,
) -> AMPTrainer:
    args = AMPTrainingArguments(str(folder), **{**SETTINGS, **settings})
    kind = FusedTrainer if fused else AMPTrainer
    rows = rows or dataset()
    trainer = kind(model=Net(), args=args, train_dataset=rows, eval_dataset=dataset()[:6], callbacks=callbacks)  # type: ignore[arg-type]
    trainer.rates = Rates()  # type: ignore[attr-defined]
    trainer.add_callback(trainer.rates)  # type: ignore[attr-defined]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def records(trainer: AMPTrainer) -> list[dict[str, float]]:
    timed = ("runtime", "per_second")
    return [{k: v for k, v in r.items() if not k.endswith(timed)} for r in trainer.state.log_history]


def assert_same(a: AMPTrainer, b: AMPTrainer, since: int = 0) -> None:
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=name)
    for x, y in zip(*(t.optimizer.state_dict()["state"].values() for t in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    first, second = ([r for r in records(t) if r["step"] > since and "train_loss" not in r] for t in (a, b))
    assert first == second
    assert a.rates.seen[since:] == b.rates.seen  # type: ignore[attr-defined]


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
        {"amp_ascent": "subset(0.25)", **BALL},
        {"amp_ascent": "split(0.25)", **BALL},
        {"amp_ascent": "split(0.25)", "gradient_accumulation_steps": 2, **BALL},
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


def test_a_checkpoint_of_captured_steps_is_continued(tmp_path: Path, tape: None) -> None:
    settings = {**BALL, "save_strategy": "steps", "save_steps": 14, "logging_steps": 1}
    whole = trained(tmp_path / "whole", **settings)
    trained(tmp_path / "part", **settings, amp_capture=True)
    resumed = trained(tmp_path / "part", **settings, amp_capture=True, resume=str(tmp_path / "part" / "checkpoint-14"))
    assert_same(whole, resumed, since=14)


def test_hyper_parameters_that_change_are_captured_anew(tmp_path: Path, tape: None) -> None:
    def run(folder: str, **capture: Any) -> AMPTrainer:
        return trained(
            tmp_path / folder, **BALL, **capture, callbacks=[Change("momentum", 0.5), Change("epsilon", 0.02)]
        )

    assert_same(run("eager"), run("captured", amp_capture=True))


@pytest.mark.parametrize("change", [freeze, other_memory, load_optimizer, climb_twice])
def test_what_a_callback_changes_is_what_is_trained(change: Any, tmp_path: Path, tape: None) -> None:
    """A graph would go on in the memory, and with the parameters, of its capture."""

    def run(folder: str, **capture: Any) -> AMPTrainer:
        return trained(tmp_path / folder, **BALL, **capture, callbacks=[Intervene(change)])

    eager = run("eager")
    assert_same(eager, run("captured", amp_capture=True))
    with pytest.raises(AssertionError):
        assert_same(eager, trained(tmp_path, **BALL))


def test_an_optimizer_that_asks_the_host_is_refused(tmp_path: Path, tape: None) -> None:
    def train(make: Any, **settings: Any) -> None:
        model = Net()
        args = AMPTrainingArguments(str(tmp_path), **{**SETTINGS, **BALL, **settings}, amp_capture=True)
        AMPTrainer(
            model=model, args=args, train_dataset=dataset(), eval_dataset=dataset(), optimizers=(make(model), None)
        ).train()

    with pytest.raises(ValueError, match="let the Trainer make the optimizer"):
        train(lambda model: AMP(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="let the Trainer make the optimizer"):
        train(lambda model: AMP(model.parameters(), lr=0.1, fused=True))
    train(lambda model: AMP(model.parameters(), lr=0.1, fused=True, capturable=True))


def test_batches_of_many_shapes_are_told_and_trained_as_they_are(
    tmp_path: Path, tape: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured_training, "MOST_KINDS", 1)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert_same(trained(tmp_path, **BALL), trained(tmp_path, **BALL, amp_capture=True))
    told = [r.message for r in caplog.records if "without a capture" in r.message]
    assert len(told) == 1
    assert "more than 1 shapes" in told[0]


def test_gradients_that_a_callback_changes_are_the_step_s(tmp_path: Path, tape: None) -> None:
    """In place, and by other tensors."""

    def run(folder: str, **capture: Any) -> AMPTrainer:
        return trained(tmp_path / folder, **BALL, **capture, callbacks=[Halve()])

    eager = run("eager")
    assert_same(eager, run("captured", amp_capture=True))
    with pytest.raises(AssertionError):
        assert_same(eager, trained(tmp_path, **BALL))


@pytest.mark.parametrize("piece", ["passes", "clipping", "step"])
def test_what_cannot_be_captured_is_told_and_made_as_it_is(
    piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(call: Any, stream: Any) -> Any:
        made = on_tape(call)
        names.append(piece)
        if len(names) == 1 + ["passes", "clipping", "step"].index(piece):
            raise RuntimeError("the host asked for a value")
        return made

    names: list[str] = []
    monkeypatch.setitem(captured_call.RECORDERS, "cpu", record)
    with pytest.warns(UserWarning, match=f"{piece}.* cannot be captured.*the host asked for a value"):
        captured = trained(tmp_path, **BALL, amp_capture=True)
    assert_same(trained(tmp_path, **BALL), captured)


@pytest.mark.parametrize("logging", ["steps", "no"])
def test_a_step_of_values_that_are_not_finite_is_skipped_and_told(logging: str, tmp_path: Path, tape: None) -> None:
    rows = dataset()
    rows[3]["x"] = rows[3]["x"] * torch.nan
    with pytest.warns(RuntimeWarning, match="the step was skipped"):
        captured = trained(tmp_path, **BALL, amp_capture=True, rows=rows, logging_strategy=logging)
    assert captured.amp is not None
    assert captured.amp.skipped_steps == EPOCHS
    assert all(p.isfinite().all() for p in captured.model.parameters())


def test_the_optimizer_has_its_own_step_afterwards(tmp_path: Path, tape: None) -> None:
    trainer = trained(tmp_path, **BALL, amp_capture=True)
    assert "step" not in vars(trainer.amp)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amp_ascent": "every(2)"}, r"use 'full', 'subset\(0.25\)'"),
        ({"fp16": True, "use_cpu": False}, r"use bf16=True"),
        ({"torch_compile_mode": "reduce-overhead"}, r"captures graphs of its own"),
        ({"optim": "amp_adafactor"}, r"needs an optimizer with fused kernels"),
    ],
)
def test_what_the_host_has_a_say_in_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, tape: None
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **settings, amp_capture=True)


def test_a_device_that_cannot_capture_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").propagate = True
    try:
        told = trained(tmp_path, **BALL, amp_capture=True, fused=False)
    finally:
        logging.getLogger("transformers").propagate = False
    assert "amp_capture: steps are made as they are, without a capture, on cpu" in caplog.text
    assert_same(trained(tmp_path, **BALL, fused=False), told)


def test_the_ball_of_captured_and_compiled_passes_is_compiled_too(
    tmp_path: Path, tape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    function = torch.compile(move._move_in_one_expression, backend=count)
    monkeypatch.setattr(move, "_compiled", lambda: function)
    settings = {**BALL, "torch_compile": True, "torch_compile_backend": "eager"}
    eager = trained(tmp_path, **settings)
    assert compiled == 0
    captured = trained(tmp_path, **settings, amp_capture=True)
    assert compiled == 1
    assert_same(eager, captured)
