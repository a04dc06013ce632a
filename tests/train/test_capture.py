"""The main job with captured steps and resident images, recorded and replayed on a CPU: the plain job, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from main_job import metrics_of
from safetensors.torch import load_file
from tape import on_tape

from amp_plugin.core import captured_call
from amp_plugin.train import job
from amp_plugin.train.trainer import RecipeTrainer

JOB = [
    *("--train_images", "50", "--per_device_train_batch_size", "10", "--num_train_epochs", "2"),
    *("--model_kwargs", '{"width": 4, "layers": [1, 1, 1, 1]}', "--use_cpu", "true", "--cpu_threads", "1"),
    *("--save_strategy", "epoch", "--logging_strategy", "steps", "--logging_steps", "1", "--channels_last", "true"),
]
OF_ONE_PROCESS = ("runtime", "per_second", "train_loss")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels of a captured step in any step; another kernel rounds otherwise."""
    choose = RecipeTrainer.get_optimizer_cls_and_kwargs

    def with_fused(args: Any, model: Any = None) -> tuple[Any, Any]:
        optimizer, kwargs = choose(args, model)
        return optimizer, kwargs | {"fused": True}

    monkeypatch.setattr(RecipeTrainer, "get_optimizer_cls_and_kwargs", staticmethod(with_fused))


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that were captured."""
    made: list[Any] = []

    def record(call: Any, stream: Any) -> Any:
        made.append(call)
        return on_tape(call)

    monkeypatch.setitem(captured_call.RECORDERS, "cpu", record)
    return made


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(OF_ONE_PROCESS)} for line in lines]


def assert_same(whole: Path, other: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert records(whole) == records(other)


@pytest.mark.parametrize(
    "more",
    [
        ["--augment", "cutout", "--amp_ascent", "split(0.25)"],
        [*["--augment", "autoaugment", "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "3"]],
        ["--optim", "sgd", "--mixup_alpha", "0.2", "--train_images", "46"],
        ["--optim", "sam", "--flood_level", "2.2", "--label_noise", "0.2", "--corrupted_test_images", "20"],
    ],
    ids=" ".join,
)
def test_a_captured_job_is_the_job_as_it_is(
    more: list[str], tmp_path: Path, fused: None, tapes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job.main([*JOB, *more, "--output_dir", "eager"])
    assert not tapes
    captured = [*JOB, *more, "--capture", "true", "--output_dir"]
    job.main([*captured, "captured"])
    assert len(tapes) >= 4, "the augmentation, the passes, the clipping and the step"
    assert_same(tmp_path / "eager", tmp_path / "captured")

    # What is left is what a kill after the first epoch would leave.
    job.main([*captured, "killed"])
    last = max(int(folder.name.split("-")[1]) for folder in (tmp_path / "killed").glob("checkpoint-*"))
    shutil.rmtree(tmp_path / "killed" / f"checkpoint-{last}")
    (tmp_path / "killed" / "model.safetensors").unlink()
    job.main([*captured, "killed", "--resume_from_checkpoint", "last"])
    assert_same(tmp_path / "eager", tmp_path / "killed")
    assert metrics_of(tmp_path / "killed")["resumed_at_step"] == last // 2
