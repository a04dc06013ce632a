"""What AMP does not own has, in two processes, the gradient of the descent alone, counted once, as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch import run_processes
from others_cases import CASES, DOORS, WORLD, by_hand


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """For each process the weights after each step, for all cases."""
    folder = tmp_path_factory.mktemp("others")
    run_processes(WORLD, "others_cases.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("door", DOORS)
def test_two_processes_equal_one_for_every_parameter(door: str, weights: list[Any]) -> None:
    for case, *of_ranks in zip(CASES, *weights, strict=True):
        if case.door != door:
            continue
        for step, (want, *seen) in enumerate(zip(by_hand(case), *of_ranks, strict=True)):
            for tensor, *in_processes in zip(want, *seen, strict=True):
                assert torch.equal(*in_processes), (case, step)
                torch.testing.assert_close(
                    in_processes[0],
                    tensor,
                    rtol=1e-10,
                    atol=1e-12,
                    msg=lambda m, at=(case, step): f"{at}: {m}",  # type: ignore[misc]
                )
