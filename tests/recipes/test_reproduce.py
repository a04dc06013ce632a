"""recipes/reproduce.py: which cells there are, what the ledger says of them, and what runs them."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import reproduce
import timm
import torch
from benchmarks.rows import timed
from filelock import FileLock
from guides.page import read_part
from PIL import Image
from repository import ROOT
from reproduction import beside, price, records, trade_off
from reproduction.cells import Cell, Selection
from reproduction.choose import choose
from reproduction.comparison import Row, paired, rows_of
from reproduction.published import Setting, methods, published
from reproduction.scale import Scale, read_scale
from reproduction.table import markdown
from tiny_scale import SAMPLE, TINY, chosen, run_of, written
from torch import nn

from amp_plugin.data.corruptions import CORRUPTIONS
from amp_plugin.report import append_to_ledger
from amp_plugin.report.style import shows
from amp_plugin.train.options import parse
from amp_plugin.train.settings import settings_of

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("finetune_"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_cells_of_the_paper(recipe: Path) -> None:
    paper = read_scale("paper")
    ours = records.comparable(settings_of(*parse([str(recipe)])))
    cells = Selection(paper, methods=["amp"], seeds=[ours["seed"]]).runs()
    (cell,) = [c for c in cells if records.same(ours, records.expected(c, paper))]
    figure = published().results[cell.setting]["amp"]
    assert f"published test error {figure.mean:.2f} +- {figure.std:.3f} %" in recipe.read_text()


def test_every_network_and_method_is_one_that_the_main_job_has() -> None:
    for name, model in published().models.items():
        kwargs = {model.dropout: 0.25}
        drops = [m.p for m in timm.create_model(model.architecture, **kwargs).modules() if isinstance(m, nn.Dropout)]
        assert 0.25 in drops, name
    scale = replace(read_scale("cpu"), chosen={})
    setting = Setting("preactresnet18", "none", "cifar10")
    seen = [records.expected(Cell(setting, method, 1), scale) for method in methods()]
    assert all(not records.same(a, b) for i, a in enumerate(seen) for b in seen[:i]), "each is a run of its own"


def test_the_published_tables_are_whole() -> None:
    cells = Selection(read_scale("paper"), seeds=[1]).runs()
    assert len(cells) == 6 * 8 + 18 * 2, "the methods of six columns; ERM and AMP of eighteen"
    options = {c.setting: c.options(read_scale("paper")) for c in cells if c.method == "amp"}
    wide = options[Setting("wide_resnet28_10", "cutout", "svhn")]
    assert (wide["amp_epsilon"], wide["amp_inner_lr"]) == (0.3, 0.5)


def test_runs_go_seed_by_seed_with_erm_and_amp_first(tmp_path: Path) -> None:
    scale = chosen(written(tmp_path), erm={}, amp={"amp_epsilon": 0.1}, dropout={"dropout": 0.3})
    cells = Selection(scale).runs()
    assert [(c.seed, c.method) for c in cells] == [(s, m) for s in (1, 2) for m in ("erm", "amp", "dropout")]
    assert cells[1].options(scale)["amp_epsilon"] == 0.1
    assert cells[2].options(scale)["model_kwargs"]["conv_drop_rate"] == 0.3
    assert cells[0].options(scale)["model_kwargs"] == TINY["models"]["preactresnet18"]
    twice = Cell(SAMPLE, "erm_2x", 1).options(scale)
    assert (twice["num_train_epochs"], twice["optim"]) == (4, "sgd")


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        ({}, "has no hyper-parameters for amp on cifar10_sample, dropout on"),
        ({"methods": ["emr"]}, "--methods emr: unknown; there are erm, amp"),
        ({"models": ["vgg16"]}, "--models vgg16: the scale tiny has no such; it has preactresnet18"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, selected: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(chosen(written(tmp_path), erm={}), **selected).runs()


def test_a_scale_may_be_like_another(tmp_path: Path) -> None:
    path, cpu = tmp_path / "mine.yaml", read_scale("cpu")
    ((model, arguments),) = cpu.models.items()
    path.write_text(
        f"like: cpu\ndatasets: [cifar10]\nmodels: {{{model}: {{width: 32}}}}\n"
        "options: {learning_rate: 0.4, amp_inner_lr: 0.7}\n"
    )
    mine = read_scale(str(path))
    assert mine.name == "mine"
    assert mine.models == {model: {**arguments, "width": 32}}
    assert mine.options == {**cpu.options, "learning_rate": 0.4, "amp_inner_lr": 0.7}
    (erm, amp) = Selection(mine, methods=["erm", "amp"], seeds=[1]).runs()
    assert erm.options(mine)["learning_rate"] == 0.4, "not what was chosen for the other"
    (theirs,) = Selection(cpu, datasets=["cifar10"], methods=["amp"], seeds=[1]).runs()
    assert amp.values == {"amp_epsilon": theirs.values["amp_epsilon"]}
    mine.chosen_path.write_text(f"{model}: {{none: {{cifar10: {{amp: {{values: {{amp_epsilon: 9.0}}}}}}}}}}\n")
    (erm, amp) = Selection(read_scale(str(path)), methods=["erm", "amp"], seeds=[1]).runs()
    assert (erm.values, amp.values) == ({}, {"amp_epsilon": 9.0})
    for bad in ("like: mine", "like: cpu_batch100", "like: [cpu]", "like: cpu\noptions: 3", "like: cpu\nmodels: [x]"):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"mine.yaml: (like names a scale|(options|models) must be)"):
            read_scale(str(path))


def test_a_method_may_take_what_was_chosen_for_two(tmp_path: Path) -> None:
    scale = chosen(written(tmp_path), erm={}, amp={"amp_epsilon": 0.1}, dropout={"dropout": 0.3})
    (both,) = Selection(scale, methods=["amp_dropout"], seeds=[1]).runs()
    assert both.values == {"amp_epsilon": 0.1, "dropout": 0.3}
    options = both.options(scale)
    assert (options["optim"], options["amp_epsilon"], options["model_kwargs"]["conv_drop_rate"]) == ("amp", 0.1, 0.3)
    with pytest.raises(ValueError, match="no hyper-parameters for amp_mixup on"):
        Selection(scale, methods=["amp_mixup"], seeds=[1]).runs()


def test_a_scale_must_be_fair_and_whole(tmp_path: Path) -> None:
    trials = {**TINY["tuning"]["trials"], "amp": [{}]}
    with pytest.raises(ValueError, match="same number of trials"):
        written(tmp_path, tuning={**TINY["tuning"], "trials": trials})
    with pytest.raises(ValueError, match="seed of the trials, 0, is among those reported"):
        written(tmp_path, seeds=[0, 1])
    with pytest.raises(ValueError, match="carried names data sets of the scale"):
        written(tmp_path, tuning={**TINY["tuning"], "carried": {"cifar10_sample": "cifar11"}})
    with pytest.raises(ValueError, match="a scale names"):
        written(tmp_path, models=None)


def test_a_run_is_found_by_all_that_decides_its_outcome(tmp_path: Path) -> None:
    scale = written(tmp_path)
    cell = Cell(SAMPLE, "erm", 1, {"learning_rate": 0.1})
    run = run_of(cell, scale)
    assert records.find(cell, scale, [run]) is run
    assert records.find(replace(cell, trial=True), scale, [run]) is None, "a trial is no run, and the other way round"
    assert records.find(cell, scale, [run_of(replace(cell, trial=True), scale)]) is None
    assert records.find(replace(cell, seed=2), scale, [run]) is None
    assert records.find(replace(cell, method="amp"), scale, [run]) is None
    assert records.find(replace(cell, values={"learning_rate": 0.2}), scale, [run]) is None
    more_images = replace(scale, options={**scale.options, "train_images": 80})
    assert records.find(cell, more_images, [run]) is None
    assert records.find(cell, replace(scale, train_args=["--label_smoothing_factor", "0.1"]), [run]) is None
    elsewhere = {**run["settings"], "cpu_threads": 8, "eval_strategy": "no", "save_strategy": "no"}
    assert records.find(cell, scale, [{**run, "settings": elsewhere}]) is not None
    older = {k: v for k, v in run["settings"].items() if k not in ("channels_last", "lr_scheduler_type")}
    assert records.find(cell, scale, [{**run, "settings": older}]) is not None, "it had the default"
    two = {**run["settings"], "world_size": 2}
    assert records.find(cell, scale, [{**run, "settings": two}]) is None
    assert records.find(cell, replace(scale, launch=["--num_processes", "2"]), [{**run, "settings": two}]) is not None


def test_the_best_trial_on_held_out_images_is_chosen(tmp_path: Path) -> None:
    scale = written(tmp_path)
    trials = Selection(scale).trials()
    assert [c.method for c in trials] == ["erm", "erm", "amp", "amp", "dropout", "dropout"]
    scores = [(40.0, 2.0), (30.0, 2.0), (20.0, 2.0), (20.0, 1.0)]
    ledger = [run_of(c, scale, eval_error=e, eval_nll=n) for c, (e, n) in zip(trials, scores, strict=False)]
    tested = replace(trials[0], trial=False)
    ledger.append(run_of(tested, scale, eval_error=1.0, eval_nll=0.1))  # on the test images: must not be seen
    choice = choose(scale, trials, ledger)
    assert choice.runs == 4
    assert choice.table.count("| chosen |") == 2
    assert "| dropout | rate 0.2 | - | - | to do |" in choice.table
    assert "| amp | epsilon 0.1, inner_lr 1 | 20.00 | 1.000 | chosen |" in choice.table
    scale.chosen_path.write_text(choice.file)
    now = read_scale(str(scale.path))
    assert now.chosen == {SAMPLE: {"erm": {"weight_decay": 0.0005}, "amp": trials[3].values}}
    (cell,) = Selection(now, methods=["amp"], seeds=[1]).runs()
    assert cell.options(now)["amp_inner_lr"] == 1.0
    (cell,) = Selection(now, methods=["erm_2x"], seeds=[1]).runs()
    assert cell.values == {"weight_decay": 0.0005}, "tuned as ERM"


def test_a_data_set_may_take_the_values_chosen_on_another(tmp_path: Path) -> None:
    carried = {**TINY["tuning"], "carried": {"cifar100": "cifar10_sample"}}
    scale = written(tmp_path, datasets=["cifar10_sample", "cifar100"], tuning=carried)
    assert {cell.setting for cell in Selection(scale).trials()} == {SAMPLE}
    scale = chosen(scale, erm={"learning_rate": 0.3})
    cells = Selection(scale, methods=["erm"], seeds=[1]).runs()
    assert [(cell.setting.dataset, cell.values) for cell in cells] == [
        ("cifar10_sample", {"learning_rate": 0.3}),
        ("cifar100", {"learning_rate": 0.3}),
    ]


ERRORS = {"erm": [50.0, 52.0, 57.0, 90.0], "amp": [49.0, 50.5, 52.0]}


@pytest.fixture
def tabulated(tmp_path: Path) -> tuple[Scale, list[dict[str, Any]]]:
    """A ledger of three seeds of AMP and four of ERM, and what must not be counted."""
    scale = written(tmp_path)
    values = {"erm": {"learning_rate": 0.1}, "amp": {"amp_epsilon": 0.2, "amp_inner_lr": 0.3}}
    runs = [
        run_of(
            Cell(SAMPLE, method, seed, values[method]),
            scale,
            eval_error=error,
            best_eval_error=error - 1,
            eval_nll=error / 20,
            eval_ece=0.25,
            passes=2.0 if method == "erm" else 4.0,
        )
        for method, errors in ERRORS.items()
        for seed, error in enumerate(errors, 1)
    ]
    trial = run_of(Cell(SAMPLE, "amp", 0, values["amp"], trial=True), scale)
    other = run_of(Cell(SAMPLE, "erm", 1), replace(scale, options={**scale.options, "num_train_epochs": 3}))
    return scale, [trial, *runs, other]


def test_the_table_has_means_and_paired_differences(tabulated: tuple[Scale, list[dict[str, Any]]]) -> None:
    scale, ledger = tabulated
    tables = rows_of(Selection(scale), ledger)
    erm, amp = tables[SAMPLE]
    assert [row.method for row in (erm, amp)] == ["erm", "amp"]
    differences = [1.0, 1.5, 5.0]  # of seeds 1 to 3; ERM's fourth has no partner
    half = 4.302652729911275 * stdev(differences) / 3**0.5  # Student's t, 97.5 %, 2 degrees of freedom
    found = paired(erm, amp, "eval_error")
    assert found == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    text = markdown(tables, with_paper=False)
    spread = f"{mean(ERRORS['erm']):.2f} ± {stdev(ERRORS['erm']):.2f}"
    assert f"| ERM (lr 0.1, decay 0.0001) | 4 | {spread} |" in text
    row = "| AMP (epsilon 0.2, inner_lr 0.3) | 3 | 50.50 ± 1.50 | 49.50 ± 1.50 | 2.525 ± 0.075 | 0.250 ± 0.000 | 4 |"
    assert f"{row} +2.50 [{2.5 - half:+.2f}, {2.5 + half:+.2f}] | +0.125 [" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| ERM ("))
    assert f"| - | - | -2.50 [{-2.5 - half:+.2f}, {-2.5 + half:+.2f}] | -0.125 [" in line, "and against AMP"
    assert "7 runs; commits abc" in text


FIGURES = {  # of three seeds
    "erm": {"error": [60.0, 61.0, 65.0], "nll": [3.0, 3.1, 3.5], "ece": [0.2, 0.25, 0.3]},
    "amp": {"error": [57.0, 59.0, 61.0], "nll": [2.0, 2.2, 2.4], "ece": [0.1, 0.1, 0.1]},
}


def test_tests_on_corrupted_images_stand_beside_the_clean_ones(tmp_path: Path) -> None:
    options = {**TINY["options"], "label_noise": 0.2, "corrupted_test_images": 2000}
    scale, plain = written(tmp_path, options=options), written(tmp_path)
    values = {"erm": {"learning_rate": 0.1}, "amp": {"amp_epsilon": 0.2, "amp_inner_lr": 0.3}}
    ledger = []
    for method, figures in FIGURES.items():
        for seed in (1, 2, 3):
            found = {f"corrupted_{name}": numbers[seed - 1] for name, numbers in figures.items()}
            found |= {f"corrupted_{kind}_error": 10.0 * seed + i for i, kind in enumerate(CORRUPTIONS)}
            clean = {f"eval_{name}": numbers[seed - 1] / 2 for name, numbers in figures.items()}
            cell = Cell(SAMPLE, method, seed, values[method])
            ledger.append(run_of(cell, scale, **found, **clean))
            ledger.append(run_of(cell, plain, **clean))
    tables = rows_of(Selection(scale, seeds=[1, 2, 3]), ledger)
    text = markdown(tables, with_paper=False)
    assert "### cifar10_sample, preactresnet18, augmentation none, label noise 0.2\n" in text
    assert "6 runs; commits abc" in text, "those without noise are of another scale"
    heads, _, erm, amp = text.split("On corrupted test images:\n\n")[1].split("\n\n")[0].splitlines()
    names = [head.strip() for head in heads.strip("| ").split("|")]
    cells = [dict(zip(names, map(str.strip, row.strip("| ").split("|")), strict=True)) for row in (erm, amp)]
    assert cells[0]["seeds"] == "3"
    assert cells[1]["clean error %"] == "29.50 ± 1.00"
    assert cells[1]["corrupted error %"] == "59.00 ± 2.00"
    assert cells[1]["corrupted NLL"] == "2.200 ± 0.200"
    assert cells[0]["corrupted ECE"] == "0.250 ± 0.050"
    t = 4.302652729911275 / 3**0.5  # Student's t, 97.5 %, 2 degrees of freedom
    for name, digits, half in (("error %", 2, t * stdev([3, 2, 4])), ("ECE", 3, t * stdev([0.1, 0.15, 0.2]))):
        middle = {"error %": 3.0, "ECE": 0.15}[name]
        said = f"{middle:+.{digits}f} [{middle - half:+.{digits}f}, {middle + half:+.{digits}f}]"
        assert cells[1][f"ERM minus method: corrupted {name}"] == said
        assert cells[1][f"AMP minus method: corrupted {name}"] == "-"
    assert cells[1]["ERM minus method: clean ECE"].startswith("+0.075 [")
    assert cells[0]["AMP minus method: corrupted NLL"].startswith("-1.000 [")
    assert "| 3 | 20.00 ± 10.00 | 21.00 ± 10.00 | 22.00 ± 10.00 | 23.00 ± 10.00 |\n" in text
    assert "error %, Gaussian noise | error %, Gaussian blur | error %, contrast | error %, JPEG compression |" in text
    assert "on 2,000 of the test images" in text
    clean = markdown(rows_of(Selection(plain, seeds=[1, 2, 3]), ledger), with_paper=False)
    assert not any(word in clean for word in ("orrupted", "label noise"))
    assert clean.startswith("### cifar10_sample, preactresnet18, augmentation none\n")


@pytest.mark.parametrize(("name", "noise"), [("cpu_noise20", 0.2), ("cpu_noise40", 0.4), ("cpu_corrupted", None)])
def test_the_scales_of_noise_differ_from_the_cpu_s_in_noise_and_arithmetic(name: str, noise: float | None) -> None:
    scale, cpu = read_scale(name), read_scale("cpu")
    cells = Selection(scale).runs()
    assert {cell.method for cell in cells} == {"erm", "sam", "amp", "amp_split4", "dropout", "mixup"}
    assert {cell.seed for cell in cells} == {1, 2, 3}
    theirs = {(c.method, c.seed): c for c in Selection(cpu, datasets=["cifar10"]).runs()}
    for cell in cells:
        ours, plain = records.expected(cell, scale), records.expected(theirs[cell.method, cell.seed], cpu)
        differ = {n: ours.get(n) for n in ours.keys() | plain.keys() if ours.get(n) != plain.get(n)}
        assert differ == {"bf16": True, "corrupted_test_images": 2000, **({"label_noise": noise} if noise else {})}


def test_other_hyper_parameters_are_another_row(tabulated: tuple[Scale, list[dict[str, Any]]]) -> None:
    scale, ledger = tabulated
    ledger.append(run_of(Cell(SAMPLE, "amp", 1, {"amp_epsilon": 0.1, "amp_inner_lr": 1.0}), scale))
    ledger.append(run_of(Cell(SAMPLE, "dropout", 1, {"dropout": 0.3}), scale))
    ledger.append(run_of(Cell(SAMPLE, "amp_stale", 1, {"amp_epsilon": 0.2, "amp_inner_lr": 0.3}), scale))
    rows = rows_of(Selection(scale), ledger)[SAMPLE]
    labels = [(row.label(), len(row.runs)) for row in rows]
    assert labels[1:] == [
        ("AMP (epsilon 0.1, inner_lr 1)", 1),
        ("AMP (epsilon 0.2, inner_lr 0.3)", 3),
        ("Dropout (rate 0.3)", 1),
        ("AMP, stale (epsilon 0.2, inner_lr 0.3)", 1),
    ]
    assert [row.method for row in rows_of(Selection(scale, methods=["dropout"]), ledger)[SAMPLE]] == ["erm", "dropout"]
    with pytest.raises(ValueError, match="seed 1, twice"):
        rows_of(Selection(scale), [*ledger, ledger[1]])


def test_a_scale_stands_beside_the_one_that_it_is_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy", reason="intervals")
    cpu, larger = read_scale("cpu"), read_scale("cpu_batch67")
    assert (cpu.like, larger.like) == (None, "cpu")
    errors = {"erm": [50.0, 53.0], "amp": [47.0, 47.0], "amp_split4": [46.0, 51.0]}
    cells = Selection(cpu, datasets=["cifar10"], methods=list(errors), seeds=[1, 2]).runs()
    ledger = [run_of(c, cpu, eval_error=errors[c.method][c.seed - 1], eval_nll=2.0, eval_ece=0.1) for c in cells]
    for cell, error in zip(Selection(larger, seeds=[1, 2]).runs(), (45.0, 46.0), strict=True):
        ledger.append(run_of(cell, larger, eval_error=error, eval_nll=1.5, eval_ece=0.1))
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(run) + "\n" for run in ledger))
    reproduce.main(["--scale", "cpu_batch67", "--table", "--output_dir", str(tmp_path)])
    line = (
        capsys.readouterr().out.partition("Beside the scale cpu,")[2].split("| AMP, split(0.25) |")[1].splitlines()[0]
    )
    seeds, *found, _ = map(str.strip, line.split("|"))
    # ERM's 5 and 7 points more, AMP's 2 and 1, the same method's 1 and 5.
    assert (seeds, [cell.split()[0] for cell in found]) == (
        "2",
        ["+6.00", "+0.500", "+1.50", "+0.500", "+3.00", "+0.500"],
    )


def test_a_combined_method_stands_beside_its_parts() -> None:
    pytest.importorskip("scipy", reason="intervals")
    scale = read_scale("cpu")
    errors = {"erm": [50.0, 53.0], "amp": [47.0, 47.0], "dropout": [48.0, 47.0], "amp_dropout": [45.0, 46.0]}
    cells = Selection(scale, datasets=["cifar10"], methods=list(errors), seeds=[1, 2]).runs()
    ledger = [run_of(c, scale, eval_error=errors[c.method][c.seed - 1], eval_nll=2.0, eval_ece=0.1) for c in cells]
    lines = beside.combinations(rows_of(Selection(scale), ledger)).splitlines()[4:]
    found = [[cell.split()[0] for cell in line.strip("| ").split(" | ")[1:3]] for line in lines]
    assert found == [["AMP", "+1.50"], ["Dropout", "+2.00"]]  # means of 2 and 1, of 3 and 1
    alone = {setting: rows[:3] for setting, rows in rows_of(Selection(scale), ledger).items()}
    assert beside.combinations(alone) == ""


def test_the_paper_stands_beside_runs_of_its_scale() -> None:
    paper = read_scale("paper")
    cells = Selection(paper, ["preactresnet18"], ["cifar10"], methods=["erm", "amp"], seeds=[1, 2]).runs()
    assert [c.method for c in cells] == ["erm", "amp"] * 2
    text = markdown(rows_of(Selection(paper), [run_of(c, paper, eval_error=5.0) for c in cells]), with_paper=True)
    (line,) = (line for line in text.splitlines() if line.startswith("| AMP"))
    assert f"| 3.97 ± 0.091 | 0.129 | {(5.0 - 3.97) / (0.091 / 2**0.5):+.1f} |" in line


def test_the_command_writes_table_and_picture(
    tabulated: tuple[Scale, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    scale, ledger = tabulated
    file = tmp_path / "runs" / "ledger.jsonl"
    for run in ledger:
        append_to_ledger(file, run)
    command = ["--scale", str(scale.path), "--output_dir", str(tmp_path / "runs"), "--table"]
    reproduce.main(command)
    text, mark = markdown(rows_of(Selection(scale), ledger), with_paper=False), f"reproduction-{scale.name}"
    link = f"![The tables below as a picture]({mark}.png)\n\n"
    assert read_part(tmp_path / "runs" / f"{mark}.md", mark) == link + text
    assert text in capsys.readouterr().out
    with Image.open(tmp_path / "runs" / f"{mark}.png") as picture:
        assert picture.size[0] > 1000
    page = tmp_path / "RESULTS.md"
    page.write_text(f"Before.\n<!-- {mark}: begin -->\nold\n<!-- {mark}: end -->\nAfter.\n")
    reproduce.main([*command, "--page", str(page)])
    assert text in page.read_text()
    assert page.read_text().startswith("Before.\n")
    assert page.read_text().endswith("After.\n")
    assert "old" not in page.read_text()
    assert page.with_name(f"{mark}.png").is_file()
    page.write_text("mine\n")
    with pytest.raises(ValueError, match=r"must have the lines .* once each"):
        reproduce.main([*command, "--page", str(page)])
    assert page.read_text() == "mine\n", "a page without the marks is left as it is"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{mark}.png"]
    with file.open("a") as broken:
        broken.write('{"settings": {}}\n')
    with pytest.raises(ValueError, match=rf"line {len(ledger) + 1}, is not a run"):
        reproduce.main(command)


@pytest.mark.parametrize("what", ["--table", "--trade_off", "--choose"])
def test_without_runs_a_page_stays_as_it_is(traded: list[str], what: str, tmp_path: Path) -> None:
    command = [*traded, "--ledger", str(tmp_path / "no.jsonl"), "--page", str(tmp_path / "page.md")]
    command[command.index("--trade_off")] = what
    page = "\n".join(f"<!-- {m}-tiny: begin -->\nold\n<!-- {m}-tiny: end -->" for m in ("reproduction", "trials"))
    (tmp_path / "page.md").write_text(page)
    files = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"no\.jsonl has no runs of these cells; run them first"):
        reproduce.main(command)
    assert (tmp_path / "page.md").read_text() == page
    assert sorted(tmp_path.iterdir()) == files, "and nothing is chosen"


def test_nothing_is_chosen_where_the_trials_cannot_be_shown(tmp_path: Path) -> None:
    scale = written(tmp_path)
    ledger = tmp_path / "ledger.jsonl"
    for cell in Selection(scale).trials():
        append_to_ledger(ledger, run_of(cell, scale, eval_nll=1.0))
    page = tmp_path / "page.md"
    page.write_text("mine")
    command = ["--scale", str(scale.path), "--ledger", str(ledger), "--choose", "--page", str(page)]
    with pytest.raises(ValueError, match="once each"):
        reproduce.main(command)
    assert not scale.chosen_path.exists()
    page.unlink()
    reproduce.main(command)
    assert read_scale(str(scale.path)).chosen[SAMPLE].keys() == {"erm", "amp", "dropout"}


@pytest.fixture
def traded(tabulated: tuple[Scale, list[dict[str, Any]]], tmp_path: Path) -> list[str]:
    """The command that makes the trade-off of the runs above and more methods; those at other values do not belong."""
    scale, ledger = tabulated
    amp, erm = {"amp_epsilon": 0.2, "amp_inner_lr": 0.3}, {"learning_rate": 0.1}
    for method, values, errors, passes in (
        ("amp_every4", amp, [50.0, 51.5, 53.0], 2.5),
        ("erm_2x", erm, [49.5, 50.0, 52.0], 4.0),
        ("dropout", {"dropout": 0.1}, [49.0, 51.0, 54.0], 2.0),
        ("amp", {**amp, "amp_epsilon": 0.1}, [10.0, 10.5], 4.0),
        ("amp_every4", {**amp, "amp_epsilon": 0.1}, [10.0, 10.5], 2.5),
        ("erm", {"learning_rate": 0.3}, [10.0, 10.5], 2.0),
    ):
        for seed, error in enumerate(errors, 1):
            figures = {"eval_error": error, "eval_nll": 2.0 + error / 1000, "eval_ece": 0.1, "passes": passes}
            ledger.append(run_of(Cell(SAMPLE, method, seed, values), scale, **figures))
    for run in ledger:
        append_to_ledger(tmp_path / "runs" / "ledger.jsonl", run)
    seconds = {"full": 2.1, "every(4)": 1.3}
    rows = [asdict(timed(trade_off.SECTION, "c", name, "SGD", [t], [1.0], "ms")) for name, t in seconds.items()]
    (tmp_path / "ascents.jsonl").write_text("\n".join(map(json.dumps, [{"machine": "m"}, *rows])) + "\n")
    command = f"--scale {scale.path} --output_dir {tmp_path / 'runs'} --trade_off --benchmark"
    return [*command.split(" "), str(tmp_path / "ascents.jsonl")]


def test_what_a_cheaper_mode_keeps(traded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """AMP's gain of 2.5 ± 5.4 is not told from 0 here, so no share of it is told either."""
    pytest.importorskip("matplotlib", reason="draws")
    reproduce.main(traded)
    text = read_part(tmp_path / "runs" / "trade-off-tiny.md", "trade-off-tiny")
    said = capsys.readouterr().out
    assert text.removeprefix("![The tables below as a picture](trade-off-tiny.png)\n\n") in said
    lines = [cells[1:-1] for row in text.splitlines() if (cells := row.split(" | "))[0].startswith("| AMP, every(4)")]
    assert lines[0][:3] == ["1.25", "1.30", "3"]
    assert lines[0][-5:-3] == ["+1.50 [-3.91, +6.91]", "+0.599 [+0.154, +1.043]"]
    assert lines[0][-3:] == ["-1.00 [-1.00, -1.00]", "+0.474 [+0.291, +0.656]", "-"]
    modes = [row.split(" | ")[0] for row in text.splitlines() if row.startswith("| ")]
    assert modes == ["| mode", "| ---", "| ERM", "| AMP, every(4)", "| ERM, twice the epochs", "| AMP"]
    assert "| ERM, twice the epochs | 2.00 | 2.00 | 3 | 50.50 ± 1.32 |" in text
    with Image.open(tmp_path / "runs" / "trade-off-tiny.png") as picture:
        assert picture.size[0] > 1000


