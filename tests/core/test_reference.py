"""The reference against closed forms on 0.5 ||A x - b||^2, of gradient A^T (A x - b), and against SGD."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import Step, amp_trajectory, l2
from torch import Tensor, nn
from torch.nn import functional as F

LR = 0.01


class TwoVectors(nn.Module):
    """`A x` for an x in two pieces: two tensors that share one quadratic loss. Two more get no gradient."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.head = nn.Parameter(x[:2].clone())
        self.tail = nn.Parameter(x[2:].clone())
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix @ torch.cat([self.head, self.tail]) * self.frozen.mean()


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum()


class Quadratic:
    """A random quadratic in five unknowns, `head` (2) and `tail` (3), with its gradient and Hessian."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix, self.target, self.start = (
            torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((4, 5), (4,), (5,))
        )
        self.model = TwoVectors(self.start)
        self.hessian = self.matrix.T @ self.matrix
        self.grad = self.matrix.T @ (self.matrix @ self.start - self.target)

    def loss(self, x: Tensor) -> float:
        return half_square(self.matrix @ x, self.target).item()

    def step(self, **options: Any) -> Step:
        batch = (self.matrix, self.target)
        return amp_trajectory(self.model, half_square, [batch], lr=LR, **options)[0]

    @staticmethod
    def vector(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors["head"], tensors["tail"]])


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.fixture
def quadratic() -> Quadratic:
    return Quadratic()


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_one_ascent_inside_the_ball(quadratic: Quadratic, norm: str) -> None:
    step = quadratic.step(epsilon=1e6, inner_lr=0.05, norm=norm)
    delta = 0.05 * quadratic.grad
    assert_close(quadratic.vector(step.delta), delta)
    # The gradient at x + delta is grad + H delta, and delta is gone again after the step.
    expected = quadratic.start - LR * (quadratic.grad + quadratic.hessian @ delta)
    assert_close(quadratic.vector(step.params), expected)
    assert step.loss == pytest.approx(quadratic.loss(quadratic.start), rel=1e-12)
    assert step.amp_loss == pytest.approx(quadratic.loss(quadratic.start + delta), rel=1e-12)
    assert step.amp_loss > step.loss


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_three_ascents_inside_the_ball(quadratic: Quadratic, norm: str) -> None:
    # delta' = delta + inner_lr (grad + H delta) is a geometric series in I + inner_lr H.
    step = quadratic.step(epsilon=1e6, inner_lr=0.05, inner_iter=3, norm=norm)
    growth = torch.eye(5, dtype=torch.float64) + 0.05 * quadratic.hessian
    delta = (torch.eye(5, dtype=torch.float64) + growth + growth @ growth) @ (0.05 * quadratic.grad)
    assert_close(quadratic.vector(step.delta), delta)
    assert step.loss == pytest.approx(quadratic.loss(quadratic.start), rel=1e-12)
    assert step.amp_loss == pytest.approx(quadratic.loss(quadratic.start + delta), rel=1e-12)
    assert_close(quadratic.vector(step.params), quadratic.start - LR * (quadratic.grad + quadratic.hessian @ delta))


def test_one_ascent_out_of_the_global_ball(quadratic: Quadratic) -> None:
    step = quadratic.step(epsilon=0.3, inner_lr=1.0, norm="global")
    assert quadratic.grad.norm() > 0.3
    assert_close(quadratic.vector(step.delta), 0.3 * unit(quadratic.grad))
    assert l2(step.delta.values()) == pytest.approx(0.3)


def test_one_ascent_out_of_each_tensors_ball(quadratic: Quadratic) -> None:
    step = quadratic.step(epsilon=0.3, inner_lr=1.0, norm="tensor")
    head, tail = quadratic.grad[:2], quadratic.grad[2:]
    assert min(head.norm(), tail.norm()) > 0.3
    assert_close(quadratic.vector(step.delta), 0.3 * torch.cat([unit(head), unit(tail)]))
    assert step.delta_norms == pytest.approx({"head": 0.3, "tail": 0.3, "unused": 0.0})


def test_only_the_tensor_out_of_its_ball_is_clipped(quadratic: Quadratic) -> None:
    head, tail = quadratic.grad[:2], quadratic.grad[2:]
    small, large = sorted([head.norm().item(), tail.norm().item()])
    epsilon = (small + large) / 2
    step = quadratic.step(epsilon=epsilon, inner_lr=1.0, norm="tensor")
    assert_close(quadratic.vector(step.delta), torch.cat([g * min(1, epsilon / g.norm()) for g in (head, tail)]))
    assert sorted(step.delta_norms.values()) == pytest.approx([0.0, small, epsilon])


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_three_ascents_out_of_the_ball(quadratic: Quadratic, norm: str) -> None:
    # The recursion in vectors: each ascent starts from the projected delta, and the gradient is taken there.
    delta = torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        moved = delta + quadratic.grad + quadratic.hessian @ delta
        pieces = moved.split([2, 3]) if norm == "tensor" else [moved]
        assert all(piece.norm() > 0.3 for piece in pieces)
        delta = torch.cat([0.3 * unit(piece) for piece in pieces])
    step = quadratic.step(epsilon=0.3, inner_lr=1.0, inner_iter=3, norm=norm)
    assert_close(quadratic.vector(step.delta), delta)


def test_scalar_recursion_over_steps_with_momentum_and_decay() -> None:
    # L(x) = 0.5 x^2 inside the ball: g_amp = (1 + inner_lr) x, by hand in Python floats.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    batch = (torch.ones(1, 1), torch.zeros(1, 1))
    options = {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.25}
    steps = amp_trajectory(model, half_square, [batch] * 3, epsilon=9.0, inner_lr=0.2, **options)
    x, v = 2.0, 0.0
    for step in steps:
        g = 1.2 * x + 0.25 * x  # the decay acts at theta, not at theta + delta
        v = 0.5 * v + g
        x -= 0.1 * (g + 0.5 * v)
        assert step.params["weight"].item() == pytest.approx(x, rel=1e-12)
    assert model.weight.item() == 2.0
    assert model.weight.dtype == torch.float32


def test_stationary_point_stays_put() -> None:
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    (step,) = amp_trajectory(model, half_square, [(torch.ones(1, 3), torch.zeros(1, 1))], lr=0.1, epsilon=0.5)
    assert step.delta_norms == {"weight": 0.0}
    assert torch.equal(step.params["weight"], torch.zeros(1, 3, dtype=torch.float64))


def test_parameters_without_gradient_stay_out(quadratic: Quadratic) -> None:
    step = quadratic.step(epsilon=0.3, weight_decay=0.1)
    assert "frozen" not in step.params
    assert torch.equal(step.params["unused"], torch.ones(2, dtype=torch.float64))  # no decay either


def test_clipping_acts_on_the_descent_alone(quadratic: Quadratic) -> None:
    free, clipped = (quadratic.step(epsilon=0.3, clip_norm=clip) for clip in (None, 0.5))
    assert_close(quadratic.vector(clipped.delta), quadratic.vector(free.delta))
    descent = quadratic.start - quadratic.vector(free.params)
    assert descent.norm() > LR * 0.5
    torch.testing.assert_close(
        quadratic.start - quadratic.vector(clipped.params), LR * 0.5 * unit(descent), rtol=1e-5, atol=0
    )


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
    return nn.Sequential(*layers).double()


def image_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("inner_iter", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_without_a_ball_it_is_torch_sgd(
    momentum: float, nesterov: bool, clip_norm: float | None, inner_iter: int
) -> None:
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.01}
    model, batches = small_network(), image_batches(5)
    steps = amp_trajectory(
        model, F.cross_entropy, batches, epsilon=0.0, inner_iter=inner_iter, clip_norm=clip_norm, **options
    )
    optimizer = torch.optim.SGD(model.parameters(), **options)
    for step, (inputs, targets) in zip(steps, batches, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        if clip_norm is not None:
            assert nn.utils.clip_grad_norm_(model.parameters(), clip_norm) > clip_norm
        optimizer.step()
        assert step.loss == step.amp_loss == pytest.approx(loss.item(), rel=1e-12)
        for name, param in model.named_parameters():
            assert_close(step.params[name], param.detach())
        for name, buffer in model.named_buffers():
            assert_close(step.buffers[name], buffer)


def test_running_statistics_follow_the_policy() -> None:
    model, batches = small_network(), image_batches(1)
    options = {"lr": 0.1, "epsilon": 0.5, "inner_iter": 2}
    (clean,) = amp_trajectory(model, F.cross_entropy, batches, batch_norm="clean", **options)
    (every,) = amp_trajectory(model, F.cross_entropy, batches, batch_norm="all", **options)
    assert clean.buffers["1.num_batches_tracked"] == 1
    assert every.buffers["1.num_batches_tracked"] == 3
    untouched = copy.deepcopy(model)
    model(batches[0][0])  # one forward at theta
    assert_close(clean.buffers["1.running_mean"], model[1].running_mean)
    assert not torch.allclose(every.buffers["1.running_mean"], model[1].running_mean)
    assert untouched[1].num_batches_tracked == 0
    # In training mode the statistics have no say in the step.
    for name, param in clean.params.items():
        assert torch.equal(param, every.params[name])
