"""A gradient scaler, on the CPU, in every door: it changes no bit of the weights, and what overflows is skipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from problems import closure_for, parameters_of, small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, LossModule, amp_backward, attach
from amp_plugin.core.grad_scaler import scale_of

STEPS, BATCH, INNER_ITER, OVERFLOW_AT, SCALE = 10, 8, 2, 3, 1024.0
ASCENTS = tuple(range(INNER_ITER))
Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Returns its loss, which is infinite in some training passes."""

    def __init__(self, bad_passes: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4))
        self.passes = 0
        self.bad_passes = {OVERFLOW_AT * (INNER_ITER + 1) + i for i in bad_passes}

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.body(pixel_values), labels)
        self.passes += 1
        return {"loss": loss * torch.inf if self.passes - 1 in self.bad_passes else loss}


class Facts(NamedTuple):
    """After a step."""

    weights: list[Tensor]
    momentum: list[Tensor]
    scale: float | None
    lr: float


class Training:
    """A net, its optimizer and schedule, and what they were after each step."""

    def __init__(self, bad_passes: tuple[int, ...], scaled: bool) -> None:
        self.net = Net(bad_passes)
        self.amp = AMP(self.net.parameters(), 0.1, 0.1, 0.5, INNER_ITER, momentum=0.9, weight_decay=1e-3)
        self.schedule = LambdaLR(self.amp, lambda step: 0.9**step)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if scaled else None
        self.facts: list[Facts] = []

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def update(self, unscale: bool) -> None:
        if self.scaler is None:
            self.amp.step()
        else:
            if unscale:
                self.scaler.unscale_(self.amp)
            self.scaler.step(self.amp)
            self.scaler.update()
        self.amp.zero_grad()
        self.note()

    def note(self) -> None:
        assert not self.amp.perturbed
        weights = [p.detach().clone() for p in self.net.parameters()]
        momentum = [self.amp.state[p]["momentum_buffer"].clone() for p in self.net.parameters()]
        scale = None if self.scaler is None else self.scaler.get_scale()
        self.facts.append(Facts(weights, momentum, scale, self.amp.param_groups[0]["lr"]))


def with_ascend(t: Training, batches: Batches, folder: Path, *, unscale: bool = False) -> None:
    for batch in batches:
        for _ in ASCENTS:
            t.scaled(t.net(*batch)["loss"]).backward()
            t.amp.ascend(grad_scale=1.0 if t.scaler is None else t.scaler.get_scale())
        t.scaled(t.net(*batch)["loss"]).backward()
        t.amp.propagate_overflow()
        t.update(unscale)


def with_attach(t: Training, batches: Batches, folder: Path, *, unscale: bool = False) -> None:
    attach(t.amp, t.net)
    for batch in batches:
        t.scaled(t.net(*batch)["loss"]).backward()
        t.update(unscale)


def with_accelerate(t: Training, batches: Batches, folder: Path, *, attached: bool) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = t.scaler
    net, optimizer, schedule = accelerator.prepare(t.net, t.amp, t.schedule)
    if attached:
        attach(optimizer, net)
    for batch in batches:
        if attached:
            accelerator.backward(net(*batch)["loss"])
        else:
            amp_backward(accelerator, net, optimizer, lambda b: net(*b)["loss"], [batch])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        t.note()


class Note(TrainerCallback):
    def __init__(self, training: Training) -> None:
        self.training = training

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.training.note()


def with_trainer(t: Training, batches: Batches, folder: Path, *, trainer_class: Any, arguments_class: Any) -> None:
    class InOrder(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = arguments_class(
        str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_grad_norm=0.0,  # which would look at scaled gradients, as accelerate does not know of this scaler
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"pixel_values": x, "labels": y} for batch in batches for x, y in zip(*batch, strict=True)]
    optimizers = (t.amp, t.schedule)
    trainer = InOrder(t.net, arguments, train_dataset=data, optimizers=optimizers, callbacks=[Note(t)])
    trainer.accelerator.scaler = t.scaler
    trainer.train()


