"""A small classifier and its training by `RecipeTrainer`, for the methods that AMP is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin.data.callback import EpochCallback
from amp_plugin.data.images import ImageSplit
from amp_plugin.data.loader import ImageBatches
from amp_plugin.data.settings import DatasetSettings
from amp_plugin.train import options
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


IN_PROCESSES: dict[str, dict[str, Any]] = {
    "flooding": {"flood_level": 1.3},
    "adversarial training": {"adversarial_epsilon": 0.1},
    "rmp": {"optim": "rmp", "rmp_epsilon": 0.3},
    "asam": {"optim": "asam"},
}
