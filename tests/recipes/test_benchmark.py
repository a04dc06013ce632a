"""The benchmark's bookkeeping, and that each way to train it measures is the one it claims. No times are asserted."""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
import transformers.trainer
from benchmarks import counts, host, recipe, step
from benchmarks.memory import peak_memory
from benchmarks.rows import counted, draw, markdown, timed
from benchmarks.turns import Turn, take_turns
from launch import forking
from PIL import Image
from torch import nn

TURNS: dict[str, Any] = {"seconds": 0.0, "rounds": (3, 9), "warm_up": 2}
TINY = {"width": 4, "layers": [1, 1, 1, 1]}


def allocate(turn: Turn, megabytes: int) -> None:
    while True:
        turn()
        torch.ones(megabytes * 2**18)


def test_each_makes_one_step_a_round_and_the_order_rotates() -> None:
    diary = ""

    def loop(turn: Turn, name: str) -> None:
        nonlocal diary
        try:
            while True:
                turn()
                diary += name
        finally:
            diary += name.upper()

    measured = take_turns({name: partial(loop, name=name) for name in "abc"}, **TURNS)
    assert diary == "abcbca" + "cababcbca" + "ABC", "two rounds of warm-up, three that count, and all loops left"
    assert {name: len(seconds) for name, seconds in measured.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_end_when_the_time_is_over() -> None:
    def loop(turn: Turn) -> None:
        while True:
            turn()

    assert len(take_turns({"a": loop}, **TURNS | {"seconds": 1e9})["a"]) == 9


def test_a_step_is_timed_from_its_turn_to_the_next() -> None:
    def loop(turn: Turn) -> None:
        while True:
            turn()
            time.sleep(0.05)

    assert all(t >= 0.05 for t in take_turns({"long": loop}, **TURNS)["long"])


def test_a_loop_that_fails_or_ends_ends_the_benchmark() -> None:
    def fail(turn: Turn) -> None:
        turn()
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        take_turns({"bad": fail}, **TURNS)
    with pytest.raises(RuntimeError, match="the loop 'short' ended"):
        take_turns({"short": lambda turn: turn()}, **TURNS)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that measures need not import everything again."""
    context = forking()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("forked")
def test_each_has_a_peak_memory_of_its_own() -> None:
    small, large = (peak_memory(partial(allocate, megabytes=n), threads=1).process for n in (1, 257))
    assert abs(large - small - 2**28) < 2**26


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives the memory back")
def test_fast_keeps_the_memory_that_a_step_frees() -> None:
    given_back, kept = (
        peak_memory(partial(allocate, megabytes=64), threads=1, steps=8, keep_freed=keep_freed).faults
        for keep_freed in (False, True)
    )
    pages = 2**26 / os.sysconf("SC_PAGESIZE")
    assert given_back > 0.9 * pages
    assert kept < 0.3 * pages, "after the heap has grown once or twice"


def test_a_row_is_the_median_of_the_rounds_ratios() -> None:
    row = timed("s", "c", "ours", "theirs", [2.0, 9.0, 8.0], [1.0, 3.0, 2.0], "ms")
    assert (row.ratio, row.value, row.baseline_value, row.rounds) == (3.0, 8.0, 2.0, 3)
    assert row.low < row.ratio < row.high
    table = markdown([row, counted("t", "c", "ours", "theirs", 3, 0, "calls")])
    assert "| c | ours | theirs | 3.000 | 2.000 to 4.000 | 8 | 2 | ms | 3 |" in table
    assert "| c | ours | theirs | - | exact | 3 | 0 | calls | 1 |" in table


class _EnoughError(Exception):
    pass


def passes_between_turns(monkeypatch: pytest.MonkeyPatch, loop: Any, **arguments: Any) -> list[int]:
    """Forward passes of the tiny model in training mode from one turn to the next, of three."""
    calls, turns = [0], []
    forward = nn.BatchNorm2d.forward

    def counting(module: nn.BatchNorm2d, *args: Any) -> Any:
        calls[0] += module.training
        return forward(module, *args)

    def turn() -> None:
        turns.append(calls[0])
        if len(turns) == 3:
            raise _EnoughError

    monkeypatch.setattr(nn.BatchNorm2d, "forward", counting)
    with pytest.raises(_EnoughError):
        loop(turn, **arguments)
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in step.problem(TINY, 2)[0].modules())
    return [(b - a) // layers for a, b in itertools.pairwise(turns)]


@pytest.mark.parametrize("name", step.WAYS)
def test_a_way_makes_the_passes_it_is_named_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = passes_between_turns(monkeypatch, step.WAYS[name][0], make=partial(step.problem, TINY, 2))
    assert passes == 2 * [2 if "AM" in name else 1]


@pytest.mark.parametrize("name", host.WAYS)
def test_a_step_of_the_host_has_all_parts_but_no_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, made = [], host.hollow

    def watched() -> Any:
        model, batch = made()
        network = step.architecture(model)
        passes = network.forward
        network.forward = lambda *args, **kwargs: (calls.append(0), passes(*args, **kwargs))[1]  # type: ignore[func-returns-value]
        return model, batch

    def turn() -> None:
        turns.append(len(calls))
        if len(turns) == 3:
            raise _EnoughError

    turns: list[int] = []
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    with pytest.raises(_EnoughError):
        host.WAYS[name][0](turn, make=watched)
    assert [b - a for a, b in itertools.pairwise(turns)] == 2 * [2 if "AMP" in name else 1]
    params = list(made()[0].parameters())
    assert len(params) == len(list(step.problem({}, 1)[0].parameters()))
    assert sum(p.numel() for p in params) < 10_000


@pytest.mark.parametrize("name", step.MODES)
def test_a_turn_of_a_mode_makes_the_passes_it_is_named_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward calls in four steps; one on a part of the batch is a call too, whose images are counted elsewhere."""
    extra = {"SGD": 0, "every(4)": 1, "window(0.75, 1.0)": 1, "stale": 0, "momentum": 0}
    passes = passes_between_turns(monkeypatch, step.MODES[name][0], make=partial(step.problem, TINY, 8))
    assert passes == 2 * [4 + extra.get(name, 4)]


def test_all_ways_train_the_same_weights_in_turn() -> None:
    (model, batch), before = step.problem(TINY, 2), []

    def watched(turn: Turn, way: Any) -> None:
        def look() -> None:
            before.append([p.detach().clone() for p in model.parameters()])
            turn()

        way(look, make=lambda: (model, batch))

    take_turns({name: partial(watched, way=way) for name, (way, _) in step.WAYS.items()}, **TURNS | {"warm_up": 0})
    states = before[len(step.WAYS) :]
    assert len(states) == 3 * len(step.WAYS)
    assert all(not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(states)), "each step moves them on"


def test_the_recipe_and_the_bare_loop_make_the_same_passes_of_one_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models: list[nn.Module] = []
    options = ["--optim", "amp", "--model_kwargs", json.dumps(TINY), "--output_dir", str(tmp_path), "--save_strategy"]
    options += ["steps", "--save_steps", "3", "--eval_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
    recipes = passes_between_turns(monkeypatch, recipe.recipe_loop, options=options, steps=3, models=models)
    monkeypatch.undo()
    assert recipe.recipe_loop.__name__ not in str(transformers.trainer.DEFAULT_CALLBACKS)
    (model,) = models
    bare: dict[str, Any] = {"model_of": lambda: model, "steps": 3, "arithmetic": {"channels_last": True, "bf16": True}}
    assert recipes == passes_between_turns(monkeypatch, recipe.bare_loop, **bare) == [6, 6]


def test_bytes_that_are_communicated() -> None:
    """DDP's own averages once; a second pass as much again, unless each process perturbs along its own gradient."""
    rows = {row.name: row for row in counts.communication()}
    buffers = rows["SGD"].value - rows["SGD"].baseline_value  # BatchNorm's, which DDP hands out in forward passes
    assert 0.0 < buffers < 0.01
    assert rows["AMP, attach, sync_ascent=False"].value - rows["SGD"].value == pytest.approx(4 / 2**20)
    assert rows["AMP, attach"].value - rows["SGD"].value == pytest.approx(rows["SGD"].baseline_value)
    assert rows["AMP, closure"].value == rows["SAM of pytorch_optimizer"].value == 2 * rows["SGD"].value


def test_the_picture(tmp_path: Path) -> None:
    rows = [timed("Step", f"{n}M", "AMP", "SGD", [2.0, 2.1, 2.2], [1.0, 1.0, 1.1], "ms") for n in range(3)]
    draw([*rows, counted("Host", "c", "AMP", "SGD", 0, 0, "calls")], tmp_path / "ratios.png", "a machine")
    with Image.open(tmp_path / "ratios.png") as picture:
        assert picture.size[0] > 600


def test_the_passes_over_the_weights_are_those_that_are_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the figure of the optimizer's own work is divided by."""
    model, _ = step.problem(TINY, 1)
    optimizer = counts.AMP(model.parameters(), 0.1)

    def displace() -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.ascend()
        optimizer.restore()

    displace()
    count = counts._count(displace)
    assert sum(n for name, n in count.calls.items() if "_foreach" in name) == counts.WEIGHT_SIZED_PASSES


def test_a_missing_rival_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r'pytorch_optimizer is missing: pip install "amp-plugin\[benchmark\]"'):
        importlib.reload(benchmark)
