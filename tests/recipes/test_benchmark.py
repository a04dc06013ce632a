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
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
import transformers.trainer
from benchmarks import counts, device, device_picture, device_steps, device_times, host, recipe, step
from benchmarks.memory import peak_memory
from benchmarks.rows import Row, counted, draw, markdown, picture_of, timed
from benchmarks.turns import Turn, take_turns
from launch import forking
from PIL import Image
from repository import ROOT
from torch import nn

from amp_plugin.core import captured_call
from amp_plugin.report.style import shows

RECIPES = ROOT / "recipes"
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
        if not turns:  # the network is made, which has tried it on an image
            monkeypatch.setattr(nn.Conv2d, "forward", None)
        turns.append(len(calls))
        if len(turns) == 3:
            raise _EnoughError

    turns: list[int] = []
    with pytest.raises(_EnoughError):
        host.WAYS[name][0](turn, make=watched)
    monkeypatch.undo()
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


def test_each_subject_has_a_picture_of_its_own(tmp_path: Path) -> None:
    """But one without a ratio."""
    rows = [timed("Step", f"{n}M", "AMP", "SGD", [2.0, 2.1, 2.2], [1.0, 1.0, 1.1], "ms") for n in range(3)]
    rows += [timed("Page faults", "c", "AMP", "SGD", [3.0], [1.0], "faults")]
    paths = draw([*rows, counted("Host", "c", "AMP", "SGD", 0, 0, "calls")], tmp_path, "a machine")
    assert [path.name for path in paths] == ["benchmark-step.png", "benchmark-page-faults.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size[0] > 600
            assert picture.size[1] < 2 * picture.size[0]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_pages_pictures_are_of_the_rows_that_stand_beside_them() -> None:
    lines = (RECIPES / "benchmark.jsonl").read_text().splitlines()[1:]
    for path in sorted(RECIPES.glob("benchmark-*.png")):
        rows = [row for row in (Row(**json.loads(line)) for line in lines) if picture_of(row.section) == path.name]
        assert shows(path, markdown([row for row in rows if row.baseline_value])), path.name
        assert f"]({path.name})" in (RECIPES / "RESULTS.md").read_text()


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


# --- steps on one device, --device cuda, tried on a CPU

ON_CPU = ["--device", "cpu", "--network", "tiny", "--batch_sizes", "2", "--precisions", "fp32", "--modes"]


def measured(file: Path, *arguments: str) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        device.main([*ON_CPU, *arguments, "--rows", str(file)])
    return device.read(file)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_times, "GROUP_SECONDS", 0.0)


@pytest.mark.parametrize("way", device_steps.WAYS)
@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_way_on_a_device_makes_the_passes_it_is_named_for(
    way: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = device_steps.Problem(torch.device("cpu"), "tiny", 2, "fp32", mode)
    if way == "SAM of pytorch_optimizer" and mode == "captured":
        with pytest.raises(ValueError, match="asks the host"):
            device_steps.WAYS[way](problem)
        return
    train = device_steps.WAYS[way](problem)
    before = [p.detach().clone() for p in problem.model.parameters()]
    calls, forward = [], nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    train()
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in problem.model.modules())
    assert len(calls) == layers * device_steps.passes_of(way)
    assert all(not torch.equal(a, b) for a, b in zip(before, problem.model.parameters(), strict=True))


@pytest.mark.usefixtures("quick")
def test_rows_of_a_cpu_are_ratios_and_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    rows = measured(file, "eager", "captured", "--only", "step")
    assert "machine" in rows[0]
    ratios = {(row["mode"], row["way"]): row["ratio"] for row in rows if "ratio" in row}
    ways = [(mode, way) for mode in ("eager", "captured") for way in device_steps.WAYS]
    assert list(ratios) == ways[:-1]
    assert not {name for row in rows for name in row} & {*device.ABSOLUTE}
    (left_out,) = [row for row in rows if "left_out" in row]
    assert (left_out["mode"], left_out["way"]) == ways[-1]
    again = measured(file, "eager", "captured", "--only", "step")
    assert again[len(rows) :] == rows[:1], "nothing but the machine"
    with file.open("a") as stream:
        stream.write('{"part": "cut o')
    assert measured(file, "eager", "captured", "--only", "step")[len(again) :] == rows[:1]
    monkeypatch.setattr(device, "machine", lambda _: {"device": "another"})
    assert [row for row in measured(file, "captured", "--only", "step")[len(again) + 1 :] if "ratio" in row]


def test_a_part_without_time_is_left_out(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.jsonl", "eager", "captured, compiled", "--only", "step", "--seconds", "0")
    assert [row["left_out"].partition(", ")[2] for row in rows[1:]] == ["12 are needed", "42 are needed"]


@pytest.mark.usefixtures("quick")
def test_a_step_that_cannot_be_captured_gives_no_row_of_a_captured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(function: Any, stream: Any) -> Any:
        raise RuntimeError("not permitted")

    monkeypatch.setitem(captured_call.RECORDERS, "cpu", refuse)
    rows = measured(tmp_path / "rows.jsonl", "captured", "--only", "step")
    assert not any("ratio" in row for row in rows)
    assert any("cannot be captured" in row.get("failed", "") for row in rows)


@pytest.mark.usefixtures("quick", "no_pictures")
def test_the_recipe_on_a_device_is_compared_with_its_bare_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "RECIPES", {"train.py": device.RECIPES["train.py"]})
    _, recipe_row, bare_row = measured(
        tmp_path / "rows.jsonl", "eager", "--only", "recipe", "--recipe_steps", "8", "--seconds", "1e9"
    )
    assert (recipe_row["way"], bare_row["way"]) == ("train.py", recipe_row["baseline"])
    assert bare_row["ratio"] == 1.0
    assert recipe_row["ratio"] > 0.0
    assert all(callback.__name__ != "Clock" for callback in transformers.trainer.DEFAULT_CALLBACKS)


def test_steps_on_a_device_need_none_of_the_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    file = tmp_path / "rows.jsonl"
    for name in ("pytorch_optimizer", "greenlet", "matplotlib", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *ON_CPU, "eager", "--only", "step", "--rows", str(file)])
    with warnings.catch_warnings():
        importlib.reload(benchmark).main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["way"] for row in rows if "left_out" in row] == ["SAM of pytorch_optimizer"]
    assert [row["way"] for row in rows if "ratio" in row] == list(device_steps.WAYS)[:-1]
    monkeypatch.undo()
    importlib.reload(benchmark)


def test_the_picture_of_a_device(tmp_path: Path, drawn: list[Any]) -> None:
    file, rows = tmp_path / "rows.jsonl", [{"machine": {"device": "a GPU", "torch": "2"}}]
    rows += [{"part": "ceilings", "ceiling": "bf16", "tflops": 700.0}]
    for mode, ms in (("eager", 8.0), ("captured", 2.0)):
        for way, ratio in (("SGD", 1.0), ("AMP", 2.1)):
            case = {"part": f"step: {mode}", "batch": 50, "precision": "bf16", "mode": mode, "way": way}
            rows.append({**case, "ratio": ratio, "ms": ms * ratio, "tflops": 100.0 / ms})
    file.write_text("\n".join(map(json.dumps, rows)))
    device.main(["--rows", str(file), "--draw", str(tmp_path / "device.png")])
    (figure,) = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == list(device_picture.PANELS.values())
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "batch 50, bf16, eager",
        "batch 50, bf16, captured",
    ]
    assert sorted(figure.axes[0].lines[1].get_xdata()) == pytest.approx([4.2, 16.8])
