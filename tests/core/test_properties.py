"""What holds for every problem, through every door. The problems are the same in every run; slow ones have more."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from arbitrary import DOORS, Case, Failure, Problem, cases, failures, length, real, rounding, same_bits
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from amp_plugin import AMP

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*duplicate parameters"),
    pytest.mark.filterwarnings("ignore:AMP on 16-bit weights"),
    pytest.mark.filterwarnings("ignore:AMP. a pass left no gradient"),
]
PROFILE = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
DOOR = st.sampled_from(sorted(DOORS))
Body = Callable[..., None]


def holds(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Body], Body]:
    """A property, and a slow variant of it."""

    def decorate(body: Body) -> Body:
        @pytest.mark.parametrize("examples", [examples, pytest.param(25 * examples, marks=pytest.mark.slow)])
        def test(examples: int) -> None:
            settings(PROFILE, max_examples=examples)(given(**strategies)(body))()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


def made(case: Case, door: str, **kwargs: Any) -> tuple[Problem, Callable[[], None]]:
    """A problem that has made a step already, and its next one."""
    problem = Problem(case, **kwargs)
    assume(door == "closure" or problem.has_gradients())
    step = functools.partial(DOORS[door], problem)
    step()
    return problem, step


@holds(100, case=cases(), door=DOOR, failure=failures())
def test_the_weights_are_clean_whatever_fails(case: Case, door: str, failure: Failure) -> None:
    problem, step = made(case, door)
    before, state = problem.values(), copy.deepcopy(problem.optimizer.state_dict())
    problem.failure = failure
    assume(failure.in_pass <= problem.ascents)
    assume(failure.where == "forward" or problem.has_gradients())
    with pytest.raises(failure.error):
        step()
    assert not problem.optimizer.perturbed
    assert all(map(same_bits, problem.tensors, before))
    assert str(problem.optimizer.state_dict()) == str(state)
    for _ in range(2):
        problem.optimizer.restore()
        assert all(map(same_bits, problem.tensors, before))
    problem.failure = None
    step()


@holds(100, case=cases(), door=DOOR)
def test_weights_stay_where_they_are_and_the_state_is_the_base_optimizers(case: Case, door: str) -> None:
    problem = Problem(case)
    assume(door == "closure" or problem.has_gradients())
    places = [(p.data_ptr(), p.stride()) for p in problem.tensors]
    seen: list[tuple[int, tuple[int, ...]]] = []
    problem.on_pass = lambda: seen.extend((p.data_ptr(), p.stride()) for p in problem.tensors)
    for _ in range(2):
        DOORS[door](problem)
    assert [(p.data_ptr(), p.stride()) for p in problem.tensors] == places
    assert seen == places * (len(seen) // len(places))
    base = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    ours = problem.optimizer.state_dict()
    assert all(state.keys() <= {"momentum_buffer"} for state in ours["state"].values())
    assert all(g.keys() == base.param_groups[0].keys() | {"epsilon", "inner_lr"} for g in ours["param_groups"])


@holds(100, case=cases(), door=DOOR)
def test_without_a_learning_rate_no_bit_changes(case: Case, door: str) -> None:
    problem = Problem(case, lr=0.0, weight_decay=0.0)
    assume(door == "closure" or problem.has_gradients())
    before = problem.values()
    for _ in range(2):
        DOORS[door](problem)
        assert all(map(same_bits, problem.tensors, before))


@holds(100, case=cases(min_ascents=1))
def test_every_ascent_is_the_projected_step_computed_in_float64(case: Case) -> None:
    """From where the weights were, along the gradients that were there; and never further than epsilon."""
    problem = Problem(case)
    points: list[list[torch.Tensor]] = []
    grads: list[list[torch.Tensor | None]] = []

    def closure() -> torch.Tensor:
        problem.optimizer.zero_grad()
        points.append([real(p).double() for p in problem.values()])
        loss: torch.Tensor = problem()
        if loss.requires_grad:
            loss.backward()
        grads.append([None if p.grad is None else real(p.grad.clone()).double() for p in problem.tensors])
        return loss

    problem.optimizer.step(closure)
    groups = [g for group in case.groups for g in [group] * group.size]
    moved = [False] * len(groups)
    for k in range(problem.ascents):
        raw, radii, finest = {}, {}, 2.0**-53
        for i, (g, group) in enumerate(zip(grads[k], groups, strict=True)):
            if not (group.epsilon and group.inner_lr) or (g is None and not moved[i]):
                assert torch.equal(points[k + 1][i], points[0][i])
                continue
            moved[i], radii[i] = True, group.epsilon
            step = 0.0 if g is None else (-1 if group.maximize else 1) * group.inner_lr * g
            raw[i] = points[k][i] - points[0][i] + step
            if case.weights[i].dtype != torch.float64:
                finest = max(finest, 2.0**-24)  # norms of all others are taken in float32
            if case.norm == "global" and k > 0:
                finest = max(finest, rounding(case.weights[i].dtype))  # what is measured has been rounded before
        ratios = {i: length(d) / radii[i] for i, d in raw.items()}
        if case.norm == "global":
            ratios = dict.fromkeys(ratios, sum(r**2 for r in ratios.values()) ** 0.5)
        for i, d in raw.items():
            shrink = 1 / max(1.0, ratios[i])
            theta, after, expected = points[0][i], points[k + 1][i], d * shrink
            sizes = [theta, after, points[k][i], expected, shrink * d, shrink * points[k][i]]
            size = max((t.abs().max().item() for t in sizes if t.numel()), default=0.0)
            unit = rounding(case.weights[i].dtype)
            torch.testing.assert_close(after - theta, expected, rtol=0.0, atol=8 * max(unit, finest) * size)
            slack = unit * length(after) if length(theta) else 0.0  # theta + delta is rounded, delta alone is not
            assert length(after - theta) <= radii[i] * (1 + 8 * max(unit, finest)) + slack
        if case.norm == "global" and all(w.at_zero for w in case.weights):
            total = sum((length(points[k + 1][i]) / radii[i]) ** 2 for i in raw) ** 0.5
            assert total <= 1 + 8 * max(finest, *(rounding(w.dtype) for w in case.weights))


@holds(100, case=cases(perturbs=True), base=st.sampled_from(["SGD", "AdamW"]))
def test_all_doors_lead_to_the_same_bits(case: Case, base: str) -> None:
    problems = []
    for door in DOORS.values():
        kwargs = {} if base == "SGD" else {"base_optimizer": "AdamW", "momentum": None, "nesterov": None}
        problem = Problem(case, **kwargs)
        assume(problem.has_gradients())
        for _ in range(3):
            door(problem)
        problems.append(problem)
    for other in problems[1:]:
        assert all(map(same_bits, problems[0].tensors, other.tensors))
        for p, q in zip(problems[0].tensors, other.tensors, strict=True):
            mine, theirs = problems[0].optimizer.state[p], other.optimizer.state[q]
            assert mine.keys() == theirs.keys()
            assert all(same_bits(mine[k], theirs[k]) for k in mine if mine[k] is not None)
    statistics = [{k: v.item() for k, v in p.optimizer.statistics().items()} for p in problems]
    assert statistics[0] == statistics[1] == statistics[2]


@holds(100, case=cases(perturbs=False), door=DOOR)
def test_without_a_radius_it_is_the_base_optimizer_to_the_bit(case: Case, door: str) -> None:
    ours, theirs = Problem(case), Problem(case, base=torch.optim.SGD)
    assume(door == "closure" or ours.has_gradients())
    for _ in range(3):
        DOORS[door](ours)
        theirs.passes = 0
        theirs.optimizer.zero_grad()
        loss = theirs()
        if loss.requires_grad:
            loss.backward()
        theirs.optimizer.step()
        assert ours.passes == 1
    assert all(map(same_bits, ours.tensors, theirs.tensors))


@holds(100, case=cases(min_ascents=1), power=st.integers(-10, 16), as_tensor=st.booleans())
def test_a_power_of_two_as_gradient_scale_changes_no_bit(case: Case, power: int, as_tensor: bool) -> None:
    scale = 2.0**power
    problems = Problem(case), Problem(case)
    for problem, s in zip(problems, (1.0, scale), strict=True):
        assume(problem.has_gradients())
        for _ in range(problem.ascents):
            (problem() * s).backward()
            problem.optimizer.ascend(grad_scale=torch.tensor(s) if as_tensor else s)
    assert all(map(same_bits, *(p.tensors for p in problems)))
    for problem in problems:
        problem.optimizer.restore()
    assert all(map(same_bits, problems[0].tensors, Problem(case).tensors))


@holds(
    100, case=cases(min_ascents=1), door=DOOR, bad=st.sampled_from([float("nan"), float("inf")]), at=st.integers(0, 2)
)
def test_an_ascent_that_is_not_finite_skips_the_step(case: Case, door: str, bad: float, at: int) -> None:
    problem, step = made(case, door)
    assume(at < problem.ascents and problem.has_gradients())
    groups = [g for group in case.groups for g in [group] * group.size]
    skips = any(
        p.requires_grad and p.numel() and kind != "none" and g.epsilon and g.inner_lr
        for p, kind, g in zip(problem.tensors, case.gradients[at], groups, strict=True)
    )
    before, state = problem.values(), copy.deepcopy(problem.optimizer.state_dict())
    problem.bad[at] = bad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    assert any("the step was skipped" in str(w.message) for w in caught) == skips
    assert problem.optimizer.skipped_steps == skips
    if skips:
        assert all(map(same_bits, problem.tensors, before))
        assert str(problem.optimizer.state_dict()) == str(state)
    assert all(p.isfinite().all() for p in problem.tensors)
    problem.bad = {}
    step()
    assert all(p.isfinite().all() for p in problem.tensors)
    assert problem.optimizer.skipped_steps == skips


def test_amp_is_what_is_tested() -> None:
    """Of the problems most must be perturbed, and held back by the ball, or the properties above would say little."""
    perturbed, clipped = [], []

    @settings(PROFILE, max_examples=100)
    @given(case=cases())
    def look(case: Case) -> None:
        problem = Problem(case)
        assert isinstance(problem.optimizer, AMP)
        DOORS["closure"](problem)
        statistics = problem.optimizer.statistics()
        perturbed.append(statistics.get("perturbation_norm", torch.zeros(())).item() > 0)
        clipped.append(statistics.get("clipped", torch.zeros(())).item() > 0)

    look()
    assert sum(perturbed) > 30
    assert sum(clipped) > 15
