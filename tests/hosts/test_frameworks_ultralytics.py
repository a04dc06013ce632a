"""Ultralytics' trainers of YOLO, whose models return a tuple of a loss for each term and what is logged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import host_problem as problem
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from amp_plugin import AMP, attach

pytest.importorskip("ultralytics", reason="needs Ultralytics")

from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

SIZE, BATCH = 32, 4
BALL = {"epsilon": 0.1, "inner_lr": 0.05}


class SummedLoss(DetectionModel):
    """A model whose loss is the sum of its terms, which the stock trainer sums outside."""

    def loss(self, batch: Any, preds: Any = None) -> Any:
        loss, items = super().loss(batch, preds)
        return loss.sum(), items


class Trained(DetectionTrainer):
    """The trainer of the page, which keeps what it sees."""

    ball: Any = BALL

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        self.seen: list[dict[str, Tensor]] = []
        return SummedLoss(cfg, nc=self.data["nc"], ch=self.data["channels"], verbose=False)

    def build_optimizer(self, model: nn.Module, name: str = "auto", *args: Any, **kwargs: Any) -> Any:
        stock = super().build_optimizer(model, "SGD", *args, **kwargs)
        return stock if self.ball is None else AMP(stock.param_groups, **self.ball)

    def _setup_train(self) -> None:
        super()._setup_train()
        if self.ball is not None:
            attach(self.optimizer, self.model)

    def optimizer_step(self) -> None:
        self.seen.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        super().optimizer_step()


class Checked(Trained):
    """Compares the gradient of each micro-batch with that of AMP written out, float32 as it is."""

    def preprocess_batch(self, batch: Any) -> Any:
        batch = super().preprocess_batch(batch)
        if self.model.training:
            self.before = (
                copy.deepcopy(self.model),
                {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()},
            )
        return batch

    def optimizer_step(self) -> None:
        model, batch = self.before
        model.train()
        for p in model.parameters():
            p.grad = None
        assert self.accumulate == 1
        problem.set_gradients_of_amp(model, lambda point: point.loss(batch)[0], ball=BALL)
        super().optimizer_step()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert self.seen[-1].keys() == expected.keys()
        whole = torch.cat([g.flatten() for g in expected.values()])
        off = torch.cat([(self.seen[-1][name] - g).flatten() for name, g in expected.items()])
        assert off.norm() < 1e-3 * whole.norm()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as Ultralytics wants it, of noise with one box an image."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    for i in range(3 * BATCH):
        pixels = draws.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "train" / f"{i}.png")
        (tmp_path / "labels" / "train" / f"{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.5 0.4\n")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/train\nnames: [a, b]\n")
    return data


def train(kind: type[Trained], data: Path, **changes: Any) -> Trained:
    overrides = {
        "model": "yolov8n.yaml", "data": str(data), "epochs": 1, "imgsz": SIZE, "batch": BATCH, "nbs": BATCH,
        "device": "cpu", "workers": 0, "plots": False, "val": False, "amp": False, "warmup_epochs": 0, "lr0": 0.01,
        "project": str(data.parent / "runs"), "verbose": False, "deterministic": True, "save": False, "exist_ok": True,
        **changes,
    }  # fmt: skip
    trainer = kind(overrides=overrides)
    trainer.train()
    return trainer


def test_each_step_has_amps_gradient_and_the_average_is_of_the_weights(images: Path) -> None:
    with problem.ascents_counted() as number:
        trainer = train(Checked, images)
        assert number() == len(trainer.seen) == 3
    assert not trainer.optimizer.perturbed
    assert trainer.ema.updates == 3


def test_without_epsilon_it_is_the_base_optimizer(images: Path) -> None:
    class Stock(Trained):
        ball = None

    class Zero(Trained):
        ball: Any = {"epsilon": 0.0}  # noqa: RUF012

    stock, zero = train(Stock, images), train(Zero, images)
    problem.assert_same_bits(dict(zero.model.named_parameters()), dict(stock.model.named_parameters()))
    problem.assert_same_bits(zero.ema.ema.state_dict(), stock.ema.ema.state_dict())
