"""Test recipes/train.py as a user runs it: in a process of its own, on the sample that comes with the package."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from main_job import QUICK, RECIPES, SCRIPT, launcher, metrics_of, run, train
from PIL import Image

from amp_plugin.train import job, options
from amp_plugin.train.trainer import RecipeTrainer


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    done = train(folder, *QUICK, "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.parametrize("optim", ["amp", "sgd"])
def test_the_main_job(tmp_path: Path, optim: str) -> None:
    pytest.importorskip("matplotlib", reason="draws the training curves")
    done = train(tmp_path, "--optim", optim, *QUICK, "--ledger", "ledger.jsonl", pictures=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / f"cifar10_sample-preactresnet18-{optim}-seed42"
    assert f"cpu, 1 thread(s); results in runs/{folder.name}" in done.stdout
    assert ("without AMP" in done.stdout) == (optim == "sgd")
    rows = re.findall(r"^(train loss|test error|test NLL|test ECE|sharpness|time) +\S", done.stdout, re.MULTILINE)
    assert rows == ["train loss", "test error", "test NLL", "test ECE", "sharpness", "time"]
    metrics = metrics_of(folder)
    assert ("amp_loss" in metrics) == ("sharpness" in metrics) == (optim == "amp")
    assert 0.0 <= metrics["eval_error"] <= 100.0
    with Image.open(folder / "curves.png") as picture:
        assert picture.size[0] > 600
    (record,) = (json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert record["settings"]["seed"] == 42
    assert record["settings"]["optim"] == optim
    assert str(tmp_path) not in str(record), "a ledger is shared: no paths of the machine"
    assert record["metrics"]["eval_error"] == metrics["eval_error"]


def test_a_run_without_logs_reports_the_mean_loss(tmp_path: Path) -> None:
    done = train(tmp_path, *QUICK, "--logging_strategy", "no", "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(tmp_path / "out")
    assert metrics["loss"] == metrics["train_loss"] > 0.0


def test_a_saved_run_opens_in_a_fresh_process_with_the_same_logits(finished_run: Path) -> None:
    reopened = run(
        finished_run.parent,
        sys.executable,
        "-c",
        """
import amp_plugin, numpy as np, torch
from PIL import Image
from amp_plugin.data import ImageBatches, load_images
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
data = load_images("cifar10_sample")
images = [Image.fromarray(np.array(image)) for image in data.test.images[:8]]
model = AutoModelForImageClassification.from_pretrained("out").eval()
ours = ImageBatches(data.test, data.settings, "none").__getitems__(range(8))["pixel_values"]
theirs = AutoImageProcessor.from_pretrained("out")(images)["pixel_values"]
print("inputs differ by", (ours - theirs).abs().max().item())
with torch.no_grad():
    best = model(pixel_values=ours).logits.argmax(1)
named = [r[0]["label"] for r in pipeline("image-classification", model="out")(images)]
assert named == [data.class_names[i] for i in best.tolist()], named
error = 0
test = ImageBatches(data.test, data.settings, "none")
with torch.no_grad():
    batch = test.__getitems__(range(len(test)))
    error = 100 * (model(pixel_values=batch["pixel_values"]).logits.argmax(1) != batch["labels"]).float().mean()
