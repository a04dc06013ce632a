"""Tests of the measures of flatness, each against a case that has a closed form."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from problems import small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin.flatness import (
    Objective,
    epsilon_sharpness,
    filter_normalised_direction,
    hessian_eigenvalues,
    hessian_trace,
    loss_landscape,
)

needs_eigenthings = pytest.mark.skipif(
    find_spec("hessian_eigenthings") is None,
    reason='needs hessian-eigenthings: pip install "amp-plugin[flatness]"',
)


class Quadratic(nn.Module):
    """0.5 * sum of curvature * theta**2 + slope * theta, over several tensors; the batch scales it."""

    def __init__(self, thetas: list[list[float]], curvatures: list[list[float]], slopes: list[list[float]]) -> None:
        super().__init__()
        make = lambda rows: [torch.tensor(row, dtype=torch.float64) for row in rows]  # noqa: E731
        self.thetas = nn.ParameterList(make(thetas))
        self.curvatures, self.slopes = make(curvatures), make(slopes)

    def forward(self, x: Tensor) -> Tensor:
        terms = zip(self.thetas, self.curvatures, self.slopes, strict=True)
        return x.mean() * sum(((0.5 * c * t + s) * t).sum() for t, c, s in terms)


ONES = [torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)]


def quadratic(thetas: Any, curvatures: Any, slopes: Any = None) -> Objective:
    return Objective(Quadratic(thetas, curvatures, slopes or [[0.0] * len(t) for t in thetas]), ONES)


def classifier(**options: Any) -> Objective:
    return Objective(small_net(dropout=0.5), small_batches(2), F.cross_entropy, **options)


def test_a_linear_loss_rises_by_epsilon_times_the_gradient_norm() -> None:
    objective = quadratic([[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0]] * 2, [[3.0, 4.0], [5.0, 12.0]])
    in_each = epsilon_sharpness(objective, 0.1, steps=5, step_length=0.5)
    assert in_each.loss == pytest.approx(3 + 8 + 15 + 48)
    assert in_each.sharpness == pytest.approx(0.1 * (5 + 13))
    together = epsilon_sharpness(objective, 0.1, norm="global", steps=5, step_length=0.5)
    assert together.sharpness == pytest.approx(0.1 * math.hypot(5, 13))


def test_in_an_isotropic_bowl_the_worst_point_lies_straight_uphill() -> None:
    radius, epsilon = 5.0, 0.5
    found = epsilon_sharpness(quadratic([[3.0, 4.0]], [[2.0, 2.0]]), epsilon)
    assert found.worst_loss == pytest.approx((radius + epsilon) ** 2)


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_at_the_bottom_of_a_bowl_the_worst_point_lies_along_the_steepest_axis(norm: Any) -> None:
    objective = quadratic([[0.0, 0.0, 0.0], [0.0]], [[1.0, 9.0, 3.0], [2.0]])
    found = epsilon_sharpness(objective, 0.5, norm=norm, steps=100)
    assert found.loss == 0
    steepest = 9 + 2 if norm == "tensor" else 9
    assert found.sharpness == pytest.approx(0.5 * steepest * 0.5**2, rel=1e-6)


def test_the_steps_climb_by_their_length_until_the_ball_holds_them_back() -> None:
    found = epsilon_sharpness(quadratic([[0.0]], [[0.0]], [[1.0]]), 2.0, steps=6, step_length=0.25)
    np.testing.assert_allclose(found.losses, [0, 0.5, 1, 1.5, 2, 2, 2])


def test_steps_that_overshoot_never_tell_less_than_no_rise() -> None:
    """The loss is a hill with its top at 1, and the first step of 2.5 ends below its start."""
    found = epsilon_sharpness(quadratic([[0.0]], [[-1.0]], [[1.0]]), 10.0, steps=1)
    assert found.losses == pytest.approx((0, 2.5 - 0.5 * 2.5**2))
    assert found.sharpness == 0


@needs_eigenthings
def test_eigenvalues_and_trace_of_a_diagonal_hessian() -> None:
    objective = quadratic([[1.0, 1.0, 1.0], [1.0, 1.0]], [[4.0, -3.0, 0.5], [7.0, 1.0]])
    found = hessian_eigenvalues(objective, k=3, products=5)
    np.testing.assert_allclose(found.values, [7, 4, 1], rtol=1e-9)
    assert 6 * torch.finfo(torch.float64).eps <= max(found.residuals) < 1e-6
    assert found.products == 5
    trace = hessian_trace(objective, probes=3)  # random signs give the trace of a diagonal exactly
    assert trace.value == pytest.approx(9.5)
    assert trace.standard_error == pytest.approx(0, abs=1e-9)


@needs_eigenthings
def test_the_hessian_of_linear_regression() -> None:
    """The Hessian is 2/n X'X, whatever the weights and the targets and however unequal the batches."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(10, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    objective = Objective(model, list(zip(x.split(7), y.split(7), strict=True)), F.mse_loss)
    hessian = 2 / 10 * x.T @ x
    expected = torch.linalg.eigvalsh(hessian).flip(0)
    found = hessian_eigenvalues(objective, k=6, products=6)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    trace = hessian_trace(objective, probes=400)
    assert trace.value == pytest.approx(float(hessian.trace()), abs=4 * trace.standard_error)
    assert 0 < trace.standard_error < 0.1 * float(hessian.trace())
    assert objective.evaluate().loss == pytest.approx(F.mse_loss(model(x), y).item())