HOSTS: dict[str, Callable[[Training, Batches, Path], None]] = {
    "accelerate, attached": partial(with_accelerate, attached=True),
    "amp_backward": partial(with_accelerate, attached=False),
    "Trainer": partial(with_trainer, trainer_class=Trainer, arguments_class=TrainingArguments),
    "AMPTrainer": partial(with_trainer, trainer_class=AMPTrainer, arguments_class=AMPTrainingArguments),
}
DOORS: dict[str, Callable[[Training, Batches, Path], None]] = {
    "ascend": with_ascend,
    "ascend, unscale_": partial(with_ascend, unscale=True),
    "attach": with_attach,
    "attach, unscale_": partial(with_attach, unscale=True),
    **HOSTS,
}


def trained(
    door: str, folder: Path, batches: Batches, bad_passes: tuple[int, ...] = (), *, scaled: bool = True
) -> list[Facts]:
    training = Training(bad_passes, scaled)
    DOORS[door](training, batches, folder)
    assert len(training.facts) == len(batches)
    assert training.net.passes == len(batches) * (INNER_ITER + 1)
    return training.facts


def with_closures(batches: Batches, lrs: list[float]) -> list[list[Tensor]]:
    """The weights after each step of plain training, with these learning rates."""
    training, weights = Training((), scaled=False), []
    for batch, lr in zip(batches, lrs, strict=True):

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            training.amp.zero_grad()
            loss: Tensor = training.net(*batch)["loss"]
            loss.backward()
            return loss

        training.amp.param_groups[0]["lr"] = lr
        training.amp.step(closure)
        weights.append([p.detach().clone() for p in training.net.parameters()])
    return weights


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_the_weights_are_those_of_plain_training_to_the_bit(door: str, scaled: bool, tmp_path: Path) -> None:
    batches = small_batches(STEPS, BATCH)
    facts = trained(door, tmp_path, batches, scaled=scaled)
    lrs = [0.1 * 0.9**i if door in HOSTS else 0.1 for i in range(STEPS)]
    for seen, weights in zip(facts, with_closures(batches, lrs), strict=True):
        assert same(seen.weights, weights)
        assert seen.scale == (SCALE if scaled else None)


@pytest.mark.parametrize("bad_passes", [ASCENTS[:1], ASCENTS[-1:], (INNER_ITER,), (*ASCENTS, INNER_ITER)])
@pytest.mark.parametrize("door", DOORS)
def test_an_overflow_in_any_pass_skips_one_step_and_halves_the_scale_once(
    door: str, bad_passes: tuple[int, ...], tmp_path: Path
) -> None:
    batches = small_batches(STEPS, BATCH)
    facts = trained(door, tmp_path, batches, bad_passes)
    assert [seen.scale for seen in facts] == [SCALE] * OVERFLOW_AT + [SCALE / 2] * (STEPS - OVERFLOW_AT)
    before, at = facts[OVERFLOW_AT - 1 : OVERFLOW_AT + 1]
    assert same(at.weights, before.weights)
    assert same(at.momentum, before.momentum)
    del batches[OVERFLOW_AT], facts[OVERFLOW_AT]  # the rest is as if that batch had never been
    # of a skipped step the hosts' schedules take no notice
    lrs = [0.1 * 0.9**i if door in HOSTS else 0.1 for i in range(STEPS)]
    for seen, weights, lr in zip(facts, with_closures(batches, lrs[:-1]), lrs[1:], strict=True):
        assert same(seen.weights, weights)
        assert door not in HOSTS or seen.lr == pytest.approx(lr)


def test_nobody_waits_for_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert (scale_of(None), scale_of(scaler)) == (1.0, 8.0)
    scaler.scale(torch.ones(()))
    monkeypatch.setattr(scaler, "get_scale", lambda: pytest.fail("the device was waited for"))
    assert isinstance(scale := scale_of(scaler), Tensor)
    assert scale.item() == 8.0


def test_without_passing_it_on_an_overflow_in_the_ascent_still_skips_the_step() -> None:
    """But the scaler, which has seen finite gradients, does not learn of it."""
    t, batch = Training((0,), scaled=True), small_batches(OVERFLOW_AT + 1)[-1]
    t.net.passes = OVERFLOW_AT * (INNER_ITER + 1)
    before = parameters_of(t.net)
    assert t.scaler is not None
    for _ in ASCENTS:
        t.scaled(t.net(*batch)["loss"]).backward()
        t.amp.ascend(grad_scale=t.scaler.get_scale())
    t.scaled(t.net(*batch)["loss"]).backward()
    with pytest.warns(RuntimeWarning, match="the step was skipped"):
        t.scaler.step(t.amp)
    t.scaler.update()
    assert t.scaler.get_scale() == SCALE
    assert all(torch.equal(p, before[n]) for n, p in t.net.named_parameters())