print("error", error.item())
""",
    )
    assert reopened.returncode == 0, reopened.stderr
    assert float(re.search(r"inputs differ by (\S+)", reopened.stdout)[1]) < 1e-5  # type: ignore[index]
    error = float(re.search(r"error (\S+)", reopened.stdout)[1])  # type: ignore[index]
    assert error == pytest.approx(metrics_of(finished_run)["eval_error"], abs=1e-3)


def test_launchers_of_one_process_give_the_same_run(tmp_path: Path, finished_run: Path) -> None:
    commands = {
        "accelerate": [*launcher("accelerate"), "launch", "--cpu", "--num_processes", "1"],
        "torchrun": [*launcher("torchrun"), "--standalone", "--nproc_per_node", "1"],
    }
    errors = {"python": metrics_of(finished_run)["eval_nll"]}
    for name, command in commands.items():
        done = run(tmp_path, *command, str(SCRIPT), *QUICK, "--output_dir", name)
        assert done.returncode == 0, done.stderr
        errors[name] = metrics_of(tmp_path / name)["eval_nll"]
    assert errors["accelerate"] == errors["python"]
    assert errors["torchrun"] == pytest.approx(errors["python"], rel=1e-5)


def test_two_processes_report_once(tmp_path: Path) -> None:
    torchrun = [*launcher("torchrun"), "--standalone", "--nproc_per_node", "2"]
    done = run(tmp_path, *torchrun, str(SCRIPT), *QUICK, "--output_dir", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train loss") == 1
    assert metrics_of(tmp_path / "two")["eval_error"] <= 100.0
    records = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval_error" in r] == [2, 4], "one process writes"
    config = (tmp_path / "two" / "config.yaml").read_text()
    assert "made in 2 processes" in config


def test_a_killed_run_continues_from_its_checkpoint(tmp_path: Path) -> None:
    command = [*QUICK, "--save_strategy", "epoch", "--output_dir"]
    assert train(tmp_path, *command, "whole").returncode == 0
    assert train(tmp_path, *command, "part", "--save_total_limit", "2").returncode == 0
    # What is left is what a kill after the first epoch would leave.
    for path in [*(tmp_path / "part").glob("checkpoint-6/*"), *(tmp_path / "part").glob("*.*")]:
        path.unlink()
    (tmp_path / "part" / "checkpoint-6").rmdir()
    resumed = train(tmp_path, *command, "part", "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(tmp_path / "part")["eval_nll"] == metrics_of(tmp_path / "whole")["eval_nll"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar11"], "data set 'cifar11' is unknown, did you mean 'cifar10'"),
        (["--model", "preactresnet19"], "model 'preactresnet19' is unknown to timm, did you mean 'preactresnet1"),
        (["--optim", "amq"], "optim 'amq' is unknown, did you mean 'amp'"),
        (["--amp_epsilon", "-1"], "--amp_epsilon must be at least 0 and finite, got -1.0"),
        (["--model_kwargs", '{"widht": 3}'], "model 'preactresnet18' does not take these arguments"),
        (["--lr_milestones", "2"], "lr_milestones must be fractions of the training in (0, 1), got [2.0]"),
        (["--warmup_steps", "5"], "lr_scheduler_type 'steps' has no warmup"),
        (["--lr_scheduler_type", "cosin"], "cosin is not a valid SchedulerType"),
        (["nothing.yaml"], "recipe 'nothing.yaml' does not exist; known by name are finetune_distilbert_sst2"),
    ],
)
def test_a_mistake_is_named(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        job.main([*arguments, "--use_cpu", "true"])


def test_a_mistake_gives_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, str(SCRIPT), "--optim", "amq")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: optim 'amq' is unknown, did you mean 'amp'")
    assert "Traceback" not in done.stderr


def test_an_unknown_option_in_a_recipe_names_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("amp_epsilom: 0.3\n")
    with pytest.raises(ValueError, match=r"mine\.yaml': no option '--amp_epsilom', did you mean '--amp_epsilon'"):
        options.parse([str(tmp_path / "mine.yaml")])


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("amp_epsilon: 0.3\nseed: 7\nlearning_rate: 5e-2\nmodel_kwargs: {width: 8}\n")
    _, model, args = options.parse([str(tmp_path / "mine.yaml"), "--seed", "8"])
    assert (args.amp_epsilon, args.seed, args.learning_rate) == (0.3, 8, 0.05)
    assert model.parsed_model_kwargs() == {"width": 8}


PUBLISHED = {
    "preactresnet18": ("preactresnet18", "plain", 0.5, 1.0, 11_176_906),
    "pyramidnet164_270": ("pyramidnet164_270", "autoaugment", 0.1, 0.1, 27_216_021),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_hold_the_published_settings(path: Path) -> None:
    """They are in the table in section 5 and in the appendix of the paper; the parameters are at ten classes."""
    data, model, args = options.parse([str(path)])
    name = next(n for n in PUBLISHED if path.stem.startswith(n))
    dataset = path.stem.removeprefix(f"{name}_").split("_")[0]
    architecture, augment, epsilon, inner_lr, parameters = PUBLISHED[name]
    assert (data.dataset, data.augment, model.model) == (dataset, augment, architecture)
    assert (args.amp_epsilon, args.amp_inner_lr, args.amp_inner_iter, args.amp_norm) == (epsilon, inner_lr, 1, "tensor")
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.learning_rate) == (200, 50, 0.1)
    assert (args.weight_decay, args.max_grad_norm, args.decay_all_parameters) == (1e-4, 50.0, True)
    assert (args.lr_milestones, args.lr_gamma) == ([0.5, 0.75], 0.1)
    assert args.optim_args == "momentum=0.9,nesterov=True"
    with torch.device("meta"):
        network = timm.create_model(model.model, **model.parsed_model_kwargs())
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_all_six_headline_settings_are_there() -> None:
    assert len(RECIPES) == 6


def scheduled(folder: Path, *command: str) -> Any:
    """Make a trainer that is ready for 200 steps."""
    _, _, args = options.parse(["--output_dir", str(folder), "--use_cpu", "true", "--eval_strategy", "no", *command])
    trainer = RecipeTrainer(model=torch.nn.Linear(1, 1), args=args)
    trainer.create_optimizer_and_scheduler(200)
    return trainer


def test_the_schedule_drops_at_the_milestones(tmp_path: Path) -> None:
    trainer = scheduled(tmp_path, "--lr_milestones", "0.5", "0.75")
    rates = []
    for _ in range(200):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer._opt_called = True  # only the schedule is looked at
        trainer.lr_scheduler.step()
    assert [i for i in range(1, 200) if rates[i] != rates[i - 1]] == [100, 150]
    assert [rates[0], rates[100], rates[150]] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_pinned_batches_go_to_a_gpu_while_the_host_goes_on(
    device: str, pinned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = scheduled(tmp_path)
    trainer.args.dataloader_pin_memory = pinned
    monkeypatch.setattr(options.RecipeArguments, "device", torch.device(device))
    trainer.create_accelerator_and_postprocess()
    loader = trainer.accelerator.prepare(torch.utils.data.DataLoader([0]))
    assert loader._non_blocking == (device == "cuda" and pinned)
    assert not trainer.args.accelerator_config.non_blocking, "the ledger has the settings of a run on another device"


def test_a_stock_schedule_can_be_named(tmp_path: Path) -> None:
    trainer = scheduled(tmp_path, "--lr_scheduler_type", "cosine", "--warmup_steps", "5")
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0, "the warmup begins at 0"
    assert isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.LambdaLR)