def test_a_share_is_told_only_of_a_gain_that_is_there(tabulated: tuple[Scale, list[dict[str, Any]]]) -> None:
    def row(method: str, errors: list[float]) -> Row:
        return Row(method, {}, {s: {"metrics": {"eval_error": e}} for s, e in enumerate(errors)})

    erm, amp, mode = row("erm", [50, 52, 51]), row("amp", [46, 47.5, 47]), row("amp_stale", [49, 50.5, 50.5, 0.0])
    assert trade_off.kept(erm, amp, mode, "eval_error") == pytest.approx((51 - 50) / (51 - (46 + 47.5 + 47) / 3))
    assert trade_off.kept(erm, row("amp", [46, 52.5, 47]), mode, "eval_error") is None, "its interval contains 0"
    assert trade_off.kept(erm, amp, amp, "eval_error") is None
    assert trade_off.kept(erm, amp, row("amp_stale", [49]), "eval_error") is None
    assert trade_off.kept(erm, None, mode, "eval_error") is None


def test_the_trade_off_needs_measured_seconds_of_one_network(traded: list[str], tmp_path: Path) -> None:
    file = tmp_path / "ascents.jsonl"
    other = {"section": trade_off.SECTION, "case": "d", "name": "full", "ratio": 2}
    file.write_text(file.read_text() + json.dumps(other))
    with pytest.raises(ValueError, match=r"must have the ascent policies of one network .* --only ascents"):
        reproduce.main(traded)
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"no seconds of every\(4\): run benchmark.py --only ascents anew"):
        reproduce.main(traded)
    file.unlink()
    with pytest.raises(ValueError, match="must have the ascent policies"):
        reproduce.main(traded)


