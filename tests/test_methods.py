"""The methods that AMP is compared with, each against a few lines written from its paper: the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin.data.callback import EpochCallback
from amp_plugin.data.images import ImageSplit
from amp_plugin.data.loader import ImageBatches
from amp_plugin.data.settings import DatasetSettings
from amp_plugin.train import options
from amp_plugin.train.methods.mixup import MixedBatches
from amp_plugin.train.trainer import RecipeTrainer

SAMPLES, BATCH, CLASSES, EPOCHS, LR, DECAY = 20, 4, 4, 2, 0.05, 1e-2
SETTINGS = DatasetSettings((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
MEAN, STD = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (SETTINGS.mean, SETTINGS.std))
Batch = dict[str, Tensor]


class Net(nn.Module):
    """A small classifier in float64; without BatchNorm, unless asked for, a window equals one large batch."""

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(5) if batch_norm else nn.Identity()
        layers = [nn.Conv2d(3, 5, 3), norm, nn.GELU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(80, CLASSES)]
        self.layers = nn.Sequential(*layers).double()
        self.config = SimpleNamespace()  # the Trainer looks at it when labels are smoothed

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InOrder(RecipeTrainer):
    """Without shuffling, so that the batches are known."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def images(kind: Callable[..., ImageBatches] = ImageBatches, samples: int = SAMPLES) -> ImageBatches:
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(samples, 6, 6, 3), dtype=np.uint8)
    pixels[:, :2] = rng.choice(np.array([0, 255], dtype=np.uint8), size=(samples, 2, 6, 3))  # where clipping matters
    return kind(ImageSplit(pixels, rng.integers(CLASSES, size=samples)), SETTINGS, seed=3)


def in_double(batch: Any) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def arguments(folder: Path, **kwargs: Any) -> options.RecipeArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": LR,
        "weight_decay": DECAY,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return options.RecipeArguments(**{**defaults, **kwargs})


def trained(folder: Path, model: nn.Module | None = None, data: ImageBatches | None = None, **kwargs: Any) -> InOrder:
    trainer = InOrder(
        model=model or Net(),
        args=arguments(folder, **kwargs),
        train_dataset=data or images(),
        eval_dataset=images(),
        data_collator=in_double,
        callbacks=[EpochCallback()],
    )
    trainer.train(resume_from_checkpoint=trainer.args.checkpoint_to_resume())
    return trainer


def batches(data: ImageBatches | None = None, size: int = BATCH) -> Iterator[Batch]:
    data = data or images()
    for epoch in range(EPOCHS):
        data.set_epoch(epoch)
        for start in range(0, SAMPLES, size):
            yield in_double(data.__getitems__(range(start, min(start + size, SAMPLES))))


Step = Callable[[nn.Module, Tensor, Tensor], Any]  # leaves the gradient that the optimizer takes


def reference(step: Step, model: nn.Module | None = None, data: ImageBatches | None = None, size: int = BATCH) -> Net:
    model = model or Net()
    sgd = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=DECAY)
    for batch in batches(data, size):
        sgd.zero_grad()
        step(model, batch["pixel_values"], batch["labels"])
        sgd.step()
    return model  # type: ignore[return-value]


def logits_of(model: Any, x: Tensor) -> Tensor:
    return model(x)["logits"]


def cross_entropy(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(model, x), y)


