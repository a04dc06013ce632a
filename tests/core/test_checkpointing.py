"""Gradient checkpointing and activation offload in every door: the same weights as without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from doors import DOORS, Door, Step, by_attach, by_closure
from problems import SGD_ARGS, small_batches
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from amp_plugin import AMP, LossModule

STEPS = 10
Run = Callable[..., Tensor]  # a function and its arguments


def plainly(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return function(*args)


def reentrant(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    result: Tensor = checkpoint(function, *args, use_reentrant=True)
    return result


def not_reentrant(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    result: Tensor = checkpoint(function, *args, use_reentrant=False)
    return result


def selective(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Keeps what matrix products give, and computes the rest again."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    result: Tensor = checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    return result


class Net(nn.Module):
    """A checkpointed module with BatchNorm and dropout, and a checkpointed function that uses weights of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.stem = nn.Conv2d(3, 4, 3)  # the reentrant kind needs an input that requires a gradient
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
        self.weight = nn.Parameter(torch.randn(10, 96) / 10)
        self.scale = nn.Parameter(torch.ones(10))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(self.block, self.stem(x))
        return self.head(self.run(self._function, h))

    def _function(self, h: Tensor) -> Tensor:
        return F.dropout(torch.tanh(F.linear(h, self.weight)), 0.2, self.training) * self.scale.exp()


def module(run: Run, dtype: torch.dtype = torch.float64) -> LossModule:
    return LossModule(Net(run).to(dtype), F.cross_entropy)


def amp(module: nn.Module, **kwargs: Any) -> AMP:
    return AMP(module.parameters(), **{"epsilon": 0.1, "inner_lr": 0.5, "inner_iter": 2, **SGD_ARGS, **kwargs})


def train(module: nn.Module, step: Step) -> None:
    torch.manual_seed(5)
    for batch in small_batches(STEPS, dtype=next(module.parameters()).dtype):
        step(batch)


def difference(a: nn.Module, b: nn.Module) -> float:
    """Largest ||a - b|| / ||b|| of a parameter."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float(((p - q).norm() / q.norm()).detach()) for p, q in pairs)


def updates(module: LossModule) -> int:
    """How often the running statistics have been updated."""
    return int(module.model.block[1].num_batches_tracked)


# --- checkpointing


@pytest.mark.parametrize("run", [reentrant, not_reentrant, selective])
@pytest.mark.parametrize("door", DOORS)
def test_the_weights_are_those_without_checkpointing(door: Door, run: Run) -> None:
    plain, checkpointed = module(plainly), module(run)
    for m in (plain, checkpointed):
        train(m, door(m, amp(m)))
    assert difference(checkpointed, plain) < 1e-12
    unperturbed = module(plainly)
    train(unperturbed, door(unperturbed, amp(unperturbed, epsilon=0.0)))
    assert difference(plain, unperturbed) > 1e-3, "AMP must act, or nothing is tested"


@pytest.mark.parametrize("run", [plainly, reentrant, not_reentrant, selective])
@pytest.mark.parametrize("door", DOORS)
def test_running_statistics_are_those_of_plain_training_with_checkpointing(door: Door, run: Run) -> None:
    """PyTorch updates them twice where a layer is run again for the backward pass, with any optimizer.

    AMP does neither more nor less: of its passes only the clean one counts, its second run included.
    """
    a, b = module(run), module(run)
    train(a, door(a, amp(a, epsilon=1e-30)))  # a vanishing ball: AMP is SGD
    train(b, door(b, amp(b, epsilon=0.0)))
    assert updates(a) == updates(b) == STEPS * (1 if run is plainly else 2)
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))
    assert difference(a, b) < 1e-12


@pytest.mark.parametrize("run", [reentrant, not_reentrant])
def test_checkpointed_layers_run_again_at_the_perturbed_weights(run: Run) -> None:
    m = module(run)
    optimizer = amp(m, inner_iter=1)
    step = by_attach(m, optimizer)
    theta, seen = m.model.weight.detach().clone(), []
    m.model.block[0].register_forward_hook(lambda *_: seen.append((theta - m.model.weight).norm().item() > 0.0))
    step(small_batches(1, dtype=torch.float64)[0])
    assert seen == [False, False, True, True], "each of both passes, and once more in its backward pass"


@pytest.mark.parametrize("door", [by_attach, by_closure])
def test_a_part_of_the_ball_that_reentrant_checkpointing_hides_is_told(door: Door) -> None:
    """With the stem outside, nothing requires a gradient before the block, and its own is lost in the ascent pass."""
    message = "have a gradient, but had none in the ascent pass, so they were not perturbed.*use_reentrant=False"
    ball = r"\.(block|head)\."
    hidden, seen = module(reentrant), module(not_reentrant)
    step = door(hidden, AMP(hidden.named_parameters(), epsilon=0.1, inner_lr=0.5, parameters=ball, **SGD_ARGS))
    with pytest.warns(UserWarning, match=message):
        train(hidden, step)
    step = door(seen, AMP(seen.named_parameters(), epsilon=0.1, inner_lr=0.5, parameters=ball, **SGD_ARGS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(seen, step)


# --- hooks on saved tensors


@contextmanager
def counting() -> Iterator[list[int]]:
    """Hooks that put clones aside, as offloading does, and count."""
    count = [0, 0]

    def pack(tensor: Tensor) -> Tensor:
        count[0] += 1
        return tensor.detach().clone()

    def unpack(tensor: Tensor) -> Tensor:
        count[1] += 1
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield count


@pytest.mark.parametrize("hooks", [save_on_cpu, counting])
@pytest.mark.parametrize("where", ["forward", "everything"])
@pytest.mark.parametrize("run", [plainly, not_reentrant])
@pytest.mark.parametrize("door", DOORS)
def test_offloaded_activations(door: Door, run: Run, where: str, hooks: Any) -> None:
    plain, offloaded = module(plainly), module(run)
    train(plain, door(plain, amp(plain)))
    if where == "forward":
        forward = offloaded.model.forward

        def with_hooks(x: Tensor) -> Tensor:
            with hooks():
                return forward(x)

        offloaded.model.forward = with_hooks  # type: ignore[method-assign]
    with hooks() if where == "everything" else nullcontext() as count:
        train(offloaded, door(offloaded, amp(offloaded)))
    assert difference(offloaded, plain) < 1e-12
    if count is not None:
        assert count[0] >= count[1] > 100, "the hooks were used, and left alone"


def test_a_lossy_hook_acts_on_gradients_and_not_on_weights() -> None:
    """One that keeps saved tensors in 16 bits: theta is not touched, and attach is the closure still."""

    def pack(tensor: Tensor) -> tuple[torch.dtype, Tensor]:
        return tensor.dtype, tensor.bfloat16() if tensor.is_floating_point() else tensor

    exact, closure, attached = (module(plainly, torch.float32) for _ in range(3))
    train(exact, by_closure(exact, amp(exact)))
    with saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0])):
        train(closure, by_closure(closure, amp(closure)))
        step = by_attach(attached, amp(attached))
        before = [p.detach().clone() for p in attached.parameters()]
        attached(*small_batches(1)[0])["loss"].backward()
        assert all(torch.equal(p, q) for p, q in zip(attached.parameters(), before, strict=True))
        attached.load_state_dict(module(plainly, torch.float32).state_dict())
        attached.zero_grad()
        train(attached, step)
    assert difference(closure, exact) > 1e-3
    assert difference(attached, closure) == 0.0
