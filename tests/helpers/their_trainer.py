"""A Trainer as another library would write it: a loss, an optimizer and a log entry of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from amp_plugin import AMPArguments

EXAMPLES, MICRO_BATCH, EPOCHS = 22, 2, 2
SETTINGS: dict[str, Any] = {
    "optim": "amp_adamw_torch",
    "amp_epsilon": 0.1,
    "amp_inner_lr": 0.5,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": 4,  # 11 micro-batches: the last window has 3
    "num_train_epochs": EPOCHS,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


class Net(nn.Module):
    """A classifier of tokens without a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.config = SimpleNamespace()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x)}


class Shared:
    """A loss with a temperature, and batches in order."""

    args: Any
    train_dataset: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        summed = F.cross_entropy(outputs["logits"] / self.args.temperature, inputs["labels"], reduction="sum")
        loss = summed / (len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@dataclass
class TheirConfig(TrainingArguments):
    """Arguments of a library."""

    temperature: float = field(default=2.0)


@dataclass
class TheirAMPConfig(TheirConfig, AMPArguments):
    """Arguments of a library, and AMP's."""


class TheirTrainer(Shared, Trainer):
    """A Trainer of a library: a loss, an optimizer, a log entry of its own."""

    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.steps += 1
        return super().training_step(*args, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer, {**kwargs, "betas": (0.8, 0.9)}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "steps": self.steps}, *args, **kwargs)


def dataset() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 5, generator=generator)
    labels = torch.randint(3, (EXAMPLES,), generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
