from __future__ import annotations

import copy

import pytest
import torch
from problems import assert_same_parameters, closure_for, small_batches, small_net, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amp_plugin import AMP, ExtraPasses, attach


def test_extra_passes_keep_dropout_masks_and_running_statistics() -> None:
    """With a vanishing ball the step must equal SGD with the same dropout masks, and one BatchNorm update."""
    a, b, batches = small_net(dropout=0.5), small_net(dropout=0.5), small_batches(3)
    amp, sgd = AMP(a.parameters(), 0.1, epsilon=1e-30), torch.optim.SGD(b.parameters(), 0.1)
    passes = ExtraPasses(a)
    torch.manual_seed(3)
    for batch in batches:
        amp.step(closure_for(amp, a, batch), passes=passes)
    torch.manual_seed(3)
    train(sgd, b, batches)
    assert_same_parameters(a, b)
    for p, q in zip(a.buffers(), b.buffers(), strict=True):
        assert torch.equal(p, q)


def test_running_statistics_are_the_clean_ones_when_an_additional_pass_fails() -> None:
    model, (x, _) = small_net(), small_batches(1)[0]
    before = copy.deepcopy(dict(model.named_buffers()))

    def fail() -> None:
        with ExtraPasses(model).extra():
            model(x)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_a_module_may_change_its_type_between_additional_passes() -> None:
    model, (x, _) = small_net(), small_batches(1)[0]
    passes = ExtraPasses(model)
    with passes.extra():
        model(x)
    model.double()
    model[1].running_mean.fill_(1 / 3)
    before = copy.deepcopy(dict(model.named_buffers()))
    with passes.extra():
        model(x.double())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


class Rebinds(nn.Module):
    """Makes a new tensor of its statistics in every pass instead of changing the old one; optionally checkpointed."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.recompute = nn.Linear(4, 4), recompute
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + self.fc(x).detach().mean() * 0.1
        self.passes = self.passes + 1
        y = checkpoint(self.scaled, x, use_reentrant=False) if self.recompute else self.scaled(x)
        return y.square().mean()

    def scaled(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x) * (1 + self.mean))


@pytest.mark.parametrize("door", ["closure", "attach"])
@pytest.mark.parametrize("inner_iter", [1, 2])
def test_statistics_that_a_layer_replaces_are_kept_as_well(door: str, inner_iter: int) -> None:
    module, x = Rebinds(), torch.ones(2, 4)
    optimizer = AMP(module.parameters(), 0.1, inner_iter=inner_iter)
    expected = module.fc(x).mean().item() * 0.1

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module(x)
        loss.backward()
        return loss

    if door == "attach":
        attach(optimizer, module)
        closure()
        optimizer.step()
    else:
        optimizer.step(closure, passes=ExtraPasses(module))
    assert module.passes.item() == 1
    assert module.mean.item() == pytest.approx(expected)


def test_replaced_statistics_are_found_again_by_a_layer_that_is_recomputed() -> None:
    grads, x = [], torch.ones(2, 4)
    for recompute in (False, True):
        module = Rebinds(recompute=recompute)
        attach(AMP(module.parameters(), 0.1), module)
        module(x).backward()
        assert module.passes.item() == 1
        grads.append(module.fc.weight.grad)
    assert torch.equal(*grads)
