"""Test the main job's fine-tuning: from timm's layout, an image and a text checkpoint of transformers."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from checkpoints import bert_checkpoint, reviews, timm_checkpoint, vit_checkpoint
from main_job import SCRIPT, metrics_of, train
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ConvNextConfig,
    MobileViTConfig,
    MobileViTImageProcessor,
    ViTConfig,
    ViTImageProcessor,
    pipeline,
)
from transformers.models.convnext import ConvNextImageProcessor

from amp_plugin.data import ImageBatches, collate, load_images
from amp_plugin.flatness import Objective
from amp_plugin.models.pretrained import freeze_backbone
from amp_plugin.models.pretrained_images import image_checkpoint
from amp_plugin.train import job, options
from amp_plugin.train.defaults import fine_tuning_settings
from amp_plugin.train.run_folder import open_run

ON_CPU = ["--use_cpu", "true", "--cpu_threads", "1", "--disable_tqdm", "true"]
IMAGES = ["--train_images", "40", "--per_device_train_batch_size", "20", "--num_train_epochs", "1", *ON_CPU]
TEXTS = [
    *("--text_column", "text", "--label_column", "mood", "--learning_rate", "0.02", "--num_train_epochs", "5"),
    *ON_CPU,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    makers = {"timm": timm_checkpoint, "vit": vit_checkpoint, "bert": bert_checkpoint, "reviews": reviews}
    return {name: make(root / name) for name, make in makers.items()}


def weights(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in load_file(folder / "model.safetensors").items()}


def error_of(folder: Path, task: str, inputs: list[Any], truth: list[str]) -> float:
    """Measure the test error, in percent, of a saved run as anyone would open it."""
    answers = pipeline(task, model=str(folder))(inputs)
    best = [answer[0]["label"] if isinstance(answer, list) else answer["label"] for answer in answers]
    return 100 * float(np.mean([a != b for a, b in zip(best, truth, strict=True)]))


@pytest.fixture(scope="module")
def timm_run(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the job in a process of its own, around SGD, with a learning rate of 0."""
    root = tmp_path_factory.mktemp("timm_run")
    command = ["--pretrained", str(folders["timm"]), "--image_size", "64", "--optim", "amp", "--learning_rate", "0"]
    done = train(root, *command, *IMAGES, "--output_dir", "out", "--ledger", "ledger.jsonl")
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_it_starts_from_the_checkpoint_of_timm(folders: dict[str, Path], timm_run: tuple[Path, str]) -> None:
    root, said = timm_run
    assert "timm with" in said
    assert "(the checkpoint's except timm_model.fc.weight, timm_model.fc.bias)" in said
    before, after = weights(folders["timm"]), weights(root / "out", "timm_model.")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.startswith("fc."):
            assert after[name].shape[0] == 10
        elif "running_" not in name and "num_batches" not in name:
            assert torch.equal(after[name], value), name
    assert metrics_of(root / "out")["amp_loss"] > metrics_of(root / "out")["loss"]


def test_timm_opens_the_run_for_other_classes_and_channels(timm_run: tuple[Path, str]) -> None:
    after = weights(timm_run[0] / "out", "timm_model.")
    model = timm.create_model(f"local-dir:{timm_run[0] / 'out'}", pretrained=True, num_classes=3, in_chans=1)
    differing = {key for key, weight in model.state_dict().items() if not torch.equal(weight, after[key])}
    assert differing == {"conv1.0.weight", "fc.weight", "fc.bias"}


def test_the_ledger_names_the_checkpoint_and_no_folder(timm_run: tuple[Path, str]) -> None:
    (record,) = (json.loads(line) for line in (timm_run[0] / "ledger.jsonl").read_text().splitlines())
    assert record["settings"]["pretrained"] == "timm"
    assert record["settings"]["model"] is None
    assert "/" not in json.dumps(record["settings"])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_a_saved_image_model_predicts_the_same(
    kind: str, folders: dict[str, Path], timm_run: tuple[Path, str], tmp_path: Path
) -> None:
    folder = timm_run[0] / "out"
    if kind == "vit":
        folder = tmp_path
        job.main(["--pretrained", str(folders["vit"]), "--learning_rate", "0.05", *IMAGES, "--output_dir", str(folder)])
    data = load_images("cifar10_sample")
    images = [Image.fromarray(np.array(image)) for image in data.test.images]
    truth = [data.class_names[i] for i in data.test.labels]
    checkpoint = image_checkpoint(str(folder))
    settings = replace(data.settings, mean=checkpoint.mean, std=checkpoint.std)
    ours = ImageBatches(data.test, settings, image_size=checkpoint.image_size).__getitems__(range(50))["pixel_values"]
    theirs = AutoImageProcessor.from_pretrained(folder)(images[:50], return_tensors="pt")["pixel_values"]
    # Pillow, with which timm's processor resizes, rounds some pixels differently than torchvision.
    step, tolerance = (2 / 255 / min(checkpoint.std), 2.0) if kind == "timm" else (0.0, 0.0)
    assert torch.allclose(ours, theirs, rtol=0.0, atol=step + 1e-5)
    error = error_of(folder, "image-classification", images, truth)
    assert error == pytest.approx(metrics_of(folder)["eval_error"], abs=tolerance + 1e-6)
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label[9] == "truck"