def assert_same_weights(ours: Any, theirs: Any, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    assert ours is not theirs
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def moved_far(model: Any, other: Any) -> bool:
    return any((p - q).abs().max() > 1e-4 for p, q in zip(model.parameters(), other.parameters(), strict=True))


# --- losses


def label_smoothed(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(logits_of(model, x), y, label_smoothing=0.2).backward()


def flooded(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = cross_entropy(model, x, y)
    ((loss - 1.3).abs() + 1.3).backward()


def attacked(model: nn.Module, x: Tensor, y: Tensor) -> None:
    pixels = (x * STD + MEAN).requires_grad_()
    cross_entropy(model, (pixels - MEAN) / STD, y).backward()
    assert pixels.grad is not None
    worst = (pixels.detach() + 0.1 * pixels.grad.sign()).clamp(0, 1)
    model.zero_grad()
    cross_entropy(model, (worst - MEAN) / STD, y).backward()


LOSSES: dict[str, tuple[dict[str, Any], Step]] = {
    "label smoothing": ({"label_smoothing_factor": 0.2}, label_smoothed),
    "flooding": ({"flood_level": 1.3}, flooded),
    "adversarial training": ({"adversarial_epsilon": 0.1}, attacked),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", LOSSES)
def test_the_trajectory_of_another_loss(tmp_path: Path, method: str, accumulation: int) -> None:
    chosen, step = LOSSES[method]
    kwargs = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    ours = trained(tmp_path, **kwargs, **chosen).model
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if method == "label smoothing" else {}  # transformers sums it in float32
    assert_same_weights(ours, reference(step), **tolerance)
    assert moved_far(ours, reference(lambda m, x, y: cross_entropy(m, x, y).backward()))


# --- mixup


def mixed_images() -> ImageBatches:
    return images(lambda *args, **kwargs: MixedBatches(*args, alpha=0.8, classes=CLASSES, **kwargs))


def test_mixup_is_the_cross_entropy_of_both_labels_in_proportion(tmp_path: Path) -> None:
    """Recover the proportion from the mixed labels, mix the images by hand, and weigh the losses of hard labels."""
    plain = batches()

    def mixed(model: nn.Module, x: Tensor, shares: Tensor) -> None:
        batch = next(plain)
        y, other = batch["labels"], batch["labels"].roll(1)
        k = int((y != other).nonzero()[0])
        lam = shares[k, y[k]]
        x = lam * batch["pixel_values"] + (1 - lam) * batch["pixel_values"].roll(1, 0)
        (lam * cross_entropy(model, x, y) + (1 - lam) * cross_entropy(model, x, other)).backward()

    data = mixed_images()
    ours = trained(tmp_path, data=data, mixup_alpha=0.8).model
    assert_same_weights(ours, reference(mixed, data=mixed_images()), rtol=1e-5, atol=1e-6)  # images are in float32
    assert moved_far(ours, reference(lambda m, x, y: cross_entropy(m, x, y).backward()))


# --- optimizers


def displaced(model: nn.Module, x: Tensor, y: Tensor, displacement: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """The gradient at theta + displacement(gradient at theta)."""
    params = list(model.parameters())
    theta = [p.detach().clone() for p in params]
    gradients = torch.autograd.grad(cross_entropy(model, x, y), params)
    with torch.no_grad():
        for p, d in zip(params, displacement(list(gradients)), strict=True):
            p += d
    cross_entropy(model, x, y).backward()
    with torch.no_grad():
        for p, old in zip(params, theta, strict=True):
            p.copy_(old)


def sam(model: nn.Module, x: Tensor, y: Tensor) -> None:
    displaced(model, x, y, lambda grads: [0.3 * g / torch.cat([g.flatten() for g in grads]).norm() for g in grads])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trajectory_of_sam(tmp_path: Path, accumulation: int) -> None:
    kwargs = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trained(tmp_path, optim="sam", sam_rho=0.3, **kwargs)
    assert_same_weights(trainer.model, reference(sam))
    record = trainer.state.log_history[0]
    assert record["perturbation_norm"] == pytest.approx(0.3)
    assert record["sharpness"] == pytest.approx(record["perturbed_loss"] - record["loss"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trajectory_of_asam(tmp_path: Path, accumulation: int) -> None:
    """Against pytorch_optimizer's."""
    theirs = pytest.importorskip("pytorch_optimizer")
    kwargs = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    ours = trained(tmp_path, optim="asam", **kwargs).model
    model = Net()
    sgd = {"lr": LR, "momentum": 0.9, "nesterov": True, "weight_decay": DECAY}
    optimizer = theirs.SAM(model.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, **sgd)
    for batch in batches():

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model, batch["pixel_values"], batch["labels"])
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    assert_same_weights(ours, model, rtol=1e-5, atol=1e-7)  # they keep the norm in float32
    assert moved_far(ours, reference(sam))


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trajectory_of_random_model_perturbation(tmp_path: Path, accumulation: int, norm: str) -> None:
    kwargs = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    ours = trained(tmp_path, optim="rmp", rmp_epsilon=0.3, amp_norm=norm, seed=7, **kwargs).model
    steps = iter(range(EPOCHS * SAMPLES // BATCH))

    def perturbed(model: nn.Module, x: Tensor, y: Tensor) -> None:
        seed = np.random.SeedSequence([7, next(steps)]).generate_state(1, np.uint64)
        noise = torch.Generator().manual_seed(int(seed[0]))

        def displacement(grads: list[Tensor]) -> list[Tensor]:
            drawn = [torch.randn(g.shape, generator=noise, dtype=g.dtype) for g in grads]
            norms = [d.norm() for d in drawn]
            if norm == "global":
                norms = [torch.stack(norms).norm()] * len(norms)
            return [0.3 * d / n for d, n in zip(drawn, norms, strict=True)]

        displaced(model, x, y, displacement)

    # The Trainer lists the parameters with weight decay first; here they all have it, in the model's order.
    assert_same_weights(ours, reference(perturbed))
    assert moved_far(ours, reference(lambda m, x, y: cross_entropy(m, x, y).backward()))
