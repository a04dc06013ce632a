"""What the guide for SAM's users promises: with a global ball and a large inner_lr, AMP is SAM."""

from __future__ import annotations

import copy

import torch
from problems import closure_for, small_batches, small_net
from torch.nn import functional as F

from amp_plugin import AMP


def test_a_large_inner_lr_and_a_global_ball_are_sam() -> None:
    rho, lr = 0.05, 0.1
    ours, theirs = small_net(torch.float64), small_net(torch.float64)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    optimizer = AMP(ours.parameters(), lr, epsilon=rho, inner_lr=1e6, norm="global")
    params = list(theirs.parameters())
    for x, y in small_batches(3, dtype=torch.float64):
        optimizer.step(closure_for(optimizer, ours, (x, y)))
        gradient = torch.autograd.grad(F.cross_entropy(theirs(x), y), params)
        length = torch.cat([g.flatten() for g in gradient]).norm()
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, gradient, strict=True):
                p += rho * g / length
        gradient = torch.autograd.grad(F.cross_entropy(theirs(x), y), params)
        with torch.no_grad():
            for p, old, g in zip(params, before, gradient, strict=True):
                p.copy_(old - lr * g)
        for p, q in zip(ours.parameters(), params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