@pytest.mark.usefixtures("no_pictures")
def test_a_frozen_backbone_stays_as_it_is(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    command = ["--pretrained", str(folders["timm"]), "--image_size", "64", "--optim", "amp", "--freeze_backbone"]
    job.main([*command, *IMAGES, "--learning_rate", "1", "--output_dir", str(tmp_path)])
    assert re.search(r"fc.bias, 970 of them trained\)", capsys.readouterr().out)
    before, after = weights(folders["timm"]), weights(tmp_path, "timm_model.")
    for name, value in before.items():
        if not name.startswith("fc."):  # running statistics too
            assert torch.equal(after[name], value), name
    assert metrics_of(tmp_path)["sharpness"] > 0.0, "the head was perturbed"
    assert after["fc.bias"].abs().max() > 0.0, "and trained"


@pytest.mark.usefixtures("no_pictures")
def test_texts(folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["--pretrained", str(folders["bert"]), "--dataset", str(folders["reviews"]), *TEXTS]
    for optim in ("amp_adamw_torch", "adamw_torch"):
        job.main([*command, "--optim", optim, "--output_dir", str(tmp_path / optim), "--save_strategy", "epoch"])
    amp, plain = weights(tmp_path / "amp_adamw_torch"), weights(tmp_path / "adamw_torch")
    assert not torch.equal(amp["classifier.weight"], plain["classifier.weight"])
    with (folders["reviews"] / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    for optim in ("amp_adamw_torch", "adamw_torch"):
        error = error_of(tmp_path / optim, "text-classification", [r["text"] for r in rows], [r["mood"] for r in rows])
        assert error == pytest.approx(metrics_of(tmp_path / optim)["eval_error"])
        assert error < 25.0, "a word decides"
    opened = open_run(tmp_path / optim, dataset=str(folders["reviews"])).task
    measured = Objective(opened.model, DataLoader(opened.test, 7, collate_fn=collate)).evaluate()
    assert measured.error == pytest.approx(error)

    shutil.rmtree(tmp_path / "amp_adamw_torch" / "checkpoint-15")
    command += ["--output_dir", str(tmp_path / "amp_adamw_torch"), "--save_strategy", "epoch"]
    job.main([*command, "--resume_from_checkpoint", "true"])
    resumed = weights(tmp_path / "amp_adamw_torch")
    assert all(torch.equal(resumed[name], value) for name, value in amp.items())


def test_other_defaults_apply() -> None:
    def parsed(*command: str) -> tuple[Any, ...]:
        args = options.parse([*command, "--use_cpu", "true"])[2]
        return args.optim, args.learning_rate, args.lr_scheduler_type, args.max_grad_norm

    assert parsed() == ("amp", 0.1, "steps", 50.0)
    assert parsed("--pretrained", "x") == ("amp_adamw_torch", 5e-5, "linear", 1.0)
    assert parsed("--pretrained", "x", "--optim", "amp") == ("amp", 0.01, "cosine", 1.0)
    command = ["--pretrained", "x", "--optim", "adamw_torch", "--max_grad_norm", "2"]
    assert parsed(*command) == ("adamw_torch", 5e-5, "linear", 2.0)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--pretrained /nowhere", "pretrained '/nowhere': there is no such folder"),
        ("--pretrained nobody/nothing", "pretrained 'nobody/nothing': no such folder, and the Hub does not give it: "),
        ("--pretrained preactresnet18", "timm has no weights for this architecture; --model preactresnet18"),
        ("--pretrained BERT", "is a distilbert model, for which there is no AutoModelForImageClassification"),
        ("--pretrained REVIEWS", "the folder is no checkpoint: "),
        ("--pretrained VIT --image_size 32", "does not take images of 32 x 32 pixels"),
        ("--pretrained VIT --dataset REVIEWS TEXTS", "is a vit model, for which there is no AutoModelForS"),
        ("--dataset REVIEWS TEXTS", "--text_column needs --pretrained"),
        ("--freeze_backbone", "--freeze_backbone needs --pretrained"),
        ("--pretrained BERT --dataset REVIEWS --text_column txt", "no column 'txt', only text, mood"),
        ("--pretrained BERT --dataset REVIEWS --text_column stars", "holds Value('int64'), not texts"),
        ("--pretrained BERT --dataset REVIEWS --text_column text", "no column 'label', only text"),
        ("--pretrained BERT --dataset REVIEWS TEXTS --max_seq_length 17", "takes 1 to 16 tokens"),
        ("--pretrained BERT --dataset REVIEWS TEXTS --augment plain", "--augment is for images"),
        ("--pretrained VIT --max_seq_length 9", "--max_seq_length is for texts, and needs --text_column"),
        ("--pretrained BERT --dataset REVIEWS/train.csv TEXTS", "is a file; give the folder it is in"),
    ],
)
def test_a_mistake_is_named(command: str, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    command = command.replace("TEXTS", " ".join(TEXTS))
    for name in ("bert", "vit", "reviews"):
        command = command.replace(name.upper(), str(folders[name]))
    with pytest.raises(ValueError, match=re.escape(message)):
        job.main([*command.split(), "--use_cpu", "true", "--output_dir", str(tmp_path)])


def test_weights_of_another_network_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["bert"].iterdir():
        shutil.copy(path, tmp_path)
    shutil.copy(folders["vit"] / "model.safetensors", tmp_path)
    command = ["--pretrained", str(tmp_path), "--dataset", str(folders["reviews"]), *TEXTS]
    with pytest.raises(ValueError, match=r"holds the weights of another network: \d+ of \d+ parameters of its distil"):
        job.main([*command, "--output_dir", str(tmp_path / "out")])


def test_image_processors(tmp_path: Path) -> None:
    """ConvNeXt's processor knows a shortest edge alone; MobileViT's swaps red and blue, which nothing here does."""
    kinds = {
        "convnext": (ConvNextConfig(), ConvNextImageProcessor(size={"shortest_edge": 224})),
        "mobilevit": (MobileViTConfig(), MobileViTImageProcessor()),
        "oblong": (ViTConfig(), ViTImageProcessor(size={"height": 48, "width": 32})),
    }
    for name, parts in kinds.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    checkpoint = image_checkpoint(str(tmp_path / "convnext"), 64)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert checkpoint.processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"MobileViTImageProcessor does more to an image than resize, crop and norm"):
        image_checkpoint(str(tmp_path / "mobilevit"))
    with pytest.raises(ValueError, match="takes images of 48 x 32 pixels; name one image_size"):
        image_checkpoint(str(tmp_path / "oblong"))


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("finetune_*.yaml")), ids=lambda p: p.stem)
def test_recipes(path: Path) -> None:
    data, model, args = options.parse([str(path), "--use_cpu", "true"])
    assert model.pretrained is not None
    assert args.uses_amp
    assert (data.text_column is not None) == ("distilbert" in path.stem)
    expected = ("cosine", 1e-4) if args.optim == "amp" else ("linear", 0.01)
    assert (args.lr_scheduler_type, args.weight_decay) == expected


