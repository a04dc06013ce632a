"""Loops that people copy: timm's and DeiT's, accelerate's, nanoGPT's and others whose model returns a tuple."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_problem as problem
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import LossModule, amp_backward, attach, detach


def timm_optimizer(model: nn.Module, epsilon: float = problem.BALL["epsilon"]) -> Any:
    """Of timm's factory, which spares vectors the weight decay unless it is told not to."""
    ball = {**problem.BALL, "epsilon": epsilon}
    return create_optimizer_v2(model, opt="amp", filter_bias_and_bn=False, **_timm_args(), **ball)


def _timm_args() -> dict[str, Any]:
    return {name: value for name, value in problem.SGD_ARGS.items() if name != "nesterov"}


def test_legacy_train_py(tmp_path: Path) -> None:
    """The training pass of timm's legacy_train.py, with its two lines for model and loss become one."""

    def train(epochs: int, *, resume: bool = False) -> nn.Module:
        model = problem.net()
        optimizer, train_loss_fn, grad_accum_steps = timm_optimizer(model), nn.CrossEntropyLoss(), 2
        if resume:
            checkpoint = torch.load(tmp_path / "last.pth", weights_only=True)
            model.load_state_dict(checkpoint["state_dict"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        step = LossModule(model, train_loss_fn)
        attach(optimizer, step)
        ema = ModelEmaV3(model, decay=0.9)
        model.train()
        for _ in range(epochs):
            for batch_idx, (input, target) in enumerate(problem.batches()):
                loss = step(input, target)["loss"]
                (loss / grad_accum_steps).backward()
                if (batch_idx + 1) % grad_accum_steps == 0:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                    ema.update(model)
        if epochs == 1 and not resume:
            torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pth")
            points = problem.reference(accumulate=2, clip_norm=0.5)
            mean = problem.moving_average([problem.parameters_of(problem.net()), *points], 0.9)
            problem.assert_arrived(problem.weights(ema.module), mean)
        return model

    whole, once = train(2), train(1)
    problem.assert_arrived(problem.weights(once), problem.reference(accumulate=2, clip_norm=0.5)[-1])
    problem.assert_same_bits(problem.weights(train(1, resume=True)), problem.weights(whole))


class DistillationLoss(nn.Module):
    """DeiT's: the criterion is given the inputs as well, for a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = problem.net(torch.float64).eval().requires_grad_(False)

    def forward(self, inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        wanted = F.log_softmax(self.teacher(inputs), dim=1)
        kept = F.kl_div(F.log_softmax(outputs, dim=1), wanted, log_target=True, reduction="batchmean")
        return 0.5 * F.cross_entropy(outputs, labels) + 0.5 * kept


class DistilledLoss(nn.Module):
    """The wrapper of the page."""

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, samples: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(samples, self.model(samples), targets)


def deit(epsilon: float, *, attached: bool = True) -> dict[str, Tensor]:
    """DeiT's `train_one_epoch`, with its scaler, which is timm's NativeScaler."""
    model, criterion = problem.net(), DistillationLoss()
    optimizer = timm_optimizer(model, epsilon)
    loss_scaler, max_norm = NativeScaler(device="cpu"), 0.5
    step = DistilledLoss(model, criterion)
    if attached:
        attach(optimizer, step)
    model.train()
    for samples, targets in problem.batches():
        loss = step(samples, targets)
        optimizer.zero_grad()
        is_second_order = hasattr(optimizer, "is_second_order") and optimizer.is_second_order
        loss_scaler(loss, optimizer, clip_grad=max_norm, parameters=model.parameters(), create_graph=is_second_order)
    return problem.weights(model)


def test_deits_loop_with_its_scaler() -> None:
    """The reference has no criterion of three arguments, so the passes are written out."""
    model, criterion = problem.net(), DistillationLoss()
    optimizer = torch.optim.SGD(model.parameters(), **problem.SGD_ARGS)
    for x, y in problem.batches():
        optimizer.zero_grad()
        problem.set_gradients_of_amp(model, lambda point, x=x, y=y: criterion(x, point(x), y))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    problem.assert_arrived(deit(problem.BALL["epsilon"]), problem.weights(model))
    problem.assert_same_bits(deit(0.0), deit(0.0, attached=False))


@pytest.mark.parametrize("door", ["attach", "amp_backward"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accelerate(door: str, accumulate: int) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate if door == "attach" else 1)
    model = problem.net()
    optimizer = problem.amp(model.parameters())
    step, optimizer = accelerator.prepare(LossModule(model, nn.CrossEntropyLoss()), optimizer)
    data = iter(problem.batches())
    if door == "attach":
        attach(optimizer, step)
        for x, y in data:
            with accelerator.accumulate(step):
                accelerator.backward(step(x, y)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    else:
        while window := list(itertools.islice(data, accumulate)):
            amp_backward(accelerator, step, optimizer, lambda batch: step(*batch)["loss"], window)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    expected = problem.reference(accumulate=accumulate, clip_norm=0.5, each=door == "attach")
    problem.assert_arrived(problem.weights(model), expected[-1])


class ReturnsTuple(nn.Module):
    """nanoGPT's order: what was predicted, then the loss, which is None without targets."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = problem.net(dtype)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.net(idx)
        return logits, None if targets is None else F.cross_entropy(logits, targets)


def nanogpt(
    epsilon: float = problem.BALL["epsilon"],
    *,
    place: Any = 1,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    accumulate: int = 1,
    clip: float = 0.0,
) -> dict[str, Tensor]:
    """nanoGPT's loop: accumulation, a scaler that may be off, clipping, `zero_grad(set_to_none=True)`."""
    model = ReturnsTuple(dtype)
    optimizer = problem.amp(model.parameters(), epsilon=epsilon)
    attach(optimizer, model, loss=place)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    data = iter(problem.batches(dtype))
    for _ in range(problem.STEPS // accumulate):
        for _ in range(accumulate):
            x, y = next(data)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                _logits, loss = model(x, y)
                loss = loss / accumulate
            scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        assert model(problem.batches(dtype)[0][0])[1] is None
    return problem.weights(model)


@pytest.mark.parametrize("place", [1, lambda output: output[1]], ids=["index", "function"])
def test_nanogpts_loop(place: Any) -> None:
    problem.assert_arrived(nanogpt(place=place), problem.reference()[-1])
    problem.assert_same_bits(nanogpt(0.0, place=place), problem.plainly())


def test_nanogpts_loop_accumulates_clips_and_knows_bf16() -> None:
    problem.assert_arrived(nanogpt(accumulate=3, clip=0.5), problem.reference(accumulate=3, clip_norm=0.5)[-1])
    found = nanogpt(dtype=torch.float32, autocast=True)
    problem.assert_arrived(found, problem.in_bf16(), within=1e-6)


def test_a_tuple_that_does_not_begin_with_the_loss_is_told_the_way() -> None:
    model = ReturnsTuple()
    attach(problem.amp(model.parameters()), model)
    with pytest.raises(TypeError, match=r"a tuple that begins with it\. .*attach\(optimizer, module, loss=1\)"):
        model(*problem.batches()[0])
    detach(model)
    attach(problem.amp(model.parameters()), model, loss=0)
    with pytest.raises(TypeError, match=r"returned a loss of shape \(8, 4\) at loss=0"):
        model(*problem.batches()[0])


def test_a_loss_that_is_not_in_the_output_is_an_error_and_leaves_nothing() -> None:
    model = ReturnsTuple()
    before = problem.weights(model)
    attach(problem.amp(model.parameters()), model, loss=lambda output: output[0].square().mean())
    with pytest.raises(TypeError, match="cannot put another loss into the tuple"):
        model(*problem.batches()[0])
    problem.assert_same_bits(problem.weights(model), before)


def test_a_model_of_transformers_that_returns_a_tuple() -> None:
    """With `return_dict=False` the loss comes first, where attach looks for it."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, hidden_act="gelu", return_dict=False,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double()
    written_out, data = (
        copy.deepcopy(model),
        {"input_ids": torch.arange(12).view(3, 4), "labels": torch.tensor([0, 1, 0])},
    )
    optimizer = problem.amp(model.parameters())
    attach(optimizer, model)
    plain = torch.optim.SGD(written_out.parameters(), **problem.SGD_ARGS)
    loss: Callable[[nn.Module], Tensor] = lambda point: point(**data)[0]  # noqa: E731
    for _ in range(3):
        model(**data)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()
        problem.set_gradients_of_amp(written_out, loss)
        plain.step()
    found, expected = problem.parameters_of(model), problem.parameters_of(written_out)
    problem.assert_arrived(found, expected, within=1e-6)
