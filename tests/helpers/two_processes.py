"""Trains a small model, alone or under torchrun, for test_transformers.py: weights, and whether replicas agree."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from leaving import leave
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from amp_plugin import AMPTrainer, AMPTrainingArguments

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InOrder(AMPTrainer):
    losses, overflow_at = 0, 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.losses == self.overflow_at and RANK == WORLD - 1 else loss


def train(folder: str, *, sync: bool, accumulation: int, overflow_at: int = 0) -> tuple[Tensor, bool]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(48, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (48,), generator=generator)
    args = AMPTrainingArguments(
        folder,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8 // WORLD,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        amp_epsilon=0.1,
        amp_inner_lr=0.5,
        amp_inner_iter=2,
        amp_sync_ascent=sync,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if WORLD > 1 else None,
    )
    model = Net()
    data: Any = [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    trainer = InOrder(model=model, args=args, train_dataset=data)
    trainer.overflow_at = overflow_at
    trainer.train()
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    replicas = [torch.empty_like(weights) for _ in range(WORLD)] if WORLD > 1 else [weights]
    if WORLD > 1:
        torch.distributed.all_gather(replicas, weights)
    return weights, all(torch.equal(r, weights) for r in replicas)


results = {
    f"{'synced' if sync else 'local'}, {k} micro-batches": train(sys.argv[1], sync=sync, accumulation=k)
    for sync in (True, False)
    for k in (1, 2)
}
if WORLD > 1:
    results["local, overflow"] = train(sys.argv[1], sync=False, accumulation=1, overflow_at=4)
if RANK == 0:
    torch.save(results, Path(sys.argv[1]) / f"{WORLD}.pt")
if WORLD > 1:
    leave()
