"""What a step, a failed `attach` and a replaced layer leave behind: nothing, through every door."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doors import DOORS, Door
from problems import small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMP, LossModule, attach, detach


def problem(**kwargs: Any) -> tuple[LossModule, AMP]:
    module = LossModule(small_net(), F.cross_entropy)
    return module, AMP(module.parameters(), **{"lr": 0.1, "epsilon": 0.1, "inner_lr": 0.5, **kwargs})


def plain_step(module: Callable[..., Any], optimizer: AMP) -> None:
    optimizer.zero_grad()
    module(*small_batches(1)[0])["loss"].backward()
    optimizer.step()


# --- attach and detach


class Proxy(nn.Module):
    """Passes attributes on to the module inside, both ways, but for its own, as Fabric's modules do."""

    def __init__(self, module: nn.Module, *, everything: bool) -> None:
        super().__init__()
        self._forward_module, self._everything = module, everything
        vars(self)["_ready"] = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_forward_module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_ready" not in vars(self) or (name in vars(self) and not self._everything):
            super().__setattr__(name, value)
        else:
            setattr(self._forward_module, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward_module(*args, **kwargs)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("attach_to", ["the proxy", "the module inside"])
def test_a_proxy_that_passes_attributes_on(attach_to: str, everything: bool) -> None:
    (module, optimizer), (twin, plain) = problem(), problem()
    proxy = Proxy(module, everything=everything)
    target: nn.Module = proxy if attach_to == "the proxy" else module
    attach(optimizer, target)
    attach(plain, twin)
    for _ in range(2):
        plain_step(proxy, optimizer)
        plain_step(twin, plain)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
    detach(target)
    assert_free(module, optimizer)
    assert_free(proxy, optimizer)
    with pytest.raises(RuntimeError, match="would train without the perturbation"):
        plain_step(proxy, optimizer)


def assert_free(module: nn.Module, optimizer: AMP) -> None:
    assert not optimizer.attached
    assert not module._forward_hooks
    assert not module._forward_hooks_always_called
    assert not module._forward_pre_hooks
    assert module._compiled_call_impl is None


@pytest.mark.parametrize("fails", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_attach_leaves_module_and_optimizer_free(
    fails: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimizer = problem()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, fails, fail)
        with pytest.raises(error):
            attach(optimizer, module)
    assert_free(module, optimizer)
    attach(optimizer, module)
    plain_step(module, optimizer)


def test_a_failed_detach_leaves_module_and_optimizer_free(monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = problem()
    attachment = attach(optimizer, module)

    class Broken:
        def remove(self) -> None:
            raise ArithmeticError

    attachment.handles.insert(1, Broken())  # type: ignore[arg-type]
    with pytest.raises(ArithmeticError):
        detach(module)
    assert_free(module, optimizer)


def test_a_module_that_was_compiled_is_so_after_detach() -> None:
    module, optimizer = problem()
    module.compile(backend="eager")
    compiled = module._compiled_call_impl
    attach(optimizer, module)
    detach(module)
    assert module._compiled_call_impl is compiled


# --- replaced layers


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("parameters", [None, "weight", "norm"])
@pytest.mark.parametrize("door", DOORS)
def test_a_layer_that_was_replaced_is_let_go(door: Door, parameters: str | None, steps: int) -> None:
    """What the ball holds at once, and what is replayed with the next step."""
    module = LossModule(small_net(), F.cross_entropy)
    optimizer = AMP(module.named_parameters(), lr=0.1, epsilon=0.1, inner_iter=2, parameters=parameters)
    step, batches = door(module, optimizer), small_batches(steps + 1)
    for batch in batches[:steps]:
        step(batch)
    old = module.model[:2]
    trained = [weakref.ref(p) for p in old.parameters()]
    others = [weakref.ref(t) for t in (*old, *old.buffers())]
    for i in range(2):
        module.model[i] = copy.deepcopy(old[i])
    optimizer.param_groups[0]["params"] = list(module.parameters())
    optimizer.zero_grad()
    optimizer.state.clear()
    del old
    gc.collect()
    assert [ref() for ref in trained] == [None] * 4
    optimizer.name_parameters(module)
    for batch in batches[steps:]:
        step(batch)
    gc.collect()
    assert [ref() for ref in others] == [None] * len(others)
    assert len(optimizer.perturbation._backups) == len(list(optimizer.selection.within(optimizer.param_groups)))


def test_an_attached_module_perturbs_the_layer_that_replaced_a_chosen_one() -> None:
    module, optimizer = problem(parameters="weight")
    attach(optimizer, module)
    plain_step(module, optimizer)
    module.model[0] = copy.deepcopy(module.model[0])
    optimizer.param_groups[0]["params"] = list(module.parameters())
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda *_: seen.append(module.model[0].weight.detach().clone()))
    plain_step(module, optimizer)
    assert not torch.equal(seen[0], seen[1])


class Remembers(nn.Module):
    """Adds what it has seen to what it sees, without a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.memory = 0.5 * self.memory + x.detach().mean()
        return x + self.memory


@pytest.mark.parametrize("door", DOORS)
def test_the_state_of_a_new_layer_is_replayed(door: Door) -> None:
    """Attributes are looked at anew: the memory moves once a step, as in a step of the base optimizer."""
    module, optimizer = problem(inner_iter=2)
    module.model = nn.Sequential(nn.Identity(), module.model)
    step, (first, second, third) = door(module, optimizer), small_batches(3)
    step(first)
    module.model[0] = Remembers()
    step(second)
    step(third)
    expected = 0.5 * second[0].mean() + third[0].mean()
    torch.testing.assert_close(module.model[0].memory, expected)


# --- gradients that the loop keeps


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("inner_iter", [1, 2])
def test_a_gradient_that_is_kept_is_never_written_to(door: Door, inner_iter: int) -> None:
    module, optimizer = problem(inner_iter=inner_iter)
    step, kept = door(module, optimizer), []

    def keep(p: Tensor) -> None:
        assert p.grad is not None
        kept.append((p.grad, p.grad.clone()))

    for p in module.parameters():
        p.register_post_accumulate_grad_hook(keep)
    for batch in small_batches(2):
        step(batch)
    assert len(kept) == 2 * (inner_iter + 1) * len(list(module.parameters()))
    assert all(torch.equal(grad, copy) for grad, copy in kept)


def test_no_gradient_is_copied_that_nobody_keeps() -> None:
    module, optimizer = problem()
    for _ in range(2):
        module(*small_batches(1)[0])["loss"].backward()
    places = {p.grad.data_ptr() for p in module.parameters() if p.grad is not None}
    seen = [a.grad.data_ptr() for a in optimizer.selection.ascents(optimizer.param_groups, None) if a.grad is not None]
    assert set(seen) == places
