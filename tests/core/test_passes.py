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
        with ExtraPasses(model).perturbed():
            model(x)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_a_module_may_change_its_type_between_additional_passes() -> None:
    model, (x, _) = small_net(), small_batches(1)[0]
    passes = ExtraPasses(model)
    with passes.perturbed():
        model(x)
    model.double()
    model[1].running_mean.fill_(1 / 3)
    before = copy.deepcopy(dict(model.named_buffers()))
    with passes.perturbed():
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


class Custom(nn.Module):
    """Statistics that no name or type gives away, in a layer that no optimizer trains, inside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.batch_norm = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False, momentum=None)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch_norm(self.fc(x))
        self.seen += 1
        torch.maximum(self.largest, y.detach().amax(0), out=self.largest)
        return y.pow(4).mean()


def test_statistics_of_every_kind_go_on_after_additional_passes() -> None:
    """Nothing is switched off, so nothing can stay so."""
    torch.manual_seed(0)
    module, batches = Custom(), [torch.randn(8, 4) for _ in range(3)]
    modes = [m.training for m in module.modules()]
    twin = copy.deepcopy(module)
    optimizer, passes = AMP(module.parameters(), 0.0, inner_iter=2), ExtraPasses(module)
    for x in batches:

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = module(x)
            loss.backward()
            return loss

        optimizer.step(closure, passes=passes)
        twin(x)
        assert all(torch.equal(b, c) for b, c in zip(module.buffers(), twin.buffers(), strict=True))
        assert module.batch_norm.momentum is None
        assert [m.training for m in module.modules()] == modes
        assert all(p.requires_grad for p in module.parameters())
    assert module.seen == module.batch_norm.num_batches_tracked == 3
