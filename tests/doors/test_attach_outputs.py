"""What an attached module returns: where its loss may be, and that nothing but the loss can be differentiated."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from problems import parameters_of, small_batches, small_net
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from transformers.utils import ModelOutput

from amp_plugin import AMP, LossModule, attach

X = torch.tensor([1.0, 2.0, 3.0])


class Shaped(nn.Module):
    """Returns its loss and its features in one of the shapes that hosts use."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.ones(3)), shape

    def forward(self, x: Tensor) -> Any:
        features = self.weight * x
        return self.shape(features.square().sum(), features)


def shaped(shape: Callable[[Tensor, Tensor], Any]) -> tuple[Shaped, AMP]:
    module = Shaped(shape)
    optimizer = AMP(module.parameters(), lr=0.1, epsilon=0.1, inner_lr=1.0)
    attach(optimizer, module)
    return module, optimizer


Named, Unnamed = namedtuple("Named", ["loss", "logits"]), namedtuple("Unnamed", ["total", "logits"])


@dataclass
class Output(ModelOutput):
    loss: Any = None
    logits: Any = None
    hidden_states: Any = None


@dataclass(frozen=True)
class Frozen:
    loss: Tensor
    features: Tensor


@dataclass(frozen=True, slots=True)
class Slots:
    loss: Tensor
    features: Tensor


class ReadOnly:
    def __init__(self, loss: Tensor, features: Tensor) -> None:
        self._losses, self.features = [loss], features

    @property
    def loss(self) -> Tensor:
        return self._losses[0]


class Cached:
    def __init__(self, loss: Tensor, features: Tensor) -> None:
        self._half, self.features = loss / 2, features

    @cached_property
    def loss(self) -> Tensor:
        return self._half * 2


class Settable(ReadOnly):
    """Computes its loss, or has been given one."""

    @property
    def loss(self) -> Tensor:
        given: Tensor | None = vars(self).get("given")
        return self._losses[0] * 1.0 if given is None else given

    @loss.setter
    def loss(self, value: Tensor) -> None:
        self.given = value


class Computed(ReadOnly):
    """Computes its loss anew for everyone who asks."""

    @property
    def loss(self) -> Tensor:
        return self._losses[0] * 1.0


def by_key(output: Any) -> Tensor:
    loss: Tensor = output["loss"]
    return loss


def by_attribute(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def first(output: Any) -> Tensor:
    loss: Tensor = output[0]
    return loss


SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda loss, _: loss, lambda output: output),
    "one element": (lambda loss, _: loss.reshape(1), lambda output: output),
    "dict": (lambda loss, h: {"loss": loss, "n": 3, "features": h}, by_key),
    "read-only mapping": (lambda loss, h: MappingProxyType({"loss": loss, "features": h}), by_key),
    "object": (lambda loss, h: SimpleNamespace(loss=loss, features=h), by_attribute),
    "named tuple": (Named, by_attribute),
    "named tuple without the name": (Unnamed, first),
    "tuple": (lambda loss, h: (loss, h, 1), first),
    "list": (lambda loss, h: [loss, (h, h)], first),
    "model output": (lambda loss, h: Output(loss, h, (h, h)), by_attribute),
    "model output by place": (lambda loss, h: Output(loss, h, (h, h)), first),
    "frozen dataclass": (Frozen, by_attribute),
    "frozen slots": (Slots, by_attribute),
    "read-only property": (ReadOnly, by_attribute),
    "cached property": (Cached, by_attribute),
    "property with a setter": (Settable, by_attribute),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_of_a_loss(name: str) -> None:
    shape, loss_of = SHAPES[name]
    module, _ = shaped(shape)
    output = module(X)
    loss = loss_of(output)
    assert loss.item() == 14.0
    loss.backward()
    grad = 2 * X.square()
    expected = 2 * X.square() * (1 + 0.1 * grad / grad.norm())
    torch.testing.assert_close(module.weight.grad, expected)
    assert type(output) is type(shape(torch.zeros(()), torch.zeros(3)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda loss, h: (1, loss), "tuple with no loss"),
        (lambda loss, h: (), "tuple with no loss"),
        (lambda loss, h: (h, loss), r"a loss of shape \(3,\)"),
        (lambda loss, h: {"logits": loss}, "dict with no loss"),
        (lambda loss, h: None, "NoneType with no loss"),
        (lambda loss, h: {"loss": loss.expand(2)}, r"a loss of shape \(2,\)"),
        (lambda loss, h: loss.detach(), "requires no gradient"),
        (Computed, r'the Computed that Shaped returned; attach to a module around it .* returns \{"loss": loss\}'),
    ],
)
def test_a_module_without_a_loss_is_refused(wrong: Callable[[Tensor, Tensor], Any], message: str) -> None:
    module, optimizer = shaped(wrong)
    with pytest.raises((TypeError, RuntimeError), match=message):
        module(torch.ones(3))
    assert not optimizer.perturbed
    assert torch.equal(module.weight, torch.ones(3))