def test_the_pages_show_the_ledger(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="intervals")
    scale, ledger = read_scale("cpu"), records.read(ROOT / "recipes" / "ledger.jsonl")
    rows = rows_of(Selection(scale), ledger)
    seconds = trade_off.seconds_of(reproduce.BENCHMARK)
    modes = {setting: trade_off.modes_of(some, seconds) for setting, some in rows.items()}
    page = ROOT / "recipes" / "guides" / "ASCENT.md"
    assert read_part(page, "trade-off-cpu").endswith(trade_off.markdown(modes)), "render it anew from the ledger"
    assert shows(page.with_name("trade-off-cpu.png"), trade_off.markdown(modes)), "draw it anew from the ledger"
    page = ROOT / "recipes" / "RESULTS.md"
    names = re.findall(r"<!-- reproduction-(\w+): begin -->", page.read_text())
    assert "cpu" in names
    for name in names:
        chosen = Selection(read_scale(name))
        tables = rows_of(chosen, ledger)
        said = reproduce.in_words(chosen, ledger, tables)
        assert read_part(page, f"reproduction-{name}").endswith(said), "render it anew from the ledger"
        table = markdown(tables, with_paper=False)
        assert shows(page.with_name(f"reproduction-{name}.png"), table), "draw it anew from the ledger"
    names = re.findall(r"<!-- trials-(\w+): begin -->", page.read_text())
    assert "cpu" in names
    for name in names:
        scale = read_scale(name)
        anew = replace(scale, path=tmp_path / scale.path.name)  # where nothing has been chosen yet
        choice = choose(anew, Selection(anew).trials(), ledger)
        assert read_part(page, f"trials-{name}") == choice.table, "run --choose anew"
        assert scale.chosen_path.read_text() == choice.file


