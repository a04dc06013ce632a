"""What recipes/reproduce.py says of inputs that cannot be meant: one line, before any cell runs."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import reproduce
import yaml
from endings import error_of
from guides.page import run_script
from reproduction import records
from reproduction.cells import Cell, Selection
from reproduction.scale import read_scale
from reproduction.sweep import Sweep
from tiny_scale import SAMPLE, TINY, run_of, written

TUNE = ["--tune", "--list"]
BAD: dict[str, Any] = {
    **{"none": None, "empty": "", "text": "abc", "number": 3, "fraction": 1.5, "nan": math.nan, "yes": True},
    **{"list": [1], "no list": [], "nested": [[1]], "mapping": {"a": 1}, "no mapping": {}},
}


def refusal(*arguments: object) -> str:
    return error_of(lambda: run_script(lambda: reproduce.main([str(a) for a in arguments])))


@pytest.fixture(autouse=True)
def _no_cell_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a cell runs"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("key", TINY)
def test_a_scale_has_values_of_the_right_type(key: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    fine = {"seeds": ["list"], "launch": ["no list"]}.get(key, [])
    for name, value in BAD.items():
        path.write_text(yaml.safe_dump({**TINY, key: value}))
        if name not in fine:
            said = refusal("--scale", path, *TUNE)
            assert said.startswith(f"error: {path}") or (key, name) == ("tuning", "none"), (name, said)
            assert key in said or key == "tuning" or (key, name) == ("methods", "none"), (name, said)


@pytest.mark.parametrize("key", ["like", "models", "datasets", "options", "tuning", "path", "nosuch"])
def test_so_has_one_that_is_like_another(key: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    for name, value in BAD.items():
        path.write_text(yaml.safe_dump({"like": "cpu", key: value}))
        if (key, name) not in (("options", "no mapping"), ("tuning", "none")):
            said = refusal("--scale", path, *TUNE, "--methods", "erm")
            assert said.startswith(f"error: {path}: ") or (key, name) == ("options", "mapping"), (name, said)


@pytest.mark.parametrize("key", TINY["tuning"])
def test_so_has_its_tuning(key: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    for name, value in BAD.items():
        path.write_text(yaml.safe_dump({**TINY, "tuning": {**TINY["tuning"], key: value}}))
        if key == "trials" or name != "number":
            assert key in refusal("--scale", path, *TUNE), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a scale names augmentations"),
        ("a: [", "is not plain YAML: while parsing"),
        ("\0", "is not plain YAML: unacceptable character"),
        ("a: &x [1]\nb: *x\n", r"\*x in line 2 refers to &x"),
        ("!!python/object:os.x {}", "could not determine a constructor"),
        ("[" * 1500, "recursion"),
        ("seeds: [1]\nseeds: [2]\n", "'seeds' stands in line 1 and again in line 2"),
        (b"caf\xe9: 1", "can't decode"),
        (yaml.safe_dump({**TINY, "more": 1}), "a scale names"),
        (yaml.safe_dump({**TINY, "seeds": [1, 1]}), "seeds: 1 is given twice"),
        (yaml.safe_dump({**TINY, "options": {**TINY["options"], "seed": 3}}), "seed differ from cell to cell"),
        (yaml.safe_dump({**TINY, "options": {**TINY["options"], "output-dir": "x"}}), "output_dir differ from cell"),
        (yaml.safe_dump({**TINY, "options": {**TINY["options"], "lr": 3}}), "no option '--lr', did you mean --learn"),
        (yaml.safe_dump({**TINY, "options": {"num_train_epochs": "two"}}), "num_train_epochs, a number, got 'two'"),
        (yaml.safe_dump({**TINY, "launch": ["--num_processes"]}), "launch: --num_processes: expected one argument"),
        (yaml.safe_dump({**TINY, "launch": ["--num-processes=0"]}), "--num_processes: must be at least 1, got 0"),
    ],
)
def test_a_damaged_scale_is_named(text: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    assert re.search(said, refusal("--scale", path, *TUNE))


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "abc", "a: [", "preactresnet18:", "preactresnet18: 1", "preactresnet18: {none: [1]}"),
        *("preactresnet18: {none: {cifar10_sample: {erm: x}}}", "preactresnet18: {none: {cifar10_sample: {erm: {}}}}"),
        "preactresnet18: {none: {cifar10_sample: {erm: {values: [1]}}}}",
    ],
)
def test_a_damaged_file_of_chosen_values_is_named(text: str, tmp_path: Path) -> None:
    scale = written(tmp_path)
    scale.chosen_path.write_text(text)
    for what in ("--list", "--choose"):
        said = refusal("--scale", scale.path, what, "--methods", "erm")
        assert said.startswith(f"error: {scale.chosen_path}")


def test_a_value_that_train_py_refuses_is_told_with_its_cell(tmp_path: Path) -> None:
    scale = written(tmp_path)
    scale.chosen_path.write_text("preactresnet18: {none: {cifar10_sample: {erm: {values: {learning_rate: fast}}}}}")
    said = refusal("--scale", scale.path, "--methods", "erm")
    assert "erm (learning_rate fast), cifar10_sample preactresnet18 none, seed 1: --learning_rate: invalid" in said


def test_an_empty_file_of_chosen_values_has_none(tmp_path: Path) -> None:
    scale = written(tmp_path)
    scale.chosen_path.write_text("")
    assert read_scale(str(scale.path)).chosen == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *((["--jobs", n], "--jobs: ") for n in ("", "0", "-1", "x", "1.5", "nan", "1025")),
        (["--at_once", "0"], "--jobs: must be at least 1 and at most 1024, got 0"),
        *((["--minutes", n], "--minutes: ") for n in ("", "0", "-1", "x", "nan", "inf")),
        *((["--task", n, "--list"], "--task") for n in ("", "-1", "6", "x")),
        *((["--seeds", n], "--seeds: ") for n in ("-1", "x", "99999999999")),
        *((["--plan", "--peak_tflops", n], "--peak_tflops: must be above 0") for n in ("0", "-1", "nan", "inf")),
        *((["--plan", "--utilisation", n], "--utilisation: must be above 0") for n in ("0", "-1", "1.1", "nan")),
        *(
            ([o, ""], f"{o}: '' is no path")
            for o in ("--output_dir", "--ledger", "--page", "--benchmark", "--data_root")
        ),
        *(([o, "'"], f'{o}: "\'": No closing quotation') for o in ("--train_args", "--launch_args", "--sbatch_args")),
        (["--launch_args=--num_processes", "--list"], "launch: --num_processes: expected one argument"),
        (["--train_args=--seed 3"], "--train_args: seed differ from cell to cell"),
        (["--train_args=--nosuch 1"], "erm (learning_rate 0.1), cifar10_sample preactresnet18 none, seed 0: no option"),
        (["--models", "vgg17"], "--models vgg17: the scale tiny has no such"),
        (["--augment", "cutout"], "--augment cutout: the scale tiny has no such"),
        (["--methods", "erm", "erm"], "--methods: erm is given twice"),
        (["--seeds", "1", "1"], "--seeds: 1 is given twice"),
        (["--job", "2"], "no option '--job', did you mean '--jobs'"),
        (["twice"], "unexpected 'twice'"),
        (["--data_root", "nowhere"], "--data_root nowhere is no folder"),
        (["--data_root", "file"], "--data_root file is no folder"),
        (["--output_dir", "file"], "cannot write to 'file'"),
        (["--output_dir", "file/x"], "cannot write to 'file/x'"),
        (["--ledger", "folder"], "'folder' is a folder, not a file"),
        (["--ledger", "file/x"], "ledger 'file/x' cannot be written"),
        (["--slurm", "--output_dir", "file"], "cannot write to 'file'"),
    ],
)
def test_options_are_checked_before_a_cell_runs(arguments: list[str], said: str, tmp_path: Path) -> None:
    scale = written(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    what = ["--methods", "erm"] if "--plan" in arguments else ["--tune"]
    assert said in refusal("--scale", scale.path, *what, *arguments)


CELLS = [
    Cell(SAMPLE, method, seed, values)
    for method, values in (("erm", {"learning_rate": 0.1}), ("amp", {"amp_epsilon": 0.2, "amp_inner_lr": 0.3}))
    for seed in (1, 2)
]
FIGURES = {"eval_nll": 1.0, "eval_ece": 0.1, "best_eval_error": 40.0, "passes": 2.0}
_GONE = object()


def change(where: str, name: str, value: object) -> Callable[[dict[str, Any]], None]:
    def changed(run: dict[str, Any]) -> None:
        part = run[where] if where else run
        part.pop(name, None) if value is _GONE else part.update({name: value})

    return changed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A scale, and runs and trials of it."""
    scale = written(tmp_path_factory.mktemp("scale"))
    trials = Selection(scale).trials()
    return scale.path, [run_of(cell, scale, **FIGURES) for cell in [*CELLS, *trials]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        *((change("", "settings", value), "settings is") for value in ([], "a", 3, None)),
        *((change("", "metrics", value), "metrics is") for value in ([], "a", 3, None)),
        *((change("", "versions", value), "versions is") for value in ([], "a", 3, None)),
        *((change("settings", "seed", value), "settings.seed is") for value in (_GONE, "1", [1], 1.5, True, None)),
        *((change("settings", name, 3), f"settings.{name} is 3") for name in ("dataset", "model", "optim")),
        *((change("settings", "model_kwargs", value), "model_kwargs") for value in (3, {"a": 1}, "[1]", "{", "3")),
        *((change("metrics", "eval_error", value), "metrics.eval_error is") for value in (_GONE, "1", None, [1], True)),
        *((change("metrics", "passes", value), "metrics.passes is") for value in ("1", None, {}, True)),
        (change("metrics", "passes", 10**400), "metrics.passes has 401 digits"),
    ],
)
@pytest.mark.parametrize("what", ["--table", "--choose"])
def test_a_foreign_line_of_a_ledger_is_named(
    changed: Callable[[dict[str, Any]], None], said: str, what: str, runs: tuple[Path, list[dict[str, Any]]]
) -> None:
    scale, known = runs
    run = deepcopy(known[-1])
    changed(run)
    Path("ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*known[:2], run]))
    found = refusal("--scale", scale, "--ledger", "ledger.jsonl", what)
    assert found.startswith("error: ledger.jsonl, line 3, is not a run of train.py: ")
    assert said in found
    assert found.endswith("; delete the line, or name another ledger")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "line 1, is not a run of train.py: it is [1]"),
        ("3", "it is 3"),
        ("null", "it is null"),
        ("[" * 100_000, "recursion"),
        ("\n\n{\n", "line 3,"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_damaged_ledger_is_named(text: str | bytes, said: str, runs: tuple[Path, list[dict[str, Any]]]) -> None:
    Path("ledger.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
    assert said in refusal("--scale", runs[0], "--ledger", "ledger.jsonl", "--table")


@pytest.mark.parametrize(
    ("name", "value"),
    [("eval_error", math.nan), ("eval_nll", math.inf), ("eval_nll", _GONE), ("passes", _GONE), ("eval_ece", math.nan)],
)
def test_a_run_that_diverged_loses_nothing_but_its_own_figures(
    name: str, value: object, runs: tuple[Path, list[dict[str, Any]]]
) -> None:
    pytest.importorskip("scipy", reason="intervals")
    path, known = runs
    ledger = deepcopy(known)
    change("metrics", name, value)(ledger[1])  # ERM's second seed
    change("metrics", name, value)(ledger[len(CELLS)])  # and its first trial
    scale = read_scale(str(path))
    text = reproduce.markdown(reproduce.rows_of(Selection(scale), ledger), with_paper=False)
    assert "| ERM (lr 0.1, decay 0.0001) | 2 |" in text
    assert "| AMP (epsilon 0.2, inner_lr 0.3) | 2 | 50.00 ± 0.00 | 40.00 ± 0.00 | 1.000 ± 0.000 |" in text
    assert reproduce.choose(scale, Selection(scale).trials(), ledger).table.count("chosen") == 3


@pytest.mark.parametrize(
    "text", ["x", "[1]", "{}\n3", '{"section": "Ascent policies"}', '{"section": "Ascent policies", "ratio": "x"}']
)
def test_a_damaged_benchmark_is_named(text: str, runs: tuple[Path, list[dict[str, Any]]]) -> None:
    Path("ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs[1]))
    Path("rows.jsonl").write_text(text)
    said = refusal("--scale", runs[0], "--ledger", "ledger.jsonl", "--trade_off", "--benchmark", "rows.jsonl")
    assert said.startswith("error: rows.jsonl is not what benchmark.py writes")


def test_a_plan_names_the_data_sets_that_it_knows(tmp_path: Path) -> None:
    scale = written(tmp_path)
    scale.chosen_path.write_text("preactresnet18: {none: {cifar10_sample: {erm: {values: {}}}}}")
    assert "--plan knows the paper's data sets" in refusal("--scale", scale.path, "--plan", "--methods", "erm")


def test_a_table_is_printed_before_its_page_fails(
    runs: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("scipy", reason="intervals")
    Path("ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs[1]))
    said = refusal("--scale", runs[0], "--ledger", "ledger.jsonl", "--table", "--page", tmp_path)
    assert said == f"error: {tmp_path}: Is a directory"
    assert "| ERM (" in capsys.readouterr().out


def test_values_chosen_twice_are_written_out(tmp_path: Path) -> None:
    scale = written(tmp_path, datasets=["cifar10_sample", "cifar100"])
    trials = Selection(scale, methods=["erm"]).trials()
    choice = reproduce.choose(scale, trials, [run_of(cell, scale, eval_nll=1.0) for cell in trials])
    scale.chosen_path.write_text(choice.file)
    assert len(read_scale(str(scale.path)).chosen) == 2


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interruption_ends_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a cell runs
    scale = written(tmp_path)
    monkeypatch.setattr(Sweep, "command", lambda *_: ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    sweep = Sweep(scale, tmp_path / "ledger.jsonl", tmp_path / "runs")
    started: list[Any] = []
    start = Sweep._start

    def begin(*arguments: Any) -> Any:
        started.append(start(*arguments))
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
        return started[-1]

    monkeypatch.setattr(Sweep, "_start", begin)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep.run([CELLS[0]])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert started[0].process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].process.pid, 0)
    assert records.read(sweep.ledger) == []
