"""Test the command line of the main job: its help, its recipes and its words for mistakes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from main_job import RECIPES
from transformers import TrainingArguments

from amp_plugin import AMPTrainingArguments
from amp_plugin.train import command_line, options
from amp_plugin.train.settings import settings_of

OWN = {
    field.name
    for kind in (options.DataArguments, options.ModelArguments, options.RecipeArguments, AMPTrainingArguments)
    for field in dataclasses.fields(kind)
} - ({field.name for field in dataclasses.fields(TrainingArguments)} - {"optim"})


def shown_by(option: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """Return what the option prints, and the names of the options there."""
    with pytest.raises(SystemExit) as left:
        options.parse([option], "train.py trains.")
    assert not left.value.code
    text = capsys.readouterr().out
    return text, re.findall(r"^  --(\w+)", text, re.MULTILINE)


def test_help_shows_the_important_options_in_groups_and_help_all_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    text, names = shown_by("--help", capsys)
    everything, all_names = shown_by("--help_all", capsys)
    grouped = [name for group in command_line.GROUPS.values() for name in group.split()]
    assert names == grouped, "a name in GROUPS has no option, or another is shown"
    assert set(names) >= OWN - {"sync_ascent", "amp_capture"}, "an option of ours has another name here, or is hidden"
    assert "sync_ascent" not in names, "a deprecated option is shown"
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE) == ["RECIPE", *command_line.GROUPS]
    assert all(recipe.stem in text for recipe in RECIPES)
    assert "--help_all" in text
    assert len(names) == len(set(names))
    assert sorted(all_names) == sorted(f.name for f in every_field())
    assert len(everything) > 2 * len(text)


def every_field() -> list[dataclasses.Field[object]]:
    kinds = (options.DataArguments, options.ModelArguments, options.RecipeArguments)
    return [field for kind in kinds for field in dataclasses.fields(kind) if field.init]


def test_the_help_text_of_a_stock_option_is_only_replaced_where_there_is_one() -> None:
    assert command_line._WORDS.keys() <= {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--amp_epsilom", "1"], "no option '--amp_epsilom', did you mean '--amp_epsilon'"),
        (["--amp_eps", "1"], "no option '--amp_eps', did you mean '--amp_epsilon'"),
        (["--epsilon", "1"], "no option '--epsilon', did you mean --amp_epsilon or --adversarial_epsilon or"),
        (["--lr=1"], "no option '--lr', did you mean --learning_rate"),
        (["--amp"], "did you mean --optim amp (Adversarial Model Perturbation) or --bf16 (mixed precision)"),
        (["--zzz"], "no option '--zzz'; --help lists them"),
        (["--amp_epsilon", "wide"], "--amp_epsilon: invalid float value: 'wide'"),
        (["--augment", "cutot"], "--augment: invalid choice: 'cutot'"),
        (["--seed", "1", "preactresnet18_svhn"], "unexpected 'preactresnet18_svhn': a recipe comes first"),
        (["preactresnet18_shvn"], "does not exist, did you mean 'preactresnet18_svhn'; known by name are"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        options.parse(arguments)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("amp_epsilon: wide", "mine.yaml': --amp_epsilon: invalid float value: 'wide'"),
        ("augment: cutot", "mine.yaml': --augment: invalid choice: 'cutot'"),
        ("seed:", "mine.yaml' has no value for --seed; leave it out for the default"),
        ("- seed", "mine.yaml' must be a mapping of options to values"),
        ("a: b: c", "mine.yaml' is not YAML: mapping values are not allowed here"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        options.parse([str(tmp_path / "mine.yaml")])


def test_a_recipe_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in RECIPES:
        named, filed = (settings_of(*options.parse([word, "--use_cpu"])) for word in (path.stem, str(path)))
        assert named == filed
    _, _, args = options.parse(["preactresnet18_svhn", "--amp_epsilon", "0.3", "--lr_milestones", "0.4", "--use_cpu"])
    assert (args.amp_epsilon, args.lr_milestones, args.num_train_epochs) == (0.3, [0.4], 200)


def test_a_file_comes_before_a_recipe_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("preactresnet18_svhn").write_text("seed: 9\namp_sync_ascent: false\nlr_milestones: [0.1, 0.2]\n")
    data, _, args = options.parse(["preactresnet18_svhn", "--use_cpu"])
    assert (data.dataset, args.seed, args.amp_sync_ascent, args.lr_milestones) == (
        "cifar10_sample",
        9,
        False,
        [0.1, 0.2],
    )


def test_a_recipe_may_have_the_old_name_of_amp_sync_ascent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("sync_ascent: false\n")
    with pytest.warns(DeprecationWarning, match="sync_ascent is now amp_sync_ascent"):
        parsed = options.parse(["old.yaml", "--use_cpu"])
    settings = settings_of(*parsed)
    assert settings["amp_sync_ascent"] is False
    assert "sync_ascent" not in settings
