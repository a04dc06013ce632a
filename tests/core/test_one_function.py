"""All passes of a step are one function: through every door, with every kind of state and randomness in the module."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stateful import (
    CONTAINERS,
    DOORS,
    EPSILON,
    INNER_LR,
    KINDS,
    LR,
    Boxed,
    Net,
    batches,
    by_hand,
    difference,
    seed,
)

from amp_plugin import AMP


def trained(door: str, kinds: list[str], steps: int = 4, **kwargs: Any) -> Net:
    net = Net(kinds)
    seed()
    DOORS[door](net, batches(steps), **kwargs)
    return net


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_and_randomness_are_replayed(kind: str, door: str) -> None:
    expected = by_hand(Net([kind]), batches(4))
    assert difference(trained(door, [kind]), expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_matters(kind: str) -> None:
    """Without the guard a closure trains otherwise: if a kind changed nothing, the test above could not fail."""
    net = Net([kind])
    seed()
    amp = AMP(net.parameters(), LR, epsilon=EPSILON, inner_lr=INNER_LR)
    for batch in batches(4):

        def closure(batch: Any = batch) -> Any:
            amp.zero_grad()
            loss = net(*batch)["loss"]
            loss.backward()
            return loss

        amp.step(closure)
    assert difference(net, by_hand(Net([kind]), batches(4))) > 1e-6


# What rounding leaves; the operations of the passes are the same, so that it is little in every precision.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16 autocast": 1e-5}


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    door=st.sampled_from(sorted(DOORS)),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3, unique=True),
    inner_iter=st.integers(1, 2),
    ascent=st.sampled_from(["full", "every(2)", "subset(0.5)", "split(0.5)"]),
    norm=st.sampled_from(["tensor", "global"]),
    precision=st.sampled_from(sorted(TOLERANCES)),
)
def test_any_mixture_of_them(
    door: str, kinds: list[str], inner_iter: int, ascent: str, norm: str, precision: str
) -> None:
    if door == "closure" and ascent in ("subset(0.5)", "split(0.5)"):  # a closure keeps the batch to itself
        ascent = "full"
    dtype = torch.float64 if precision == "float64" else torch.float32
    options = {"ascent": ascent, "inner_iter": inner_iter, "norm": norm, "autocast": "autocast" in precision}
    net, data = Net(kinds, dtype), batches(4, dtype=dtype)
    expected = by_hand(copy.deepcopy(net), data, **options)  # in the same precision
    seed()
    DOORS[door](net, data, **options)
    assert difference(net, expected) < TOLERANCES[precision]


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("door", DOORS)
def test_rounding_is_all_that_a_lower_precision_changes(door: str, precision: str) -> None:
    net = Net(["queue", "masks of torch"], torch.float32)
    seed()
    DOORS[door](net, batches(4, dtype=torch.float32), autocast="autocast" in precision)
    exact = by_hand(Net(["queue", "masks of torch"]), batches(4))
    rounding = difference(net, exact)
    assert rounding < (1e-4 if precision == "float32" else 2e-2)
    assert (rounding > 1e-4) == ("autocast" in precision), "the passes ran in this precision"


# The Trainer itself cannot move these to the device: it takes every tuple for a plain one.
UNKNOWN_TO_THE_TRAINER = ("named tuple", "packed sequence")
# What no part of the samples can be taken of.
WITHOUT_SAMPLES = ("dataclass", "frozen dataclass", "object", "packed sequence", "nested tensor", "sparse tensor")


@pytest.mark.parametrize("ascent", ["full", "subset(0.5)", "split(0.5)"])
@pytest.mark.parametrize(
    ("container", "door"),
    [(c, d) for c in CONTAINERS for d in DOORS if d != "AMPTrainer" or c not in UNKNOWN_TO_THE_TRAINER],
)
def test_batches_come_in_any_container(container: str, door: str, ascent: str) -> None:
    """The module takes it to pieces in every pass."""
    net, data = Net(["queue", "masks of numpy"]), batches(4)
    boxes = [(CONTAINERS[container].pack(x.clone(), y.clone()),) for x, y in data]
    refused = ascent != "full" and (container in WITHOUT_SAMPLES or door == "closure")
    seed()
    with pytest.raises(ValueError, match=ascent[:5]) if refused else nullcontext():
        DOORS[door](Boxed(net, container), boxes, ascent=ascent)
    if not refused:
        expected = by_hand(Net(["queue", "masks of numpy"]), data, ascent=ascent)
        assert difference(net, expected) < 1e-10
