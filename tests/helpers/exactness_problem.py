"""The small problem of the exactness table, which every host can train, and the table's cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from problems import SGD_ARGS, small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, SIZE = 10, 8  # optimizer steps; images in a micro-batch
SGD: dict[str, Any] = {**SGD_ARGS, "lr": 0.05}
BALL: dict[str, Any] = {"epsilon": 0.2, "inner_lr": 0.5, "inner_iter": 2}
Batch = tuple[Tensor, Tensor]

# And how they accumulate: one perturbation for all micro-batches of a step, or one for each micro-batch.
HOSTS = {
    "closure": "window",
    "ascend and step": "window",
    "attach": "each",
    "timm task": "each",
    "stock Trainer": "each",
    "AMPTrainer": "window",
    "accelerate, attach": "each",
    "accelerate, amp_backward": "window",
}
# What the passes are computed in, by the name that accelerate has for it; the weights are float32.
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MICRO_BATCHES, PROCESSES, COMPILE = (1, 3), (1, 2), ("no", "inductor")


class Cell(NamedTuple):
    """One training: host, mixed precision, micro-batches in a step of a process, processes, backend of the compiler."""

    host: str
    precision: str
    micro_batches: int
    processes: int
    compile: str
    perturbed: bool = True

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the autocast passes."""
        return AUTOCAST[self.precision]

    @property
    def ball(self) -> dict[str, Any]:
        """AMP's own arguments."""
        return {**BALL, "epsilon": BALL["epsilon"] * self.perturbed}


def cells_of(compiler: str) -> list[Cell]:
    """Those of the table, and last the same without perturbation, for a look at how much that does."""
    cells = [
        Cell(host, precision, k, n, compiler)
        for host in HOSTS
        for precision in AUTOCAST
        for n in PROCESSES
        for k in MICRO_BATCHES
    ]
    return cells + [cell._replace(perturbed=False) for cell in cells if (cell.host, cell.precision) == ("attach", "no")]


class Result(NamedTuple):
    """What a training ended with."""

    weights: dict[str, Tensor]
    graphs: int  # that were compiled
    refusal: str = ""  # the message of the host, which did not train


class Net(nn.Module):
    """Smooth, since rounding moves a few inputs of a ReLU across its kink. Returns logits; with labels the loss too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_net(activation=nn.SiLU)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(pixel_values)
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def batches_of(cell: Cell) -> list[list[list[Batch]]]:
    """By step, micro-batch and process, in the order in which the Trainer's loader deals them out."""
    every = iter(small_batches(STEPS * cell.micro_batches * cell.processes, SIZE))
    return [[[next(every) for _ in range(cell.processes)] for _ in range(cell.micro_batches)] for _ in range(STEPS)]
