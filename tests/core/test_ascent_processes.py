"""Every ascent policy in two processes is the same in one: against the reference, which has all their samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ascent_doors import BALL, SGD
from ascent_processes import CASES, POLICIES, WORLD, batches
from ascent_reference import (
    RULES,
    Batch,
    half_of_each,
    policy_trajectory,
    quarter_of_each,
    three_quarters_of_each,
)
from exactness_problem import Net
from launch import run_processes
from torch.nn import functional as F


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("ascent")
    run_processes(WORLD, "ascent_processes.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_two_processes_equal_one(policy: tuple[str, str | None], seen: Any) -> None:
    rule, passes = RULES[policy]
    on: Callable[[Sequence[Batch]], Sequence[Batch]] = lambda window: window  # noqa: E731
    if policy[0] == "subset(0.5)":  # of the batch of every process
        rule = lambda m: m.gradient(half_of_each(m))  # noqa: E731
    if policy[0] == "split(0.25)":
        rule, on = quarter_of_each, three_quarters_of_each
    want = policy_trajectory(Net(), F.cross_entropy, batches(), rule, **SGD, **BALL, descent_on=on)
    for case in [case for case in CASES if case[1:] == policy]:
        first, second = (of_rank[case] for of_rank in seen)
        expected = [2.0 if a else 1.0 for _, a in want] if passes is None else list(map(passes, range(len(want))))
        assert first["passes"] == second["passes"] == expected, case
        for step, (theta, _) in enumerate(want):
            for name, tensor in theta.items():
                got = first["weights"][step][name]
                assert torch.equal(got, second["weights"][step][name]), (case, step, name)
                torch.testing.assert_close(
                    got, tensor, rtol=1e-9, atol=1e-9, msg=lambda m, at=(case, step, name): f"{at}: {m}"
                )
