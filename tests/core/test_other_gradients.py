"""Of parameters that AMP does not hold, only the gradient of the descent counts; else AMP says so."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, ExtraPasses, LossModule, amp_backward, attach
from amp_plugin.core.other_gradients import leaves_of
from amp_plugin.doors.trainer_window import backward_observed

LR, EPSILON, INNER_LR, OTHER_LR, MAX_NORM = 0.1, 0.3, 0.5, 0.2, 0.05
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A classifier, and what its loss has learnable: a temperature outside the module that the loss belongs to."""

    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.backbone(3.0 * x)))
        return out


class Problem:
    """What AMP holds, what another optimizer trains, and their loss.

    Args:
        others: "backbone", with AMP on the head alone; or "temperature", which no module holds.
    """

    def __init__(self, others: str) -> None:
        self.net, self.temperature = Net(), torch.zeros((), dtype=torch.float64, requires_grad=True)
        outside = others == "temperature"
        self.own = list((self.net if outside else self.net.head).parameters())
        self.others = [self.temperature] if outside else list(self.net.backbone.parameters())
        if not outside:
            self.temperature.requires_grad_(False)

    def criterion(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) * torch.exp(-self.temperature) + self.temperature

    def loss(self, batch: Batch) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])

    def state(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in (*self.own, *self.others)])


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 4, generator=generator, dtype=torch.float64), torch.randint(3, (4,), generator=generator))
        for _ in range(4)
    ]


