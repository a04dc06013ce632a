"""Test `--corrupted_test_images`: the final model on corrupted images, and where its figures are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_processes
from main_job import QUICK, SCRIPT, metrics_of

from amp_plugin.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from amp_plugin.metrics import classification_scores
from amp_plugin.report import read_ledger
from amp_plugin.train import job, options, results
from amp_plugin.train.run_folder import open_run
from amp_plugin.train.settings import settings_of
from amp_plugin.train.tasks import make_task

JOB = [*QUICK, "--num_train_epochs", "1"]
FIGURES = [f"corrupted_{c}{name}" for c in (*(f"{c}_" for c in CORRUPTIONS), "") for name in ("error", "nll", "ece")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's folder, with its ledger, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(results, "tell", said.append)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        more = ["--corrupted_test_images", "40", "--per_device_eval_batch_size", "30", "--save_strategy", "epoch"]
        job.main([*JOB, *more, "--output_dir", str(folder / "run"), "--ledger", str(folder / "ledger.jsonl")])
    return folder, "\n".join(said)


def figures_of(folder: Path, places: list[int]) -> dict[str, float]:
    """The figures that a run should have found, of its saved model on the test images in some places."""
    task = open_run(folder).task
    test: Any = task.test
    images, labels = test.split.images[places], test.split.labels[places]
    centre, scale = (torch.tensor(v).view(3, 1, 1) for v in (test.settings.mean, test.settings.std))
    found: dict[str, list[float]] = {}
    for corruption in CORRUPTIONS:
        for severity in SEVERITIES:
            pixels = torch.tensor(corrupt(images, corruption, severity)).permute(0, 3, 1, 2) / 255
            with torch.no_grad():
                logits = task.model.eval()(((pixels - centre) / scale).to(task.model.device)).logits
            for name, value in classification_scores(logits, labels).items():
                for key in (f"corrupted_{corruption}_{name}", f"corrupted_{name}"):
                    found.setdefault(key, []).append(value)
    return {name: mean(found[name]) for name in FIGURES}


def test_the_figures_are_those_of_the_saved_model_on_corrupted_images(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    found = metrics_of(folder / "run")
    expected = figures_of(folder / "run", [12 * i + i // 2 for i in range(40)])  # 500 / 40 = 12.5
    assert {name: found[name] for name in FIGURES} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    (line,) = read_ledger(folder / "ledger.jsonl")
    assert {name: line["metrics"][name] for name in FIGURES} == {name: found[name] for name in FIGURES}
    assert line["settings"]["corrupted_test_images"] == 40


def test_card_table_and_settings_tell_of_the_test(finished: tuple[Path, str]) -> None:
    folder, said = finished
    found, card = metrics_of(folder / "run"), (folder / "run" / "README.md").read_text()
    assert f"corrupted error  {found['corrupted_error']:.2f} %" in said
    assert "On 40 images of that split, corrupted at five severities" in card
    assert "|  | error (%) | NLL (nats) | ECE |\n| --- | ---: | ---: | ---: |\n| Gaussian noise | " in card
    figures = [found[f"corrupted_{name}"] for name in ("error", "nll", "ece")]
    assert "| mean | {:.2f} | {:.4f} | {:.4f} |".format(*figures) in card
    assert "--corrupted_test_images 40" in card
    assert "corrupted_test_images: 40" in (folder / "run" / "config.yaml").read_text()
    state = json.loads((folder / "run" / "trainer_state.json").read_text())
    assert not [r for r in state["log_history"] if any("corrupted" in name for name in r)]


def test_there_is_no_such_test_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = options.parse([*QUICK, "--output_dir", "out"])
    assert make_task(*parsed).to_corrupt is None
    assert "corrupted_test_images" not in settings_of(*parsed)
    job.main([*QUICK, "--dry_run", "--corrupted_test_images", "40"])
    assert "500 to test and 40 of them corrupted, 20 times" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("asked", "held_out", "there"), [("9999", [], 500), ("80", ["--validation_images", "70"], 70)])
def test_all_images_are_taken_where_more_are_asked_for(asked: str, held_out: list[str], there: int) -> None:
    task = make_task(*options.parse([*QUICK, *held_out, "--corrupted_test_images", asked]))
    assert task.to_corrupt is not None
    assert len(task.to_corrupt) == there == len(task.test)
    assert np.array_equal(task.to_corrupt.split.labels, task.test.split.labels)


def test_texts_are_not_corrupted() -> None:
    with pytest.raises(ValueError, match="--corrupted_test_images is for images, and there is a --text_column"):
        options.parse(["--text_column", "text", "--pretrained", "x", "--corrupted_test_images", "5"])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("error", [MemoryError("out of memory"), KeyboardInterrupt()], ids=["fails", "Ctrl-C"])
def test_a_failure_there_loses_nothing_and_the_same_command_makes_it_good(
    finished: tuple[Path, str], error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    folder, ledger = tmp_path / "run", tmp_path / "ledger.jsonl"
    command = [*JOB, "--corrupted_test_images", "40", "--per_device_eval_batch_size", "30", "--save_strategy", "epoch"]
    command += ["--output_dir", str(folder), "--ledger", str(ledger), "--resume_from_checkpoint", "last"]
    with monkeypatch.context() as patch:
        patch.setattr(results, "corrupted_test", fail)
        with pytest.raises(SystemExit) as left:
            job.run(command)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert any("eval_error" in record for record in state["log_history"]), "the clean test is there"
    assert (folder / "model.safetensors").is_file()
    assert not ledger.exists()
    assert not (folder / "run.json").exists()
    if isinstance(error, MemoryError):
        assert "error: the test on corrupted images failed: MemoryError: out of memory; without it" in str(left.value)
        assert "eval_error" in metrics_of(folder)
        assert not metrics_of(folder).keys() & set(FIGURES)
    job.main(command)
    (line,), (whole,) = read_ledger(ledger), read_ledger(finished[0] / "ledger.jsonl")
    assert {name: line["metrics"][name] for name in FIGURES} == {name: whole["metrics"][name] for name in FIGURES}


@pytest.mark.slow
def test_two_processes_test_each_image_once(tmp_path: Path) -> None:
    """The network has no BatchNorm, whose running statistics each process has for itself."""
    words = [*JOB, "--per_device_eval_batch_size", "8", "--corrupted_test_images", "41", "--model"]
    words += [
        "vit_tiny_patch16_224",
        "--model_kwargs",
        '{"patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 1}',
    ]
    run_processes(2, str(SCRIPT), *words, "--output_dir", "out", folder=tmp_path)
    found = metrics_of(tmp_path / "out")
    expected = figures_of(tmp_path / "out", [500 * i // 41 for i in range(41)])
    assert {name: found[name] for name in FIGURES} == pytest.approx(expected, rel=1e-4, abs=1e-6)
