"""FSDP2 through accelerate: two processes, each with a part of every parameter, train as one, through every door.

accelerate leaves FSDP out on a CPU, so that these tests tell its state of GPUs; where there are two, they run there.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from accelerate_fsdp import BALL, CASES, SGD, STEPS, WORLD, Case, Net, batches
from ascent_reference import Moment, Rule, full, half_of_each, policy_trajectory, quarter_of_each, stale
from ascent_reference import three_quarters_of_each as rest_of_each
from launch import run_processes
from reference import Tensors
from torch.nn import functional as F

Facts = list[dict[str, Any]]  # what each process saw
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-6}


NCCL = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="no two CUDA devices")]
GLOO = pytest.mark.skipif(torch.cuda.is_available(), reason="fully_shard takes the GPUs")


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=GLOO), pytest.param("cuda", marks=NCCL)])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("fsdp")
    run_processes(WORLD, "accelerate_fsdp.py", folder, request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def of_norm(m: Moment) -> Tensors:
    return {name: g for name, g in full(m).items() if name.startswith("norm.")}


@functools.cache
def expected(case: Case) -> list[Tensors]:
    """Weights after each step, from the reference in one process that has the samples of all."""
    windows = [[batch for micro in step for batch in micro] for step in batches(case)]
    if case.fails_in >= 0:
        del windows[1]
    k = case.micro_batches
    parts: dict[str, Rule] = {
        "subset(0.5)": lambda m: m.gradient(half_of_each(m) if k == 1 else m.window[: k // 2 * WORLD]),
        "split(0.25)": quarter_of_each if k == 1 else lambda m: m.gradient(m.window[:WORLD]),
        "stale": stale,
        "full": of_norm if case.parameters else full,
    }
    on = (rest_of_each if k == 1 else lambda window: window[WORLD:]) if case.ascent == "split(0.25)" else list
    rule, ball = parts[case.ascent], {**BALL, "epsilon": case.epsilon}
    each = WORLD if case.door == "attach" else 0
    steps = policy_trajectory(
        Net(case.dtype), F.cross_entropy, windows, rule, **SGD, **ball, descent_on=on, clip=case.clip, each=each
    )
    return [theta for theta, _ in steps]


def fails(case: Case) -> bool:
    return case.door == "AMPTrainer" and case.fails_in >= 0


@pytest.mark.parametrize("case", [c for c in CASES if c.precision in TOLERANCE and not fails(c)], ids=str)
def test_two_processes_equal_one(case: Case, seen: Facts) -> None:
    want, tolerance = expected(case), TOLERANCE[case.precision]
    for rank, facts in enumerate(seen):
        got = facts[str(case)]
        assert len(got["weights"]) == len(want)
        assert got.get("clean", True)
        for step, weights in enumerate(want):
            assert weights.keys() == got["weights"][step].keys()
            for name, tensor in weights.items():
                off = (got["weights"][step][name].double() - tensor).abs().max().item()
                assert off <= tolerance, f"process {rank}, step {step}, {name}: {off}"
    assert seen[0][str(case)]["passes"] == seen[1][str(case)]["passes"]


@pytest.mark.parametrize("case", [c for c in CASES if fails(c)], ids=str)
def test_an_interrupted_trainer_leaves_the_weights_clean(case: Case, seen: Facts) -> None:
    assert all(facts[str(case)]["clean"] for facts in seen)


def test_the_passes_of_a_policy_are_counted(seen: Facts) -> None:
    for case in CASES:
        passes = {"subset(0.5)": 1.5, "split(0.25)": 1.0, "stale": 1.0}.get(case.ascent, 2.0)
        if case.epsilon and case.fails_in < 0:
            assert seen[0][str(case)]["passes"] == [passes] * STEPS, case


def distance(a: Tensors, b: Tensors) -> float:
    return float(torch.stack([(a[name].double() - b[name].double()).norm() for name in a]).norm())


@pytest.mark.parametrize("case", [c for c in CASES if c.precision not in TOLERANCE and c.epsilon], ids=str)
def test_mixed_precision_ends_near_the_reference(case: Case, seen: Facts) -> None:
    exact, plain = expected(case)[-1], expected(case._replace(epsilon=0.0))[-1]
    for facts in seen:
        assert distance(facts[str(case)]["weights"][-1], exact) < 0.1 * distance(plain, exact)


def test_epsilon_0_is_the_plain_training_to_the_bit(seen: Facts) -> None:
    cases = {c.door: str(c) for c in CASES if not c.epsilon}
    for facts in seen:
        plain, ours = (facts[cases[door]]["weights"] for door in ("plain", "amp_backward"))
        for got, want in zip(ours, plain, strict=True):
            assert all(torch.equal(got[name], want[name]) for name in want)


def test_what_is_refused_names_what_to_use(seen: Facts) -> None:
    for facts in seen:
        said = facts["refusals"]
        for door in ("AMPTrainer", "amp_backward"):
            assert "with FSDP1; use FSDP2 (fsdp_version: 2) or DDP" in said[f"{door}, FSDP1"]
            assert "leave fsdp_offload_params off" in said[f"{door}, offload"]
        assert "leave it on, or use DDP" in said["AMPTrainer, amp_sync_ascent"]
        assert "leave sync_ascent on, or use DDP" in said["amp_backward, sync_ascent"]
        assert "amp_capture under FSDP; leave it off" in said["AMPTrainer, amp_capture"]
        assert len(said) == 7
