"""Test that a training goes on with the data it began with, and that a run is compared on the same data."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from image_folders import picture, write_folder
from main_job import QUICK

from amp_plugin.train import job
from amp_plugin.train.run_folder import open_run
from amp_plugin.train.trainer import RecipeTrainer

JOB = [
    *("--image_column", "image", "--label_column", "label", "--augment", "none", "--save_strategy", "epoch"),
    *("--num_train_epochs", "1", "--per_device_train_batch_size", "4", *QUICK[-6:]),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a data set and a run of one epoch on it, beside each other."""
    folder = tmp_path_factory.mktemp("finished")
    write_folder(folder / "pets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        job.main([*JOB, "--dataset", str(folder / "pets"), "--output_dir", str(folder / "run")])
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def resume(folder: Path) -> None:
    """Continue the run, up to its first step, where an InterruptedError is raised."""

    def train(*_: object, **__: object) -> None:
        raise InterruptedError

    command = ["--dataset", str(folder / "pets"), "--output_dir", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeTrainer, "train", train)
        job.main([*JOB, *command, "--resume_from_checkpoint", "last"])


def test_the_same_data_in_another_place_continue_a_run(copied: Path) -> None:
    with pytest.raises(InterruptedError):
        resume(copied)


def another_image(pets: Path) -> None:
    picture(99).save(pets / "train" / "cat" / "3.png")


def an_image_more(pets: Path) -> None:
    picture(99).save(pets / "train" / "dog" / "9.png")


def an_image_less(pets: Path) -> None:
    (pets / "test" / "dog" / "3.png").unlink()


def another_label(pets: Path) -> None:
    """The label of an image is its folder; the order of the images and the images stay the same."""
    (pets / "test" / "dog" / "0.png").rename(pets / "test" / "cat" / "9.png")


def another_name(pets: Path) -> None:
    for split in ("train", "test"):
        (pets / split / "dog").rename(pets / split / "owl")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_image, "the examples to train on"),
        (an_image_more, "the examples to train on"),
        (an_image_less, "the examples to test on"),
        (another_label, "the examples to test on"),
        (another_name, "the names of the classes"),
    ],
)
def test_data_that_have_changed_under_their_name_continue_no_run(
    copied: Path, change: Callable[[Path], None], told: str
) -> None:
    change(copied / "pets")
    with pytest.raises(ValueError, match="was made with other data") as raised:
        resume(copied)
    checkpoint = str(copied / "run" / "checkpoint-2")
    assert str(raised.value) == (
        f"{checkpoint!r} was made with other data: in data set 'pets' {told} have changed since; give the data as they"
        " were to continue, or another --output_dir to start a new run"
    )


def test_a_checkpoint_that_tells_nothing_of_its_data_is_taken(copied: Path) -> None:
    path = copied / "run" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunSettings"]["args"]["data"]
    path.write_text(json.dumps(state))
    another_image(copied / "pets")
    with pytest.raises(InterruptedError):
        resume(copied)


def test_a_run_is_opened_on_changed_data_with_a_note(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = copied / "run" / "run.json"
    told = json.loads(record.read_text())
    told["settings"]["dataset"] = str(copied / "pets")  # the record has the name alone
    record.write_text(json.dumps(told))
    open_run(copied / "run")
    assert capsys.readouterr().out == ""
    another_image(copied / "pets")
    open_run(copied / "run")
    assert capsys.readouterr().out.startswith("note: data set 'pets' has changed since the run in")


@pytest.mark.usefixtures("no_pictures")
def test_a_card_tells_that_the_compared_run_had_other_data(copied: Path) -> None:
    command = [*JOB, "--dataset", str(copied / "pets"), "--optim", "sgd", "--compare_with", str(copied / "run")]
    job.main([*command, "--output_dir", str(copied / "same")])
    assert "All settings but the optimizer are the same." in (copied / "same" / "README.md").read_text()
    another_image(copied / "pets")
    job.main([*command, "--output_dir", str(copied / "changed")])
    told = "The runs also differ in: the data, which have changed under their name."
    assert told in (copied / "changed" / "README.md").read_text()
    job.main([*command, "--train_images", "4", "--output_dir", str(copied / "fewer")])
    card = (copied / "fewer" / "README.md").read_text()
    assert "The runs also differ in: `train_images` not set, here `4`." in card, "which explains the other data"