def test_appending_to_a_ledger_waits_for_its_turn(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    appending = threading.Thread(target=append_to_ledger, args=(ledger, {"seed": 1}))
    with FileLock(f"{ledger}.lock"):
        appending.start()
        appending.join(0.5)
        assert appending.is_alive()
        assert not ledger.exists()
    appending.join()
    assert json.loads(ledger.read_text()) == {"seed": 1}


def test_the_plan_counts_the_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper = read_scale("paper")
    erm, amp = (
        price.price(cell, paper)
        for cell in Selection(paper, ["preactresnet18"], ["svhn"], methods=["erm", "amp"], seeds=[1]).runs()
    )
    products: list[int] = []

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        weights = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        products.append(output.numel() * weights)

    model = timm.create_model("preactresnet18", num_classes=10)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    an_image = 2 * (3 * sum(products) - products[0])  # forward and two backward, but none to the pixels
    assert (erm.passes, amp.passes) == (200, 400)
    assert erm.flops == 200 * 73257 * an_image
    assert amp.flops == 2 * erm.flops
    short = replace(paper, train_args=["--train_images", "500", "--num_train_epochs", "3"])
    assert price.price(erm.cell, short).flops == 3 * 500 * an_image
    chosen = "--models preactresnet18 --datasets svhn --methods erm amp --seeds 1 2"
    gpu = "--peak_tflops 100 --utilisation 0.5 --gpu X"
    reproduce.main(f"--scale paper --plan {chosen} {gpu} --output_dir {tmp_path}".split(" "))
    said = capsys.readouterr().out
    assert read_part(tmp_path / "plan-paper.md", "plan-paper") in said
    assert "Computed, not run: counted FLOPs at an assumed 50% of the 100 TFLOP/s of one X" in said
    assert f"| 2 | 400 | {amp.flops:.2e} | {amp.flops / 50e12 / 3600:.1f} |" in said
    assert f"All 4 runs: {6 * erm.flops:.2e} FLOPs" in said


def test_the_committed_plan_is_what_the_command_computes() -> None:
    paper = read_scale("paper")
    page = read_part(ROOT / "recipes" / "PLAN.md", "plan-paper").splitlines()
    cells = {(cell.setting, cell.method) for cell in Selection(paper).runs()}
    assert sum(line.startswith("| ") for line in page) == 2 + len(cells)
    prices = [price.price(cell, paper) for cell in Selection(paper, ["preactresnet18"], methods=["erm", "amp"]).runs()]
    first, _, _, _, *rows, _, _ = price.table(prices, price.Gpu()).splitlines()
    assert first in page
    assert rows
    assert set(rows) <= set(page), "run recipes/reproduce.py --scale paper --plan --page recipes/PLAN.md"
