"""What an attached module costs beyond its passes, and that nothing in a step hangs on the values of tensors.

So a step can be captured as a CUDA graph, but for the one host read in `AMP.step()`: whether the ascent was finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from benchmarks.counting import CountCalls, storages
from doors import DOORS, Door
from problems import SGD_ARGS, small_batches, small_net
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from amp_plugin import AMP, LossModule, Perturbation, attach
from amp_plugin.core import move
from amp_plugin.core.bucket import Ascent

SGD: dict[str, Any] = {**SGD_ARGS, "foreach": True}


def problem(width: int = 8) -> tuple[LossModule, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = timm.create_model("preactresnet18", width=width, num_classes=10)
    return LossModule(model, F.cross_entropy), (torch.randn(2, 3, 32, 32), torch.randint(10, (2,)))


def counted(*actions: Callable[[], Any]) -> CountCalls:
    with CountCalls() as count:
        for action in actions:
            action()
    return count


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("inner_iter", [1, 3])
def test_kernels_beyond_the_passes_and_the_base_optimizer(
    norm: Any, inner_iter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies and scalars: 56 operators for one ascent, 32 for each further one.

    CUDA launches two more for the norms in an ascent, and one for each large tensor with a ball of its own.
    """
    monkeypatch.setattr(move, "_WRITES_OUT", ("cpu",))
    module, batch = problem()
    sgd = torch.optim.SGD(module.parameters(), **SGD)
    for _ in range(2):  # the first step makes the buffers
        one_pass, descent = counted(lambda: module(*batch)["loss"].backward()), counted(sgd.step)
        sgd.zero_grad()
    optimizer = AMP(module.parameters(), norm=norm, inner_iter=inner_iter, **SGD)
    attach(optimizer, module)
    for _ in range(2):
        step = counted(lambda: module(*batch)["loss"].backward(), optimizer.step)
        optimizer.zero_grad()
    kernels = step.kernels - descent.kernels - one_pass.kernels * (inner_iter + 1)
    launches = step.launches - descent.launches - one_pass.launches * (inner_iter + 1)
    large = sum(p.numel() > 4096 for p in module.parameters()) if norm == "tensor" else 0
    assert one_pass.launches > 100
    assert 0 < kernels <= 56 + 32 * (inner_iter - 1), step.calls
    assert kernels <= launches <= 56 + 32 * (inner_iter - 1) + (2 + large) * inner_iter, step.calls
    assert step.syncs == one_pass.syncs == {}


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that were made under it and are still held by anyone."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                storage = tensor.untyped_storage()
                self._made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def now(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())


def live_bytes(module: LossModule, optimizer: torch.optim.Optimizer, batch: Any) -> dict[str, list[int]]:
    """What is held after the forward pass, after the backward pass and after the step, of eight steps."""
    held: dict[str, list[int]] = {"forward": [], "backward": [], "step": []}
    with LiveMemory() as live:
        for _ in range(8):
            loss = module(*batch)["loss"]
            held["forward"].append(live.now())
            loss.backward()
            held["backward"].append(live.now())
            optimizer.step()
            optimizer.zero_grad()
            held["step"].append(live.now())  # the loop still holds its loss
            del loss
    return {name: sizes[2:] for name, sizes in held.items()}


def test_memory_is_one_copy_of_the_weights_and_another_one_between_forward_and_backward() -> None:
    module, batch = problem(width=16)
    weights = sum(p.nbytes for p in module.parameters())
    others = 3 * sum(b.nbytes for b in module.buffers()) + 10_000  # copies of the running statistics, statistics
    assert others < 0.1 * weights
    plain = live_bytes(module, torch.optim.SGD(module.parameters(), **SGD), batch)
    optimizer = AMP(module.parameters(), **SGD)
    attach(optimizer, module)
    held = live_bytes(module, optimizer, batch)
    for name, copies in {"forward": 2, "backward": 1, "step": 1}.items():
        extra = {a - b for a, b in zip(held[name], plain[name], strict=True)}
        assert len(extra) == 1, f"the memory held after the {name} grows or shrinks from step to step: {held[name]}"
        assert copies * weights <= extra.pop() <= copies * weights + others, name


@pytest.mark.parametrize("door", DOORS)
def test_weights_and_statistics_keep_their_storage_in_every_door(door: Door) -> None:
    model = small_net()
    step = door(LossModule(model, F.cross_entropy), AMP(model.parameters(), 0.1, inner_iter=2))

    def addresses() -> list[int]:
        return [t.data_ptr() for t in (*model.parameters(), *model.buffers())]

    before, seen = addresses(), []
    model[0].register_forward_pre_hook(lambda *_: seen.append(addresses()))
    model[0].weight.register_hook(lambda _: seen.append(addresses()))
    for batch in small_batches(10):
        step(batch)
        seen.append(addresses())
    assert len(seen) == 10 * (3 + 3 + 1)
    assert all(s == before for s in seen)


# --- under FakeTensorMode there are no values: whatever asks for one raises DataDependentOutputException


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_the_ball_moves_without_looking_at_a_value(norm: Any) -> None:
    ball = Perturbation(norm)
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
        for _ in range(2):
            ball.ascend([Ascent(p, torch.randn(p.shape), 1.0, 0.5) for p in params], grad_scale=torch.ones(()))
        displacement = ball.suspend()
        ball.resume(displacement)
        ball.restore()
        ball.statistics()
        with pytest.raises(DataDependentOutputException):
            ball.was_finite()


def test_a_step_of_an_attached_module_looks_only_at_whether_the_ascent_was_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeTensorMode():
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(216, 4)]
        module = LossModule(nn.Sequential(*layers), F.cross_entropy)
        optimizer = AMP(module.parameters(), **SGD, inner_iter=2)
        attach(optimizer, module)
        x, y = torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
        module(x, y)["loss"].backward()
        with pytest.raises(DataDependentOutputException):
            optimizer.step()
        monkeypatch.setattr("amp_plugin.core.async_scalar.AsyncScalar.value", lambda flag: True)
        for _ in range(3):
            optimizer.zero_grad()
            module(x, y)["loss"].backward()
            optimizer.step()