@needs_eigenthings
def test_eigenvalues_of_a_network_are_those_of_its_full_hessian() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,))

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in net.parameters()])
        weights = {n: f.view_as(p) for (n, p), f in zip(net.named_parameters(), pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, weights, (x,)), y)

    hessian = torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in net.parameters()]))
    found = hessian_eigenvalues(Objective(net, [(x[:5], y[:5]), (x[5:], y[5:])], F.cross_entropy), k=4, products=26)
    np.testing.assert_allclose(found.values, torch.linalg.eigvalsh(hessian).flip(0)[:4], rtol=1e-6)


def test_a_landscape_along_known_directions() -> None:
    objective = quadratic([[1.0, 2.0]], [[2.0, 4.0]])
    along = [torch.tensor([1.0, 0.0], dtype=torch.float64)], [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    line = loss_landscape(objective, along[:1], span=2.0, points=5)
    np.testing.assert_array_equal(line.steps, [-2, -1, 0, 1, 2])
    np.testing.assert_allclose(line.loss, (1 + line.steps) ** 2 + 8)
    assert line.error is None
    plane = loss_landscape(objective, along, span=0.5, points=3)
    a, b = np.meshgrid(plane.steps, plane.steps, indexing="ij")
    np.testing.assert_allclose(plane.loss, (1 + a) ** 2 + 2 * (2 + b) ** 2)


def test_a_direction_has_the_filter_norms_of_the_weights() -> None:
    net = small_net()
    parameters = list(net.parameters())
    direction = filter_normalised_direction(parameters, seed=1)
    for p, d in zip(parameters, direction, strict=True):
        assert d.shape == p.shape
        if p.ndim > 1:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
            assert not torch.equal(d, p)
        else:
            assert not d.any()
    matrices = [i for i, p in enumerate(parameters) if p.ndim > 1]
    other = filter_normalised_direction(parameters, seed=2)
    assert not any(torch.equal(direction[i], other[i]) for i in matrices)
    scaled = filter_normalised_direction(parameters, seed=1, vectors="scaled")
    for i, p in enumerate(parameters):
        assert torch.equal(scaled[i], direction[i] if i in matrices else p)


def measures(objective: Objective) -> list[Any]:
    line = loss_landscape(objective, [filter_normalised_direction(objective.parameters, seed=0)], points=3)
    found = [epsilon_sharpness(objective, 0.1, steps=3).losses, line.loss.tolist(), line.error.tolist()]
    return [*found, [h.tolist() for h in objective.hessian_product(objective.parameters)]]


@pytest.mark.parametrize("training", [False, True])
def test_measures_leave_no_trace_and_repeat_themselves(training: bool) -> None:
    objective = classifier(training=training)
    model = objective.model
    model[1].eval()  # this module has a mode of its own, as a frozen backbone has
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    assert measures(objective) == measures(objective)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_training_mode_has_dropout_and_the_batch_statistics() -> None:
    assert classifier().evaluate().loss != classifier(training=True).evaluate().loss


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_weights_come_back_when_a_measure_fails(error: type[BaseException], monkeypatch: Any) -> None:
    objective = classifier()
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    displaced = []

    def fail(scores: Tensor, targets: Tensor) -> Tensor:
        displaced.append(not torch.equal(objective.parameters[0], before["0.weight"]))
        if displaced[-1]:
            raise error
        return F.cross_entropy(scores, targets)

    objective.criterion = fail
    for measure in (
        lambda: epsilon_sharpness(objective, 0.1),
        lambda: loss_landscape(objective, [filter_normalised_direction(objective.parameters, seed=0)]),
    ):
        with pytest.raises(error):
            measure()
        assert displaced[-1]
        assert all(torch.equal(value, before[name]) for name, value in objective.model.state_dict().items())
        assert objective.model.training


def test_loss_and_error_of_a_classifier() -> None:
    batches = [*small_batches(1), *small_batches(1, size=3)]
    model = small_net().eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss, error = Objective(model, batches, F.cross_entropy).evaluate()
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item())
    assert error == pytest.approx(100 * float((model(x).argmax(1) != y).float().mean()))


def test_a_model_of_transformers_with_and_without_a_criterion() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = BertForSequenceClassification(config)
    batches = [{"input_ids": torch.arange(10).view(2, 5), "labels": torch.tensor([0, 2])}]
    own, given = Objective(model, batches), Objective(model, batches, F.cross_entropy)
    assert own.evaluate() == given.evaluate()
    assert own.evaluate().error is not None
    vector = [torch.ones_like(p) for p in own.parameters]
    product, same = own.hessian_product(vector), given.hessian_product(vector)
    assert any(p.any() for p in product)
    for one, other in zip(product, same, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(nn.ReLU(), ONES), "no parameter that requires a gradient"),
        (lambda: Objective(nn.Linear(1, 1), iter([])), "no batches"),
        (lambda: Objective(nn.Linear(1, 1), [{"x": torch.ones(1, 1)}], F.mse_loss).evaluate(), "no targets"),
        (lambda: epsilon_sharpness(classifier(), 0.0), "epsilon must be positive"),
        (lambda: epsilon_sharpness(quadratic([[1.0]], [[float("inf")]]), 0.1), "the loss is inf at the weights"),
        (lambda: loss_landscape(classifier(), [], points=3), "one direction or two"),
        (lambda: loss_landscape(classifier(), [[]], points=4), "points must be odd"),
        (lambda: filter_normalised_direction([], 0, vectors="all"), "vectors must be one of"),
        (lambda: hessian_trace(classifier(), probes=1), "probes must be at least 2"),
    ],
)
def test_a_mistake_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_without_a_loss_is_told_to_get_a_criterion() -> None:
    with pytest.raises(TypeError, match=r"Linear returned .* Give a criterion"):
        Objective(nn.Linear(1, 2), [torch.ones(3, 1)]).evaluate()


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hessian_eigenthings", None)
    with pytest.raises(ImportError, match=r'pip install "amp-plugin\[flatness\]"'):
        hessian_eigenvalues(classifier())
