"""All passes of a step are one function: through every door, with every kind of state and randomness in the module."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stateful import DOORS, EPSILON, INNER_LR, KINDS, LR, Net, batches, by_hand, difference, seed

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


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    door=st.sampled_from(sorted(set(DOORS) - {"AMPTrainer"})),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3, unique=True),
    inner_iter=st.integers(1, 2),
    ascent=st.sampled_from(["full", "every(2)", "subset(0.5)"]),
)
def test_any_mixture_of_them(door: str, kinds: list[str], inner_iter: int, ascent: str) -> None:
    if door == "closure" and ascent == "subset(0.5)":  # a closure keeps the batch to itself
        ascent = "full"
    expected = by_hand(Net(kinds), batches(4), ascent=ascent, inner_iter=inner_iter)
    assert difference(trained(door, kinds, ascent=ascent, inner_iter=inner_iter), expected) < 1e-10