GUIDE = (SCRIPT.parent / "guides" / "FINE_TUNING.md").read_text()
COMMANDS = [
    command
    for block in re.findall(r"^```bash\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for command in block.replace("\\\n", "").splitlines()
    if "recipes/train.py" in command  # and not a script of the recipes' own
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPT.parents[1])
    launch, options_of = command.split("recipes/train.py")
    assert launch == "accelerate launch "
    assert options.parse([*options_of.split(), "--use_cpu", "true"])[1].pretrained is not None


def test_the_guide_tells_the_defaults() -> None:
    for optim, column in ((None, 1), ("amp", 2)):
        defaults = fine_tuning_settings(optim)
        cells = (line.strip("| ").split(" | ") for line in GUIDE.splitlines())
        rows = {row[0]: row[column] for row in cells if row[column:]}
        assert float(rows["`learning_rate`"]) == defaults["learning_rate"]
        assert rows["`lr_scheduler_type`"] == defaults["lr_scheduler_type"]
        assert float(rows["`weight_decay`, on matrices alone"]) == defaults["weight_decay"]
        assert rows["`amp_epsilon`, `amp_inner_lr`"] == f"{defaults['amp_epsilon']}, {defaults['amp_inner_lr']}"


def test_only_the_head_is_left_to_train(folders: dict[str, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    freeze_backbone(model)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"pre_classifier", "classifier"}
