"""Test the text of a model card, and the command in it that repeats a run."""

from __future__ import annotations

import json
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import card_errors
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from amp_plugin import AMPTrainer, AMPTrainingArguments
from amp_plugin.hub import Run, RunData, model_card
from amp_plugin.hub.card import pictures_in, with_later_pictures
from amp_plugin.train.card import command_line, compared_run
from amp_plugin.train.options import with_recipe

METRICS = {"accuracy": 0.5, "error": 50.0, "nll": 1.25, "ece": 0.125}


def test_results_become_a_model_index() -> None:
    data = RunData(name="CIFAR-10", id="uoft-cs/cifar10", split="validation")
    card = model_card(Run(name="mine", architecture="preactresnet18", library="timm", data=data, metrics=METRICS))
    assert card_errors(str(card)) == []
    results = {r.metric_type: r for r in ModelCard(str(card)).data.eval_results or []}
    assert {name: r.metric_value for name, r in results.items()} == METRICS
    assert {(r.task_type, r.dataset_type, r.dataset_split) for r in results.values()} == {
        ("image-classification", "uoft-cs/cifar10", "validation")
    }


@pytest.mark.parametrize(("architecture", "imports"), [("preactresnet18", True), ("resnet18", False)])
def test_the_package_is_imported_where_the_architecture_is_its_own(architecture: str, imports: bool) -> None:
    assert ("import amp_plugin" in str(model_card(Run(name="m", architecture=architecture, library="timm")))) == imports


def trainer_card(folder: Path, name_or_path: str = "", **arguments: Any) -> str:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    model: nn.Module = ViTForImageClassification(config)
    model.config._name_or_path = name_or_path
    args = AMPTrainingArguments(str(folder), use_cpu=True, report_to=[], **arguments)
    AMPTrainer(model=model, args=args, train_dataset=[{"pixel_values": torch.ones(1)}]).create_model_card()
    return (folder / "README.md").read_text()


def test_amp_and_mixed_precision_are_not_confused(tmp_path: Path) -> None:
    card = trainer_card(tmp_path, bf16=True, amp_epsilon=0.25)
    assert "| precision | bf16 mixed precision |" in card
    assert "| AMP's `epsilon`, radius of the ball | 0.25 |" in card
    assert "AMP is [Adversarial Model Perturbation]" in card
    assert "Native AMP" not in card
    assert card_errors(card) == []


def test_only_a_model_from_the_hub_is_called_fine_tuned(tmp_path: Path) -> None:
    assert "fine-tuned" not in trainer_card(tmp_path / "scratch")
    card = trainer_card(tmp_path / "tuned", "google/vit", optim="sgd")
    assert "fine-tuned from [google/vit](https://huggingface.co/google/vit) with SGD, without AMP." in card
    assert ModelCard(card).data.base_model == "google/vit"
    assert "Adversarial" not in card, "trained without it"


def test_pictures_in_the_folder_are_shown_the_curves_first(tmp_path: Path) -> None:
    for name in ("confusion.png", "curves.png", "loss_along_the_gradient.png", "notes.txt"):
        (tmp_path / name).touch()
    names = pictures_in(tmp_path)
    assert names == ["curves.png", "confusion.png", "loss_along_the_gradient.png"]
    card = str(model_card(Run(name="m", architecture="resnet18", pictures=names)))
    assert "![Loss along the gradient](loss_along_the_gradient.png)" in card
    assert with_later_pictures(card, tmp_path) == card
    (tmp_path / "landscape.png").touch()
    later = with_later_pictures(card, tmp_path)
    assert later == str(model_card(Run(name="m", architecture="resnet18", pictures=[*names, "landscape.png"])))


def test_the_command_of_a_recipe_known_by_name_has_its_settings() -> None:
    command = command_line(with_recipe(["preactresnet18_svhn", "--amp_epsilon", "0.3"]), processes=1)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "amp_plugin.train"]
    assert words[words.index("--dataset") + 1] == "svhn"
    assert words.count("--amp_epsilon") == 1
    assert words[words.index("--amp_epsilon") + 1] == "0.3"


