from __future__ import annotations

import math

import pytest
import torch
from problems import closure_for, parameters_of, small_batches, small_net
from torch.nn import functional as F

from amp_plugin import AMP


@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_in_the_descent_alone_lets_the_scaler_skip_with_clean_weights(unscale: bool) -> None:
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer, scaler = AMP(model.parameters(), 0.1, momentum=0.9), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = parameters_of(model)
    for bad in (math.inf, 1.0):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        optimizer.ascend(grad_scale=scaler.get_scale())
        (scaler.scale(F.cross_entropy(model(x), y)) * bad).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert not optimizer.perturbed
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) == (bad == math.inf)
        scaler.update()
        assert scaler.get_scale() == 512.0
        optimizer.zero_grad()


@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_gives_the_weights_of_plain_training(unscale: bool) -> None:
    a, b, batches = small_net(), small_net(), small_batches(3)
    plain, scaled = (AMP(m.parameters(), 0.1, momentum=0.9) for m in (a, b))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches:
        plain.step(closure_for(plain, a, (x, y)))
        scaler.scale(F.cross_entropy(b(x), y)).backward()
        scaled.ascend(grad_scale=scaler.get_scale())
        scaler.scale(F.cross_entropy(b(x), y)).backward()
        if unscale:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_gradient_scaler_with_a_closure_is_refused() -> None:
    """accelerate's AcceleratedOptimizer passes the closure so, past the scaler's own check."""
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer, scaler = AMP(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    before = parameters_of(model)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match=r"gradient scaler cannot drive step\(closure\)"):
        scaler.step(optimizer, closure_for(optimizer, model, (x, y)))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