def by_hand(others: str, *, inner_iter: int, clip: bool) -> Tensor:
    """Gradients of the descent for all; delta for what AMP holds."""
    problem = Problem(others)
    params = [*problem.own, *problem.others]
    for batch in batches():
        theta = [p.detach().clone() for p in problem.own]
        for _ in range(inner_iter):
            grads = torch.autograd.grad(problem.loss(batch), problem.own)
            with torch.no_grad():
                for p, before, g in zip(problem.own, theta, grads, strict=True):
                    delta = p - before + INNER_LR * g
                    p.copy_(before + delta * min(1.0, EPSILON / max(float(delta.norm()), 1e-300)))
        grads = torch.autograd.grad(problem.loss(batch), params)
        norm = float(torch.cat([g.flatten() for g in grads]).norm())
        scale = min(1.0, MAX_NORM / (norm + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for p, before in zip(problem.own, theta, strict=True):
                p.copy_(before)
            for p, g in zip(params, grads, strict=True):
                p.sub_((LR if any(p is q for q in problem.own) else OTHER_LR) * scale * g)
    return problem.state()


def by_closure(problem: Problem, amp: AMP) -> Iterator[Batch]:
    passes = ExtraPasses(nn.ModuleList([problem.net, _Holder(problem.temperature)]))

    for batch in batches():

        def closure(batch: Batch = batch) -> Tensor:
            amp.zero_grad()
            loss = problem.loss(batch)
            loss.backward()
            return loss

        amp.step(closure, passes=passes)
        yield batch


def by_passes(problem: Problem, amp: AMP) -> Iterator[Batch]:
    passes = ExtraPasses(nn.ModuleList([problem.net, _Holder(problem.temperature)]))
    for batch in batches():
        made = 0
        for _ in amp.ascent_passes(passes=passes):
            problem.loss(batch).backward()
            made += 1
        with passes.nth(made):
            problem.loss(batch).backward()
        yield batch
        amp.step()
        amp.zero_grad()


def by_attach(problem: Problem, amp: AMP) -> Iterator[Batch]:
    module = LossModule(problem.net, problem.criterion)
    attach(amp, module)
    for batch in batches():
        module(*batch)["loss"].backward()
        yield batch
        amp.step()
        amp.zero_grad()


def by_amp_backward(problem: Problem, amp: AMP) -> Iterator[Batch]:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(problem.net, amp)
    for batch in batches():
        amp_backward(accelerator, model, optimizer, problem.loss, [batch])
        yield batch
        optimizer.step()
        optimizer.zero_grad()


class _Holder(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._parameters["tensor"] = tensor  # type: ignore[assignment]


DOORS = {f.__name__: f for f in (by_closure, by_passes, by_attach, by_amp_backward)}


def trained(door: str, others: str, *, inner_iter: int, clip: bool, set_to_none: bool) -> Tensor:
    problem = Problem(others)
    amp = AMP(problem.own, LR, epsilon=EPSILON, inner_lr=INNER_LR, inner_iter=inner_iter)
    second = torch.optim.SGD(problem.others, OTHER_LR)
    for _ in DOORS[door](problem, amp):
        if clip:
            torch.nn.utils.clip_grad_norm_([*problem.own, *problem.others], MAX_NORM)
        second.step()
        second.zero_grad(set_to_none)
    return problem.state()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("inner_iter", [1, 2])
@pytest.mark.parametrize("others", ["backbone", "temperature"])
@pytest.mark.parametrize("door", DOORS)
def test_only_the_descents_gradient_counts(
    door: str, others: str, inner_iter: int, clip: bool, set_to_none: bool
) -> None:
    if clip and door == "by_closure":
        pytest.skip("the step is over when a loop could clip")
    expected = by_hand(others, inner_iter=inner_iter, clip=clip)
    torch.testing.assert_close(
        trained(door, others, inner_iter=inner_iter, clip=clip, set_to_none=set_to_none), expected, rtol=0, atol=1e-12
    )


class _WithTemperature(AMPTrainer):
    """A trainer whose loss has a learnable part of its own, with an optimizer of its own."""

    problem: Problem

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.problem.criterion(model(inputs["x"]), inputs["labels"])

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gradients = [None if p.grad is None else p.grad.clone() for p in self.problem.others]
        return loss

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


@pytest.mark.parametrize("others", ["backbone", "temperature"])
def test_only_the_descents_gradient_counts_in_a_trainer(others: str) -> None:
    problem = Problem(others)
    amp = AMP(problem.own, LR, epsilon=EPSILON, inner_lr=INNER_LR)
    second = torch.optim.SGD(problem.others, OTHER_LR)

    class Second(torch.optim.lr_scheduler.LambdaLR):
        """The other optimizer steps when the schedule does, after each step of AMP."""

        def step(self, *args: Any) -> None:
            super().step(*args)
            if any(p.grad is not None for p in problem.others):
                second.step()
                second.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        args = AMPTrainingArguments(
            folder,
            optim="amp",
            max_steps=len(batches()),
            per_device_train_batch_size=1,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = _WithTemperature(
            problem.net,
            args,
            train_dataset=[{"x": x, "labels": y} for x, y in batches()],  # type: ignore[arg-type]
            data_collator=lambda rows: rows[0],
            optimizers=(amp, Second(amp, lambda step: 1.0)),
        )
        trainer.problem = problem
        trainer.train()
    expected = by_hand(others, inner_iter=1, clip=False)
    torch.testing.assert_close(problem.state(), expected, rtol=0, atol=1e-12)


def test_a_backward_of_the_users_own_stays_that_of_the_accelerator() -> None:
    accelerator, calls = Accelerator(cpu=True), []
    for own in (False, True):
        if own:
            accelerator.backward = lambda loss, **kwargs: calls.append("own")  # type: ignore[method-assign]
        before = accelerator.backward
        for _ in range(2):
            with backward_observed(accelerator, lambda loss: calls.append("seen")):
                accelerator.backward(torch.ones((), requires_grad=True))
            assert accelerator.backward == before
    assert calls == ["seen", "seen", "seen", "own", "seen", "own"]


# --- loops that do not tell the module


def bare_pass(problem: Problem, amp: AMP, batch: Batch, *, clear: str = "no") -> None:
    problem.loss(batch).backward()
    amp.ascend()
    if clear != "no":
        torch.optim.SGD(problem.others).zero_grad(set_to_none=clear == "to none")
    problem.loss(batch).backward()


def told(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in record if "the sum over all passes" in str(w.message)]


@pytest.mark.parametrize("others", ["backbone", "temperature"])
def test_another_optimizer_does_not_step_on_a_sum_over_passes(others: str) -> None:
    problem = Problem(others)
    amp = AMP(problem.own, LR, epsilon=EPSILON)
    before = [p.detach().clone() for p in problem.others]
    bare_pass(problem, amp, batches()[0])
    with pytest.raises(RuntimeError, match=r"Adam beside AMP: . tensors .* passes=ExtraPasses"):
        torch.optim.Adam(problem.others).step()
    assert all(torch.equal(p, q) for p, q in zip(problem.others, before, strict=True))


def test_nor_on_a_sum_over_passes_of_several_micro_batches() -> None:
    problem = Problem("backbone")
    amp = AMP(problem.own, LR, epsilon=EPSILON)
    bare_pass(problem, amp, batches()[0])
    problem.loss(batches()[1]).backward()
    with pytest.raises(RuntimeError, match="SGD beside AMP"):
        torch.optim.SGD(problem.others, OTHER_LR).step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_another_optimizer_may_clear_the_sum_and_make_a_pass_of_its_own(set_to_none: bool) -> None:
    """As the discriminator's does, whose gradients the generator's step leaves behind."""
    problem = Problem("backbone")
    amp, second = AMP(problem.own, LR, epsilon=EPSILON), torch.optim.SGD(problem.others, OTHER_LR)
    bare_pass(problem, amp, batches()[0])
    assert len(told(amp.step)) == 1
    second.zero_grad(set_to_none)
    second.step()
    problem.loss(batches()[1]).backward()
    second.step()


def test_clipping_over_a_sum_over_passes_is_an_error() -> None:
    problem = Problem("backbone")
    amp = AMP(problem.own, LR, epsilon=EPSILON)
    before = [p.detach().clone() for p in problem.own]
    bare_pass(problem, amp, batches()[0])
    torch.nn.utils.clip_grad_norm_(problem.net.parameters(), MAX_NORM)
    with pytest.raises(RuntimeError, match=r"^AMP: 2 tensors that AMP does not hold \(the first of shape \(6"):
        amp.step()
    assert all(torch.equal(p, q) for p, q in zip(problem.own, before, strict=True))


def test_gradients_that_nobody_uses_are_told_of_once() -> None:
    problem = Problem("backbone")
    amp = AMP(problem.own, LR, epsilon=EPSILON)

    def step(batch: Batch) -> None:
        bare_pass(problem, amp, batch)
        amp.step()
        amp.zero_grad()

    first, *rest = batches()
    assert len(told(lambda: step(first))) == 1
    assert not told(lambda: [step(batch) for batch in rest])


@pytest.mark.parametrize("clear", ["to none", "to zero"])
def test_a_loop_that_clears_the_gradients_of_others_is_left_alone(clear: str) -> None:
    problem = Problem("backbone")
    amp, second = AMP(problem.own, LR, EPSILON, INNER_LR), torch.optim.SGD(problem.others, OTHER_LR)
    expected = by_hand("backbone", inner_iter=1, clip=True)

    def train() -> None:
        for batch in batches():
            amp.zero_grad()
            second.zero_grad(set_to_none=clear == "to none")
            bare_pass(problem, amp, batch, clear=clear)
            amp.restore()
            torch.nn.utils.clip_grad_norm_([*problem.own, *problem.others], MAX_NORM)
            amp.step()
            second.step()

    assert not told(train)
    torch.testing.assert_close(problem.state(), expected, rtol=0, atol=1e-12)


def test_the_watch_over_one_optimizers_others_does_not_disturb_another_amp() -> None:
    """Weights that change in the forward pass, under a hook, are taken for those of an optimizer inside backward."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 2.0))

        def forward(self) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(max=1.0)
            return self.weight.square().sum()

    module, problem = Clamped(), Problem("backbone")
    first, second = AMP(module.parameters(), LR), AMP(problem.own, LR)
    attach(first, module)
    module().backward()
    bare_pass(problem, second, batches()[0])  # finds the gradients of the module
    assert module.weight._post_accumulate_grad_hooks
    first.zero_grad()
    module().backward()
    first.step()


def test_another_loop_may_add_to_its_own_gradients_after_the_first_step() -> None:
    """Two models are trained in turns, and one of them accumulates gradients over the turns."""
    other, problem = Net(), Problem("backbone")
    amp, second = AMP(problem.own, LR), torch.optim.SGD(other.parameters(), LR)
    other(batches()[0][0]).sum().backward()
    problem.net.backbone.requires_grad_(False)
    bare_pass(problem, amp, batches()[0])
    assert not told(amp.step)
    other(batches()[1][0]).sum().backward()
    second.step()


def test_the_check_ends_with_the_first_step() -> None:
    """No hook stays behind on the user's tensors, and no optimizer is watched any more."""
    problem = Problem("backbone")
    amp = AMP(problem.own, LR, epsilon=EPSILON)
    for batch in batches()[:2]:
        bare_pass(problem, amp, batch)
        amp.step()
        amp.zero_grad()
    assert not any(p._post_accumulate_grad_hooks for p in problem.others)
    torch.optim.SGD(problem.others, OTHER_LR).step()


def test_the_leaves_of_a_loss_are_what_its_backward_pass_reaches() -> None:
    used, unused, frozen = (torch.ones(2, requires_grad=grad) for grad in (True, True, False))
    inner = torch.ones((), requires_grad=True)
    loss = (
        torch.utils.checkpoint.checkpoint(lambda x: x * inner, used, use_reentrant=False) * frozen
    ).sum() + used.sum()
    assert {id(t) for t in leaves_of(loss)} == {id(used), id(inner)}
    assert unused.grad is None
    assert leaves_of(torch.ones(())) == []
