"""Every door of AMP under `DistributedDataParallel`, in two processes, against a reference in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddp_cases import BALL, CASES, OVERFLOW_AT, SGD_ARGS, STEPS, WORLD, Case, Net, batch_of, groups_of, mean_loss
from launch import run_processes
from reference import Tensors
from torch import nn
from windows import window_trajectory


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    """What each process saw, for all cases by the name of their group."""
    folder = tmp_path_factory.mktemp("ddp")
    run_processes(WORLD, "ddp_cases.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def net(case: Case) -> Net:
    return Net(nn.Identity if case.batch_norm == "none" else nn.BatchNorm1d)


def expected(case: Case) -> list[Tensors]:
    """The reference's weights after each step; one with an overflow is skipped."""
    steps = []
    for step in range(STEPS):
        if case.joined:
            batches = [batch_of(case, step, 0, rank) for rank in range(WORLD)]
            steps.append([[tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]])
        elif step != OVERFLOW_AT or case.bad_pass < 0:
            steps.append(groups_of(case, step))
    weights = window_trajectory(net(case), mean_loss, steps, **BALL, **SGD_ARGS, norm=case.norm)
    return weights if case.bad_pass < 0 else [*weights[:OVERFLOW_AT], *weights[OVERFLOW_AT - 1 :]]


@pytest.mark.parametrize("group", [name for name in CASES if name != "static graph"])
def test_replicas_are_the_same_to_the_bit_and_equal_the_reference(group: str, facts: Any) -> None:
    for case, *of_ranks in zip(CASES[group], *(f[group] for f in facts), strict=True):
        assert all("error" not in seen for seen in of_ranks), (case, of_ranks[0].get("error"))
        for step, want in enumerate(expected(case)):
            first, second = (seen["weights"][step] for seen in of_ranks)
            for name, tensor in want.items():
                assert torch.equal(first[name], second[name]), (case, step, name)
                torch.testing.assert_close(
                    first[name],
                    tensor,
                    rtol=1e-10,
                    atol=1e-10,
                    msg=lambda m, at=(case, step, name): f"{at}: {m}",  # type: ignore[misc]
                )


def test_a_skipped_step_leaves_the_weights_alone_to_the_bit(facts: Any) -> None:
    for group in ("overflow", "scaled overflow"):
        for case, *of_ranks in zip(CASES[group], *(f[group] for f in facts), strict=True):
            for seen in of_ranks:
                before, at, after = seen["weights"][OVERFLOW_AT - 1 : OVERFLOW_AT + 2]
                assert all(torch.equal(at[name], before[name]) for name in before), case
                assert not any(torch.equal(at[name], after[name]) for name in before), case


def test_sharing_an_overflow_shares_nothing_else(facts: Any) -> None:
    for seen in facts:
        unchanged = [torch.full((9,), 6e4).half(), torch.zeros(0), torch.zeros(2)]
        assert all(torch.equal(a, b) for a, b in zip(seen["shared"][-1], unchanged, strict=True))
        for bad_rank in range(WORLD):
            assert [grad.isnan().all() for grad in seen["shared"][bad_rank]] == [True] * 3


def test_an_overflow_in_one_process_halves_the_scale_of_all_once(facts: Any) -> None:
    for case, *of_ranks in zip(CASES["scaled overflow"], *(f["scaled overflow"] for f in facts), strict=True):
        for seen in of_ranks:
            assert seen["scales"] == [1024.0] * OVERFLOW_AT + [512.0] * (STEPS - OVERFLOW_AT), case


def test_running_statistics_are_those_of_the_passes_at_the_unperturbed_weights(facts: Any) -> None:
    """DDP broadcasts those of the first process before a step, if at all."""
    for case, *of_ranks in zip(CASES["batch norm"], *(f["batch norm"] for f in facts), strict=True):
        replicas = [net(case) for _ in range(WORLD)]
        points = [dict(replicas[0].named_parameters()), *expected(case)]
        for step, theta in enumerate(points[:-1]):
            if case.options["broadcast_buffers"]:
                replicas[1].load_state_dict(replicas[0].state_dict())
            for rank, (replica, seen) in enumerate(zip(replicas, of_ranks, strict=True)):
                replica.load_state_dict(theta, strict=False)
                replica(batch_of(case, step, 0, rank)[0])
                for name, buffer in replica.named_buffers():
                    torch.testing.assert_close(seen["buffers"][step][name], buffer, rtol=1e-10, atol=1e-10)


def test_a_static_graph_is_refused_where_passes_go_unsynchronised(facts: Any) -> None:
    """PyTorch itself fails there, https://github.com/pytorch/pytorch/issues/143580."""
    for seen_of_rank in facts:
        for case, seen in zip(CASES["static graph"], seen_of_rank["static graph"], strict=True):
            if case.door.startswith("attach"):
                assert "static_graph=True" in seen["error"], case
                continue
            for weights, want in zip(seen["weights"], expected(case), strict=True):
                for name, tensor in want.items():
                    torch.testing.assert_close(weights[name], tensor, rtol=1e-10, atol=1e-10)
