"""The benchmark's bookkeeping, and that each way to train it measures is the one it claims. No times are asserted."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
import transformers.trainer
from benchmarks import counts, recipe, step
from benchmarks.rows import counted, markdown, timed
from benchmarks.turns import Contestant, Turn, take_turns
from torch import nn

TURNS: dict[str, Any] = {"seconds": 0.0, "min_rounds": 3, "max_rounds": 9, "warm_up": 2, "threads": 1}
TINY = {"width": 4, "layers": [1, 1, 1, 1]}


def append_names(turn: Turn, name: str, path: str) -> None:
    while True:
        turn()
        with open(path, "a") as file:
            file.write(name)


def fail(turn: Turn) -> None:
    turn()
    raise ValueError("no such thing")


def end(turn: Turn) -> None:
    turn()


def sleep(turn: Turn, seconds: float) -> None:
    while True:
        turn()
        time.sleep(seconds)


def allocate(turn: Turn, megabytes: int) -> None:
    while True:
        turn()
        torch.ones(megabytes * 2**18)


def test_each_makes_one_step_a_round_and_the_order_rotates(tmp_path: Path) -> None:
    path = tmp_path / "names"
    contestants = {name: Contestant(append_names, {"name": name, "path": str(path)}) for name in "abc"}
    measured = take_turns(contestants, **TURNS)
    assert path.read_text() == "abcbca" + "abcbcacab"
    assert {name: len(m.seconds) for name, m in measured.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_step_is_timed_from_its_turn_to_the_next(tmp_path: Path) -> None:
    measured = take_turns({"long": Contestant(sleep, {"seconds": 0.05})}, **TURNS)
    assert all(t >= 0.05 for t in measured["long"].seconds)


def test_each_process_has_a_peak_memory_of_its_own() -> None:
    measured = take_turns({f"{n}": Contestant(allocate, {"megabytes": n}) for n in (1, 257)}, **TURNS)
    assert abs(measured["257"].peak_memory - measured["1"].peak_memory - 2**28) < 2**26


@pytest.mark.parametrize(("loop", "message"), [(fail, "no such thing"), (end, "the loop ended")])
def test_a_contestant_that_fails_ends_the_benchmark(loop: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s)benchmark of 'bad' failed.*{message}"):
        take_turns({"bad": Contestant(loop)}, **TURNS)


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


@pytest.mark.parametrize("name", [name for name in step.WAYS if "SAM" not in name])
def test_a_way_makes_the_passes_it_is_named_for(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extra = {"output_dir": str(tmp_path)} if "Trainer" in name else {}
    passes = passes_between_turns(monkeypatch, step.WAYS[name][0], model_args=TINY, batch_size=2, **extra)
    assert passes == 2 * [2 if "AMP" in name else 1]


def test_the_recipe_makes_as_many_passes_as_the_bare_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS])
    options = ["--optim", "amp", "--model_kwargs", json.dumps(TINY), "--output_dir", str(tmp_path)]
    recipes = passes_between_turns(
        monkeypatch, recipe.recipe_loop, options=[*options, "--use_cpu", "true", "--disable_tqdm", "true"]
    )
    monkeypatch.undo()
    arithmetic = {"channels_last": True, "bf16": True}
    bare = passes_between_turns(monkeypatch, recipe.bare_loop, model_args=TINY, arithmetic=arithmetic)
    assert recipes == bare == 2 * [2 * recipe.STEPS]


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


def test_a_missing_rival_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "_version", lambda name: "missing")
    with pytest.raises(SystemExit):
        benchmark.parse([])
    assert 'pip install "amp-plugin[benchmark]"' in capsys.readouterr().err
    assert benchmark.parse(["--only", "startup"]).only == ["startup"]