def test_a_loss_has_one_successor_wherever_the_output_holds_it() -> None:
    module, _ = shaped(lambda loss, h: {"loss": loss, "all": {"total": loss, "parts": [loss, loss.detach()]}})
    output = module(X)
    assert output["all"]["total"] is output["loss"]
    assert output["all"]["parts"][0] is output["loss"]
    output["all"]["total"].backward()
    assert module.weight.grad is not None


def test_an_output_that_holds_itself_and_its_module() -> None:
    def shape(loss: Tensor, features: Tensor) -> Any:
        output = SimpleNamespace(loss=loss, features=features, module=module, optimizer=optimizer)
        output.itself = output
        return output

    module, optimizer = shaped(shape)
    weight = module.weight
    output = module(X)
    assert output.itself is output
    assert module.weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight
    output.loss.backward()


# --- outputs beside the loss

OTHERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "mapping": (lambda loss, h: {"loss": loss, "features": h}, lambda output: output["features"].sum()),
    "tuple": (lambda loss, h: (loss, (h, [h])), lambda output: output[1][1][0].sum()),
    "named tuple": (Named, lambda output: output.logits.sum()),
    "model output": (lambda loss, h: Output(loss, h, (h, h.exp())), lambda output: output.hidden_states[1].sum()),
    "model output by key": (lambda loss, h: Output(loss, h, (h,)), lambda output: output["logits"].sum()),
    "model output by place": (lambda loss, h: Output(loss, h, (h,)), lambda output: output[1].sum()),
    "frozen slots": (Slots, lambda output: output.features.sum()),
    "read-only mapping": (lambda loss, h: MappingProxyType({"loss": loss, "h": h}), lambda output: output["h"].sum()),
    "distribution": (lambda loss, h: {"loss": loss, "d": Categorical(logits=h)}, lambda out: out["d"].entropy()),
    "part of the loss": (lambda loss, h: {"loss": loss + h.sum(), "regression": loss}, lambda out: out["regression"]),
}


@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_made_of_other_outputs_is_an_error(name: str, with_loss: bool) -> None:
    """As in distillation: the ascent has followed the inner loss alone."""
    shape, outside = OTHERS[name]
    module, optimizer = shaped(shape)
    output = module(X)
    loss = outside(output)
    if with_loss:
        loss = loss + (output["loss"] if hasattr(output, "keys") else getattr(output, "loss", None) or output[0])
    with pytest.raises(RuntimeError, match=r"another output of an attached module .* compute the whole loss inside"):
        loss.backward()
    assert not optimizer.perturbed
    assert torch.equal(module.weight, torch.ones(3))
    assert module.weight.grad is None


def attached() -> tuple[LossModule, AMP]:
    module = LossModule(small_net(), F.cross_entropy)
    optimizer = AMP(module.parameters(), lr=0.1, epsilon=0.1, inner_lr=0.5)
    attach(optimizer, module)
    return module, optimizer


def test_a_step_goes_on_after_the_error() -> None:
    (module, optimizer), (other, twin) = attached(), attached()
    before, batch = parameters_of(module), small_batches(1)[0]
    output = module(*batch)
    with pytest.raises(RuntimeError, match="another output of an attached module"):
        (output["loss"] + output["output"].square().mean()).backward()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert all(p.grad is None for p in module.parameters())
    with pytest.raises(RuntimeError, match="would train without the perturbation"):
        optimizer.step()
    output["loss"].backward()
    other(*batch)["loss"].backward()
    optimizer.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))


