"""Parameters that are spread over processes (FSDP2, hybrid sharding, tensor parallelism) train as in one process."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_processes
from reference import amp_trajectory, l2
from sharded_training import BALL, CASES, NORMS, SGD_ARGS, Case, Net, batches, mean_loss, trajectory

Facts = list[dict[str, Any]]  # what each process saw


def launch(processes: int, folder: Path) -> Facts:
    run_processes(processes, "sharded_training.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return launch(2, tmp_path_factory.mktemp("two"))


@functools.cache
def expected(norm: Any, inner_iter: int, dtype: torch.dtype) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Weights and statistics after each step, from the reference in one process."""
    ball = {**BALL, "norm": norm, "inner_iter": inner_iter}
    steps = []
    for step in amp_trajectory(Net(dtype), mean_loss, batches(dtype), **ball, **SGD_ARGS):
        size = l2(step.delta.values())
        lengths = [size] if norm == "global" else step.delta_norms.values()
        clipped = [length > BALL["epsilon"] * (1 - 1e-9) for length in lengths]
        steps.append((step.params, {"perturbation_norm": size, "clipped": sum(clipped) / len(clipped)}))
    return steps


def assert_equal_to_one_process(facts: Facts) -> None:
    """Weights and statistics after every step, as every process sees them."""
    for case in CASES[len(facts)]:
        tolerance = 1e-10 if case.dtype == torch.float64 else 1e-6
        alone = (
            trajectory(Case(case.norm, case.inner_iter, "plain", groups=True))
            if case.groups  # for which the reference has no option
            else expected(case.norm, case.inner_iter, case.dtype)
        )
        for rank, seen in enumerate(facts):
            for k, ((weights, statistics), (w, s)) in enumerate(zip(seen[str(case)], alone, strict=True)):
                where = f"{case}, process {rank}, step {k}"
                for name in w:
                    off = (weights[name].double() - w[name]).abs().max().item()
                    assert off <= tolerance, f"{where}, {name}"
                assert statistics == pytest.approx(s, rel=1e-6), where  # "clipped" is a float32


def test_two_processes_equal_one(two: Facts) -> None:
    assert_equal_to_one_process(two)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes_equal_one(processes: int, tmp_path: Path) -> None:
    assert_equal_to_one_process(launch(processes, tmp_path))


def test_the_problem_has_tensors_inside_and_outside_their_balls() -> None:
    for inner_iter in (1, 2):
        clipped = [s["clipped"] for _, s in expected("tensor", inner_iter, torch.float64)]
        assert any(0 < c < 1 for c in clipped)


@pytest.mark.parametrize("norm", NORMS)
def test_an_ascent_takes_one_collective(norm: str, two: Facts) -> None:
    for seen in two:
        assert seen[f"collectives, {norm}"] == {"c10d.allreduce_": 1}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad_ascent", [0, 1])
def test_a_nan_in_the_part_of_one_process_makes_all_skip_the_step(norm: str, bad_ascent: int, two: Facts) -> None:
    ascents, step, next_step = [bad_ascent > 0, False], False, True
    for seen in two:
        assert seen[f"NaN in ascent {bad_ascent}, {norm}"] == {"moved": [*ascents, step, next_step], "skipped": 1}


@pytest.mark.parametrize("entry", [1.0, 1e20, math.nan])
def test_norms_of_float32_parts_add_up_whatever_one_process_finds_in_its_own(entry: float, two: Facts) -> None:
    for facts in two:
        expected = 0.5 if math.isfinite(entry) else 0.0
        assert facts[f"entry {entry}"] == {"length": pytest.approx(expected), "finite": math.isfinite(entry)}


@pytest.mark.parametrize("reshard", [True, False])
def test_a_failing_closure_leaves_the_weights_clean_and_training_goes_on(reshard: bool, two: Facts) -> None:
    last, _ = expected("tensor", 2, torch.float64)[-1]
    for seen in two:
        clean, weights = seen[f"failing closure, {reshard}"].values()
        assert clean == [True] * 6
        for name in last:
            torch.testing.assert_close(weights[name], last[name], rtol=0.0, atol=1e-10)


def test_the_root_of_the_sharding_can_be_attached_and_keeps_no_gathered_perturbed_weights(two: Facts) -> None:
    last, _ = expected("tensor", 2, torch.float64)[-1]
    for seen in two:
        assert all(seen["attached root"]["same"])
        for name in last:
            torch.testing.assert_close(seen["attached root"]["weights"][name], last[name], rtol=0.0, atol=1e-10)


def test_attaching_before_sharding_is_refused(two: Facts) -> None:
    assert all("call fully_shard() first" in seen["attached too early"] for seen in two)


def test_an_ascent_without_gradient_synchronisation_is_an_error_that_says_so(two: Facts) -> None:
    for seen in two:
        assert seen["no sync"]["unchanged"]
        messages = seen["no sync"]["messages"]
        assert len(messages) == 2
        assert all("set_requires_gradient_sync(True)" in message for message in messages)