def test_after_a_step_that_the_scaler_skipped_a_new_ascent_is_needed() -> None:
    t, batch = Training((INNER_ITER,), scaled=True), small_batches(1)[0]
    t.net.passes = OVERFLOW_AT * (INNER_ITER + 1)
    assert t.scaler is not None
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = t.scaler
    amp_backward(accelerator, t.net, t.amp, lambda b: t.net(*b)["loss"], [batch])
    t.scaler.step(t.amp)
    t.scaler.update()
    assert t.scaler.get_scale() == SCALE / 2
    t.amp.zero_grad()
    t.scaled(t.net(*batch)["loss"]).backward()
    with pytest.raises(RuntimeError, match="without the perturbation"):
        t.scaler.step(t.amp)


@pytest.mark.parametrize("attached", [False, True])
def test_a_gradient_scaler_with_a_closure_is_refused(attached: bool) -> None:
    """accelerate's AcceleratedOptimizer passes the closure so, past the scaler's own check."""
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer, scaler = AMP(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    before = parameters_of(model)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    if attached:
        attach(optimizer, LossModule(model, F.cross_entropy))
    with pytest.raises(RuntimeError, match=r"gradient scaler cannot drive step\(closure\)"):
        scaler.step(optimizer, closure_for(optimizer, model, (x, y)))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("first", [0, 2])
def test_an_overflow_is_passed_on_whatever_parameter_comes_first(first: int) -> None:
    """One without entries cannot carry the infinity by which the scaler learns of it."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (first, 2)]
    amp = AMP(params, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (torch.inf, 1.0):
        scaler.scale(sum(factor * p.sum() for p in params)).backward()
        if factor == 1.0:
            amp.propagate_overflow()
        else:
            amp.ascend(grad_scale=8.0)
    scaler.step(amp)
    scaler.update()
    assert scaler.get_scale() == 4.0


class Table(nn.Module):
    """An embedding, whose gradient may be sparse, and a layer; returns its loss, which is infinite in some passes."""

    def __init__(self, bad_passes: tuple[int, ...], sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(8, 4, sparse=sparse), nn.Linear(4, 3)
        self.bad_passes, self.passes = bad_passes, 0

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.layer(self.table(tokens)), labels)
        self.passes += 1
        return {"loss": loss * torch.inf if self.passes - 1 in self.bad_passes else loss}


def train_table(door: str, scaled: bool, sparse: bool) -> tuple[list[Tensor], float]:
    ascent, descent = 4, 7  # without a scaler nobody looks at the descent
    module = Table((ascent, descent) if scaled else (ascent,), sparse)
    groups = [{"params": module.table.parameters(), "epsilon": 0.0}, {"params": module.layer.parameters()}]
    amp, scaler = AMP(groups, 0.1, 0.1), torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    if door == "attach":
        attach(amp, module)
    for step in range(5):
        batch = torch.tensor([1, 2, 2, step]), torch.tensor([0, 1, 2, 0])
        if door == "passes":
            for _ in amp.ascent_passes(grad_scale=scale_of(scaler) if scaled else 1.0):
                scaler.scale(module(*batch)["loss"]).backward()
        scaler.scale(module(*batch)["loss"]).backward()
        amp.propagate_overflow()
        scaler.step(amp)
        scaler.update()
        amp.zero_grad()
    return [p.detach() for p in module.parameters()], scaler.get_scale()


@pytest.mark.filterwarnings("ignore:AMP. the ascent gradient had NaN")
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("door", ["passes", "attach"])
def test_sparse_gradients_outside_the_ball(door: str, scaled: bool) -> None:
    weights, scale = train_table(door, scaled, sparse=True)
    expected, dense_scale = train_table(door, scaled, sparse=False)
    assert all(p.isfinite().all() for p in weights)
    torch.testing.assert_close(weights, expected)
    assert scale == dense_scale == (SCALE / 4 if scaled else 1.0)
