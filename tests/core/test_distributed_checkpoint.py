"""A checkpoint saved by some number of processes goes on in any other, as if nothing had been interrupted."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from distributed_checkpoint import cases, load_and_train
from launch import run_processes
from sharded_training import trajectory
from torch import Tensor

Ends = dict[str, dict[str, Tensor]]  # the weights at the end of each case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what two processes have saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_processes(2, "distributed_checkpoint.py", folder, "save")
    return folder


@pytest.fixture(scope="module")
def uninterrupted() -> Ends:
    return {name: trajectory(case)[-1][0] for name, case in cases("plain").items()}


def assert_equal(ends: Ends, expected: Ends) -> None:
    assert ends.keys() == expected.keys()
    for case, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(ends[case][name], tensor, rtol=1e-10, atol=1e-10)


def go_on_alone(saved: Path) -> Ends:
    """In this process, and without sharding."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        return load_and_train(saved, "plain")


def test_from_two_processes_to_one(folder: Path, uninterrupted: Ends) -> None:
    assert_equal(go_on_alone(folder / "saved by 2"), uninterrupted)


@pytest.mark.slow
def test_from_two_processes_to_three_and_from_three_to_two_and_one(folder: Path, uninterrupted: Ends) -> None:
    run_processes(3, "distributed_checkpoint.py", folder, "load", 2, "save")
    run_processes(2, "distributed_checkpoint.py", folder, "load", 3)
    for name, processes in (("2 to 3", 3), ("3 to 2", 2)):
        for rank in range(processes):
            assert_equal(torch.load(folder / f"{name}, process {rank}.pt", weights_only=True), uninterrupted)
    assert_equal(go_on_alone(folder / "saved by 3"), uninterrupted)