def test_other_outputs_have_the_values_of_the_perturbed_pass_and_may_be_read_and_written() -> None:
    seen: list[Tensor] = []
    (module, _), (other, _) = attached(), attached()
    module.model.register_forward_hook(lambda m, args, output: seen.append(output.detach().clone()))
    batch = small_batches(1)[0]
    output, expected = module(*batch), other(*batch)
    assert torch.equal(output["output"], seen[-1])
    assert not torch.equal(seen[-1], seen[0])
    metric = F.softmax(output["output"], dim=-1).max()  # a graph that nobody differentiates
    output["output"].mul_(2.0).masked_fill_(output["output"] > 0, 0.0)  # as generation does; the loss has its own
    output["loss"].backward()
    expected["loss"].backward()
    assert metric.requires_grad
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("how", ["retain_grad", "register_hook"])
def test_a_gradient_that_another_output_would_wait_for_is_an_error(how: str) -> None:
    module, optimizer = attached()
    output = module(*small_batches(1)[0])
    output["output"].retain_grad() if how == "retain_grad" else output["output"].register_hook(lambda grad: None)
    with pytest.raises(RuntimeError, match=r"call register_hook\(\) and retain_grad\(\) there"):
        output["loss"].backward()
    assert not optimizer.perturbed


class Outer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def test_a_wrapper_may_hook_all_outputs() -> None:
    """As `fully_shard` does around the attached module."""
    calls: list[Tensor | None] = []

    def hook(_: nn.Module, args: Any, output: dict[str, Tensor]) -> None:
        for tensor in output.values():
            tensor.register_hook(calls.append)

    module = Outer(attached()[0])
    module.register_forward_hook(hook)
    output = module(*small_batches(1)[0])
    output["loss"].backward()
    assert sum(grad is not None for grad in calls) == 1
    assert all(p.grad is not None for p in module.parameters())


def test_an_input_that_is_returned_stays_the_loops_own() -> None:
    """Its graph ends outside the module, so a loss of it is the same at theta and at theta + delta."""

    class Passes(Shaped):
        def forward(self, x: Tensor) -> Any:
            return {**super().forward(x), "x": x}

    module = Passes(lambda loss, h: {"loss": loss})
    attach(AMP(module.parameters(), lr=0.1, epsilon=0.1), module)
    leaf = torch.ones(3, requires_grad=True)
    output = module(leaf * 2)
    output["x"].sum().backward(retain_graph=True)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))
    output["loss"].backward()


def test_the_memory_of_a_pass_is_free_before_the_next_one_begins() -> None:
    """As in a loop that knows one pass only: modules that are recorded with CUDA graphs rely on it."""
    held: list[StorageWeakRef] = []
    alive: list[int] = []

    class Watched(Shaped):
        def forward(self, x: Tensor) -> Any:
            alive.append(sum(not storage.expired() for storage in held))
            output: dict[str, Tensor] = super().forward(x)
            held.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in output.values())
            return output

    module = Watched(lambda loss, h: {"loss": loss, "features": h})
    attachment = attach(AMP(module.parameters(), lr=0.1, epsilon=0.1, inner_iter=3), module)
    for _ in range(2):
        module(X)["loss"].backward()
    assert alive == [0] * 8
    assert attachment.amp_loss is not None


@pytest.mark.parametrize("how", ["in eval mode", "its forward()", "its parts", "not at all"])
def test_a_step_without_a_call_of_the_attached_module_tells_how_to_call_it(how: str) -> None:
    module = LossModule(nn.Linear(3, 2), nn.MSELoss())
    optimizer = AMP(module.parameters(), lr=0.1)
    attach(optimizer, module)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    if how == "in eval mode":
        module.eval()(x, y)["loss"].backward()
    elif how == "its forward()":
        module.forward(x, y)["loss"].backward()
    elif how == "its parts":
        module.criterion(module.model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"call that module itself .* in training mode, module\.train\(\)"):
        optimizer.step()
