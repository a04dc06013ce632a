"""Test `--label_noise`: which labels a training sees, and what its records say of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from main_job import QUICK

from amp_plugin.flatness.__main__ import _check_same_data
from amp_plugin.train import job, options
from amp_plugin.train.card import differences
from amp_plugin.train.run_folder import open_run
from amp_plugin.train.settings import settings_of
from amp_plugin.train.tasks import Task, make_task

pytestmark = pytest.mark.usefixtures("no_pictures")


def task_of(*arguments: str) -> Task:
    """The data and the model that the job would train."""
    parsed = options.parse([*QUICK, *arguments])
    torch.manual_seed(parsed[2].seed)
    return make_task(*parsed)


def labels_of(task: Task) -> tuple[np.ndarray, np.ndarray]:
    return task.train.split.labels, task.test.split.labels


@pytest.mark.parametrize("held_out", [[], ["--validation_images", "50"]], ids=["test", "validation"])
def test_the_images_that_are_trained_on_get_other_labels(held_out: list[str]) -> None:
    clean, noisy = task_of(*held_out), task_of(*held_out, "--label_noise", "0.2")
    (train, test), (noisy_train, noisy_test) = labels_of(clean), labels_of(noisy)
    assert (train != noisy_train).sum() == 12, "a fifth of the 60 images that were chosen"
    assert (test == noisy_test).all()
    pixels: Any = [task.train.split.images for task in (clean, noisy)]  # type: ignore[union-attr]
    assert (pixels[0] == pixels[1]).all()
    weights, others = (task.model.state_dict() for task in (clean, noisy))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    batch, other = (task.train.__getitems__([3, 1, 4]) for task in (clean, noisy))
    assert torch.equal(batch["pixel_values"], other["pixel_values"])
    assert other["labels"].tolist() == noisy_train[[3, 1, 4]].tolist()
    resident: Any = noisy.train
    assert resident.to("cpu").__getitems__([3, 1, 4])["labels"].tolist() == other["labels"].tolist()


def test_every_method_sees_the_same_noise() -> None:
    noise, _ = labels_of(task_of("--label_noise", "0.4", "--optim", "sgd", "--seed", "5"))
    for method in (["--optim", "sam"], ["--optim", "amp", "--amp_ascent", "split(0.25)"], ["--mixup_alpha", "0.5"]):
        assert (labels_of(task_of("--label_noise", "0.4", "--seed", "5", *method))[0] == noise).all()
    assert (labels_of(task_of("--label_noise", "0.4", "--seed", "6", "--optim", "sgd"))[0] != noise).any()


def test_a_run_with_noise_is_told_recorded_and_opened_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*QUICK, "--num_train_epochs", "1", "--label_noise", "0.2", "--seed", "3", "--save_strategy", "epoch"]
    folder = tmp_path / "run"
    job.main([*arguments, "--dry_run"])
    job.main([*arguments, "--output_dir", str(folder), "--ledger", str(tmp_path / "ledger.jsonl")])
    told = "60 images to train, 12 of them with another label, 500 to test"
    assert " ".join(capsys.readouterr().out.split()).count(told) == 2  # the plan breaks its lines
    assert told in (folder / "README.md").read_text()
    assert "label_noise: 0.2" in (folder / "config.yaml").read_text()
    (line,) = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert line["settings"]["label_noise"] == 0.2
    opened = open_run(folder)
    assert (labels_of(opened.task)[0] == labels_of(task_of("--label_noise", "0.2", "--seed", "3"))[0]).all()
    assert opened.task.fingerprints == line["execution"]["data"]
    assert "has changed since" not in capsys.readouterr().out
    assert sum(len(batch["labels"]) for batch in opened.training_batches(None, 50)) == 60, "uneven classes, all taken"
    with pytest.raises(ValueError, match=r"was made with other settings: label_noise: 0.2 -> 0.4; "):
        job.main([*arguments, "--label_noise", "0.4", "--output_dir", str(folder), "--resume_from_checkpoint", "last"])
    compared = ["--optim", "sgd", "--compare_with", str(folder), "--output_dir", str(tmp_path / "other")]
    job.main([*QUICK, "--label_noise", "0.2", "--seed", "4", *compared])
    card = (tmp_path / "other" / "README.md").read_text()
    assert "`seed` `3`, here `4`" in card
    assert "have changed under their name" not in card, "the seed explains the other labels"


def test_a_run_without_noise_is_recorded_as_ever() -> None:
    plain, noisy = (settings_of(*options.parse(words)) for words in ([], ["--label_noise", "0.2"]))
    assert "label_noise" not in plain
    assert {**plain, "label_noise": 0.2} == noisy
    assert differences(plain, noisy) == {"label_noise": (None, 0.2)}, "an older run had none"


def test_flatness_compares_runs_of_the_same_noise() -> None:
    def run(**settings: Any) -> Any:
        return SimpleNamespace(folder="run", settings=settings)

    _check_same_data(run(seed=1), run(seed=2))
    with pytest.raises(ValueError, match=r"trained on different data.*label_noise None and 0.2"):
        _check_same_data(run(seed=1), run(seed=1, label_noise=0.2))
    with pytest.raises(ValueError, match=r"trained on different data.*seed 1 and 2"):
        _check_same_data(run(seed=1, label_noise=0.2), run(seed=2, label_noise=0.2))
