"""What the scripts beside train.py and reproduce.py say of inputs that cannot be meant, and what a failure leaves."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmark
import epsilon_ladder
import epsilon_sweep
import make_sample
import pytest
from benchmarks import device
from benchmarks.rows import Row, counted
from endings import error_of
from guides.page import run_script
from repository import ROOT
from tiny_scale import run_of

from amp_plugin.command import run_command

Main = Callable[[list[str]], object]


def refusal(main: Main, *arguments: object) -> str:
    return error_of(lambda: run_command(lambda: main([str(a) for a in arguments]), (ValueError,)))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reproduction.sweep.Sweep.run", lambda *_: pytest.fail("a cell runs"))
    Path("file").write_text("x")
    Path("folder").mkdir()


PATHS = [
    *((epsilon_ladder.main, option) for option in ("--data_root", "--output_dir", "--ledger", "--page")),
    *((epsilon_sweep.main, option) for option in ("--ledger", "--page")),
    *((device.main, option) for option in ("--rows", "--draw", "--data_root")),
    (benchmark.main, "--output_dir"),
]


@pytest.mark.parametrize(("main", "option"), PATHS)
@pytest.mark.parametrize("value", ["", "\0"])
def test_a_path_is_one(main: Main, option: str, value: str) -> None:
    assert refusal(main, option, value) == f"error: {option}: {value!r} is no path".replace("\0", "\\x00")


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (epsilon_ladder.main, ["--rungs", "width 9"], "--rungs width 9: there are base, width 8"),
        (epsilon_ladder.main, ["--rung", "base"], "no option '--rung', did you mean '--rungs'"),
        (epsilon_ladder.main, ["--data_root", "nowhere"], "--data_root nowhere is no folder"),
        (epsilon_ladder.main, ["--output_dir", "file"], "cannot write to 'file'"),
        (epsilon_ladder.main, ["--ledger", "folder"], "ledger 'folder' is a folder"),
        (epsilon_ladder.main, ["--ledger", "file"], "file, line 1, is not a run of train.py"),
        (epsilon_ladder.main, ["--table", "--ledger", "folder"], "'folder' is a folder, not a file"),
        (epsilon_ladder.main, ["--table", "--ledger", "nowhere"], "nowhere has no runs of the ladder"),
        (epsilon_sweep.main, ["--ledger", "folder"], "'folder' is a folder, not a file"),
        (epsilon_sweep.main, ["--ledger", "nowhere"], "'nowhere' is not there"),
        (epsilon_sweep.main, ["--ledger", "file"], "file, line 1, is not a run of train.py"),
        (epsilon_sweep.main, ["--datasets", "x"], "no option '--datasets', did you mean '--dataset'"),
        *((benchmark.main, ["--seconds", n], "--seconds: ") for n in ("", "-1", "nan", "inf", "x")),
        *((benchmark.main, ["--threads", n], "--threads: ") for n in ("", "0", "-1", "5000", "1.5")),
        *((benchmark.main, ["--batch_sizes", n], "--batch_sizes: ") for n in ("0", "-1", "x", "9999999")),
        (benchmark.main, ["--batch_sizes", "8", "8"], "--batch_sizes: 8 is given twice"),
        (benchmark.main, ["--only", "steps"], "--only: invalid choice: 'steps'"),
        (benchmark.main, ["--only"], "--only: expected at least one argument"),
        (benchmark.main, ["--sizes", "1M"], "--sizes: invalid choice: '1M'"),
        (benchmark.main, ["--output_dir", "file"], "cannot write to 'file'"),
        (benchmark.main, ["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        *((device.main, ["--seconds", n], "--seconds: ") for n in ("", "-1", "nan", "x")),
        *((device.main, ["--batch_sizes", n], "--batch_sizes: ") for n in ("0", "-1", "x")),
        *((device.main, ["--recipe_steps", n], "--recipe_steps: ") for n in ("0", "7", "x")),
        (device.main, ["--device", "cpu", "--data_root", "nowhere"], "--data_root nowhere is no folder"),
        (device.main, ["--device", "cpu", "--rows", "folder"], "folder: Is a directory"),
        (device.main, ["--device", "cpu", "--rows", "file/x"], "file"),
        (device.main, ["--draw", "a.png", "--rows", "nowhere"], "--rows nowhere has no steps to draw"),
        (device.main, ["--draw", "a.png", "--rows", "file"], "--rows file has no steps to draw"),
        (device.main, ["--draw", "a.png", "--rows", "folder"], "folder: Is a directory"),
    ],
)
def test_options_are_checked_first(main: Main, arguments: list[str], said: str) -> None:
    assert said in refusal(main, *arguments)


@pytest.mark.parametrize(
    "row", [{}, {"batch": 1}, {"batch": 1, "precision": "bf16", "mode": "eager"}, {"machine": 3}, {"way": ["SGD"]}]
)
def test_rows_that_cannot_be_drawn_are_named(row: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    Path("rows.jsonl").write_text(f"[1]\n3\n{json.dumps({'part': 'step', 'ratio': 1.0, **row})}\n")
    said = refusal(device.main, "--draw", "a.png", "--rows", "rows.jsonl")
    assert said.startswith("error: rows.jsonl is not what benchmark.py --device writes: KeyError(")


def test_parts_of_a_device_that_fail_are_in_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[dict[str, Any]]:
        raise RuntimeError
        yield {}

    good = device.Part("good", 0, lambda: [{"ratio": 1.0}])
    monkeypatch.setattr(device, "parts", lambda *_: [device.Part("bad", 0, fail), good])  # type: ignore[arg-type]
    assert refusal(benchmark.main, "--device", "cpu") == "error: failed: bad; the other parts are measured"
    assert [row["part"] for row in device.read(Path("runs/benchmark/device.jsonl"))[1:]] == ["bad", "good"]


def row_of(subject: str) -> Row:
    return counted(subject, "case", "AMP", "SGD", 2, 1, "calls")


def subjects(**instead: Callable[[], Row]) -> Callable[[str, Any], Iterator[list[Row]]]:
    """Subjects that measure nothing, and some that do something else."""

    def measure(subject: str, args: Any) -> Iterator[list[Row]]:
        yield [instead[subject]() if subject in instead else row_of(subject)]

    return measure


def fail(*_: object) -> Any:
    raise RuntimeError("broken")


def interrupt() -> Any:
    raise KeyboardInterrupt


def measured(folder: Path) -> list[str]:
    return [json.loads(line).get("section") for line in (folder / "benchmark.jsonl").read_text().splitlines()][1:]


@pytest.mark.parametrize("broken", ["subject", "table", "picture"])
def test_what_fails_in_a_benchmark_leaves_the_rest(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "measure", subjects(**({"step": fail} if broken == "subject" else {})))

    def draw(rows: Any, folder: Path, caption: str) -> list[Path]:
        (folder / "benchmark-step.png").write_text("drawn")
        return [folder / "benchmark-step.png"]

    monkeypatch.setattr(benchmark, "draw", fail if broken == "picture" else draw)
    if broken == "table":
        Path("out/benchmark.md").mkdir(parents=True)
    said = {
        "subject": "error: the subject step failed: RuntimeError: broken",
        "table": "error: could not save benchmark.md in 'out': Is a directory",
        "picture": "error: the pictures failed: RuntimeError: broken",
    }
    with pytest.raises(SystemExit) as left:
        run_command(lambda: benchmark.main(["--output_dir", "out"]), (ValueError,))
    first, last = str(left.value.code).splitlines()
    assert first.startswith(said[broken])
    assert last == "error: the other results are in out"
    assert measured(Path("out")) == [s for s in benchmark.SUBJECTS if (broken, s) != ("subject", "step")]
    assert "| case | AMP | SGD | 2.000 |" in capsys.readouterr().out
    assert Path("out/benchmark.md").is_dir() or "### startup" in Path("out/benchmark.md").read_text()
    assert Path("out/benchmark-step.png").exists() == (broken != "picture")


def test_an_interrupted_benchmark_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "draw", lambda *_: [])
    for stopped, told, left_there in (
        ("counts", "interrupted", None),
        ("host", "interrupted: what was measured is in out/benchmark.jsonl", ["counts", "step", "ascents"]),
        ("counts", "interrupted", ["counts", "step", "ascents"]),  # the rows of before
    ):
        monkeypatch.setattr(benchmark, "measure", subjects(**{stopped: interrupt}))
        with pytest.raises(SystemExit) as left:
            run_command(lambda: benchmark.main(["--output_dir", "out"]), (ValueError,))
        assert left.value.code == 130
        assert capsys.readouterr().err.strip() == told
        assert left_there is None or measured(Path("out")) == left_there


@pytest.mark.parametrize("lacking", ["eval_nll", "loss"])
def test_a_rung_whose_run_does_not_tell_all_is_shown(lacking: str) -> None:
    scale, cells = epsilon_ladder.rungs()["base"]
    runs = [run_of(cell, scale, eval_nll=1.0, loss=0.5) for cell in cells.values()]
    del runs[0]["metrics"][lacking]
    Path("ledger.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (erm, *amp) = epsilon_ladder.table(epsilon_ladder.found_in(Path("ledger.jsonl"))).splitlines()[2:]
    assert erm.startswith("| base | ERM | - | ")
    assert "inf" in erm
    assert not any("inf" in row for row in amp)


@pytest.mark.parametrize(
    "changed", [{"amp_epsilon": None}, {"amp_epsilon": "much"}, {"amp_inner_lr": [1]}, {"amp_inner_lr": ...}]
)
def test_a_run_of_the_sweep_tells_its_ball(changed: dict[str, Any]) -> None:
    settings = {"dataset": "cifar10_sample", "validation_images": 5, "optim": "amp", "seed": 1}
    settings |= {"amp_epsilon": 0.1, "amp_inner_lr": 1.0} | changed
    settings = {name: value for name, value in settings.items() if value is not ...}
    Path("ledger.jsonl").write_text(json.dumps({"settings": settings, "metrics": {"eval_error": 1.0}}))
    said = refusal(epsilon_sweep.main, "--ledger", "ledger.jsonl")
    assert said.startswith("error: ledger.jsonl: a run with AMP does not tell its epsilon and inner_lr")


def test_a_sweep_without_a_measure_is_drawn() -> None:
    pytest.importorskip("matplotlib", reason="draws")
    settings = {"dataset": "cifar10_sample", "validation_images": 5, "amp_epsilon": 0.1, "amp_inner_lr": 1.0}
    runs = [
        {"settings": {**settings, "optim": optim, "seed": 1, "amp_inner_lr": lr}, "metrics": {"eval_error": 1.0}}
        for optim, lr in (("sgd", 0.0), ("amp", 0.1), ("amp", 0.3), ("amp", 1.0))
    ]
    Path("ledger.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    sweep = epsilon_sweep.read(Path("ledger.jsonl"))
    assert "| 0.1 | 0.3 | 1 | - | 1.0 |" in epsilon_sweep.table(sweep)
    epsilon_sweep.draw(sweep, Path("picture.png"))
    assert Path("picture.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--output", ""], "--output: '' is no path"),
        (["--output", "file"], "cannot write to 'file'"),
        (["--data_root", ""], "--data_root: '' is no path"),
    ],
)
def test_the_sample_is_drawn_where_it_can_be_written(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_sample, "load_images", lambda *_, **__: pytest.fail("the data is read"))
    monkeypatch.setattr(sys, "argv", ["make_sample.py", *arguments])
    assert said in error_of(lambda: run_script(make_sample.main))


@pytest.mark.parametrize("script", ["make_picture.py", "epsilon_sweep.py", "benchmark.py", "reproduce.py"])
def test_a_script_ends_a_mistake_in_one_line(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--nosuch"])
    said = error_of(lambda: runpy.run_path(str(ROOT / "recipes" / script), run_name="__main__"))
    assert said == "error: no option '--nosuch'; --help lists them"
