from __future__ import annotations

import copy

import pytest
import torch
from problems import assert_same_parameters, closure_for, small_batches, small_net, train

from amp_plugin import AMP, ExtraPasses


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