def test_the_command_is_whole_and_tells_no_secret(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model_kwargs: {width: 8}\nlr_milestones: [0.3, 0.6]\nseed: 3\ndata_root: /home/me\n")
    secret = ["--hub_token=hf_secret", "--push_to_hub", "--output_dir", "/home/me/out", "--hub_model_id", "me/x"]
    command = command_line(with_recipe([str(recipe), "--seed", "4", "--fast", *secret]), processes=2)
    assert command.replace(" \\\n   ", "") == (
        "torchrun --nproc_per_node 2 -m amp_plugin.train --model_kwargs '{\"width\": 8}' --lr_milestones 0.3 0.6"
        " --seed 4 --fast"
    )


def test_a_ledger_gives_the_last_run_that_differs_in_the_optimizer_only(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    runs = [("sgd", 1, 60.0), ("sgd", 1, 50.0), ("sgd", 2, 40.0), ("amp", 1, 30.0)]
    ledger.write_text(
        "".join(
            json.dumps({"settings": {"optim": o, "seed": s, "amp_epsilon": 0.1}, "metrics": {"eval_error": e}}) + "\n"
            for o, s, e in runs
        )
    )
    ours = {"optim": "amp", "seed": 1, "amp_epsilon": 0.5}
    assert compared_run(str(ledger), ours)["metrics"]["eval_error"] == 50.0
    with pytest.raises(ValueError, match="no run in it has the settings of this one and another optimizer"):
        compared_run(str(ledger), {**ours, "seed": 9})
    with pytest.raises(ValueError, match=r"there is no '.*run\.json'; give the output folder of a finished run"):
        compared_run(str(tmp_path), ours)


NASTY = "$x^$ a|b `c` <b> *d* _e_ [f](g)\n---\n\x1b[31m\u202e😀 {{ 7 * 7 }}"
SHOWN = r"$x^$ a|b `c` <b> *d* _e_ [f](g)\n---\n\x1b[31m\u202e😀 {{ 7 * 7 }}"


def tables(card: str) -> list[list[str]]:
    """Return the rows of all tables of a card, as readers see them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
    rows: list[list[str]] = []
    for before, token in pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif before.type in ("th_open", "td_open"):
            rows[-1].append("".join(t.content for t in token.children or [] if t.type != "html_inline"))
    return rows


def test_a_card_shows_any_text_as_it_is() -> None:
    data = RunData(name=NASTY, id=NASTY, on_hub=False, config=NASTY, split=NASTY, described=NASTY)
    run = Run(
        **dict.fromkeys(("name", "architecture", "optimizer", "base_model", "license"), NASTY),
        data=data,
        metrics={"accuracy": 0.5, NASTY: 1.0},
        compared={NASTY: {"accuracy": 0.25}},
        settings={"plain": NASTY},
        command=f"python {NASTY}\n```\n# no heading",
        pictures=["a|b).png"],
    )
    card = str(model_card(run))
    head, ours, theirs, *_ = tables(card)
    assert head == ["", "accuracy", SHOWN.replace("_", " ")]
    assert ours == [f"this model ({SHOWN})", "0.5000", "1"]
    assert theirs == [SHOWN, "0.2500", ""]
    assert {len(row) for row in tables(card)[3:]} == {2}
    tokens = MarkdownIt("commonmark").parse(ModelCard(card).text)
    headings = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    assert headings[1:] == ["Results", "Training", "Licence and citation"]
    assert not [token for token in tokens if token.type == "html_block"]
    assert [t.attrs["src"] for token in tokens for t in token.children or [] if t.type == "image"] == ["a%7Cb%29.png"]
    results = ModelCard(card).data.eval_results or []
    assert {(r.dataset_name, r.dataset_type, r.dataset_split) for r in results} == {(NASTY, NASTY, NASTY)}


@pytest.mark.parametrize("pattern", ["stem|head", r"a\|b", "`|", "$x^$", "<b>\n"])
def test_the_table_of_settings_keeps_its_columns(tmp_path: Path, pattern: str) -> None:
    rows = tables(trainer_card(tmp_path, amp_parameters=pattern, optim_args="momentum=0.9"))
    (found,) = (row[1:] for row in rows if row[0].startswith("AMP's parameters"))
    assert found == [pattern.replace("\n", r"\n")]


def test_a_command_of_any_words_is_one_block_that_a_shell_reads() -> None:
    words = ["--dataset", NASTY, "--amp_parameters", "```|\n```"]
    command = command_line(words, 1)
    assert not {"\x1b", "\u202e"} & set(command)
    card = str(model_card(Run(name="m", architecture="resnet18", command=command)))
    (block,) = (t.content for t in MarkdownIt("commonmark").parse(card) if t.type == "fence" and t.info == "bash")
    script = block.replace("python -m amp_plugin.train", "printf '%s\\0'")
    read = subprocess.run(["bash", "-c", script], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True).stdout
    assert read.decode().split("\0")[:-1] == words
