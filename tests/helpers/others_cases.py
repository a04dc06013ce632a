"""Trains a net that several optimizers share in two processes, for test_gradients_of_others.py, as torchrun starts it.

AMP has a part of the parameters: a head on a backbone that another optimizer trains, or a net beside a learnable weight
of its loss. Every process writes its weights to `<folder>/<rank>.pt`.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from leaving import leave
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, amp_backward, attach

WORLD, STEPS, LR, OTHER_LR, CLIP = 2, 4, 0.1, 0.05, 1.0
BALL: dict[str, Any] = {"epsilon": 0.3, "inner_lr": 0.5}
Batch = dict[str, Tensor]
Door = Literal["attach inside", "attach around", "amp_backward", "AMPTrainer"]
DOORS: tuple[Door, ...] = ("attach inside", "attach around", "amp_backward", "AMPTrainer")
OWNED = {"a head": ("head",), "a net beside a weight of its loss": ("backbone", "head")}


@dataclass(frozen=True)
class Case:
    """What a training is like.

    Attributes:
        door: attached is the module in DDP, or DDP.
        owned: what AMP has; a key of `OWNED`.
        micro_batches: of a step, in each process; DDP averages only at the last of them.
        bucket_view: whether the gradients are views of DDP's buckets.
    """

    door: Door
    owned: str
    micro_batches: int
    inner_iter: int
    bucket_view: bool


CASES = [
    Case(*values)
    for values in itertools.product(DOORS, OWNED, (1, 3), (1, 2), (False, True))
    if values[0] != "AMPTrainer" or not values[-1]
]


class Net(nn.Module):
    """A classifier with a learnable weight of its loss, as uncertainty weighting has one."""

    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.zeros(()))
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.head(torch.tanh(self.backbone(3 * x))), labels)
        return {"loss": loss * torch.exp(-self.weight) + self.weight}

    def split(self, owned: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of AMP and those of others."""
        named = [(name.partition(".")[0] in OWNED[owned], p) for name, p in self.named_parameters()]
        return [p for own, p in named if own], [p for own, p in named if not own]


def batch_of(step: int, micro_batch: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    x = 2 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": torch.randint(3, (4,), generator=generator)}


def by_hand(case: Case) -> list[list[Tensor]]:
    """Train in one process on the batches of all, with AMP written down directly; return the weights of each step."""
    net = Net()
    own, others = net.split(case.owned)
    trajectory = []
    for step in range(STEPS):
        whole = []
        for k in range(case.micro_batches):
            parts = [batch_of(step, k, rank) for rank in range(WORLD)]
            whole.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        # Each micro-batch of an attached module has a perturbation of its own; elsewhere the window has one.
        groups = [[batch] for batch in whole] if case.door.startswith("attach") else [whole]
        total = [torch.zeros_like(p) for p in net.parameters()]
        for group in groups:
            deltas = [torch.zeros_like(p) for p in own]
            for i in range(case.inner_iter + 1):
                at = copy.deepcopy(net)
                with torch.no_grad():
                    for p, delta in zip(at.split(case.owned)[0], deltas, strict=True):
                        p.add_(delta)
                losses = torch.stack([at(**batch)["loss"] for batch in group])
                of = at.split(case.owned)[0] if i < case.inner_iter else list(at.parameters())
                grads = torch.autograd.grad(losses.mean(), of)
                if i < case.inner_iter:
                    deltas = [d + BALL["inner_lr"] * g for d, g in zip(deltas, grads, strict=True)]
                    deltas = [d * min(1.0, BALL["epsilon"] / float(d.norm())) for d in deltas]
            total = [t + g / len(groups) for t, g in zip(total, grads, strict=True)]
        shrunk = min(1.0, CLIP / (float(torch.cat([g.flatten() for g in total]).norm()) + 1e-6))
        others_ids = {id(p) for p in others}
        with torch.no_grad():
            for p, g in zip(net.parameters(), total, strict=True):
                p.sub_((OTHER_LR if id(p) in others_ids else LR) * shrunk * g)
        trajectory.append([p.detach().clone() for p in net.parameters()])
    return trajectory


def in_process(case: Case) -> Iterator[list[Tensor]]:
    """Train in this process of several; yield the weights after each step."""
    net, rank = Net(), dist.get_rank()
    own, others = net.split(case.owned)
    amp: Any = AMP(own, LR, inner_iter=case.inner_iter, **BALL)
    other = torch.optim.SGD(others, OTHER_LR)
    windows = [[batch_of(step, k, rank) for k in range(case.micro_batches)] for step in range(STEPS)]
    if case.door == "amp_backward":
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True)
        kwargs = {"gradient_as_bucket_view": case.bucket_view}
        amp = accelerator.prepare(amp)
        model = DistributedDataParallel(net, **kwargs)
        for window in windows:
            amp_backward(accelerator, model, amp, lambda batch: model(**batch)["loss"], window)
            yield from _update(net, amp, other)
        return
    if case.door == "attach inside":
        attach(amp, net)
    model = DistributedDataParallel(net, gradient_as_bucket_view=case.bucket_view)
    if case.door == "attach around":
        attach(amp, model)
    for window in windows:
        for k, batch in enumerate(window, 1):
            with nullcontext() if k == len(window) else model.no_sync():
                (model(**batch)["loss"] / len(window)).backward()
        yield from _update(net, amp, other)


def _update(net: Net, amp: Any, other: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    nn.utils.clip_grad_norm_(net.parameters(), CLIP)
    for optimizer in (amp, other):
        optimizer.step()
        optimizer.zero_grad()
    yield [p.detach().clone() for p in net.parameters()]


class _InOrder(AMPTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class _StepsTheOther(TrainerCallback):
    def __init__(self, net: Net, other: torch.optim.Optimizer) -> None:
        self.net, self.other, self.weights = net, other, list[list[Tensor]]()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.other.step()
        self.weights.append([p.detach().clone() for p in self.net.parameters()])


def by_trainer(case: Case) -> list[list[Tensor]]:
    net = Net()
    own, others = net.split(case.owned)
    amp = AMP(own, LR, inner_iter=case.inner_iter, **BALL)
    callback = _StepsTheOther(net, torch.optim.SGD(others, OTHER_LR))
    places = itertools.product(range(STEPS), range(case.micro_batches), range(WORLD))
    args = AMPTrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written
        optim="amp",
        learning_rate=LR,
        max_steps=STEPS,
        max_grad_norm=CLIP,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=case.micro_batches,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    _InOrder(
        model=net,
        args=args,
        train_dataset=[batch_of(*place) for place in places],  # type: ignore[arg-type]
        data_collator=lambda whole: whole[0],  # type: ignore[arg-type]
        optimizers=(amp, torch.optim.lr_scheduler.ConstantLR(amp, 1.0)),
        callbacks=[callback],
    ).train()
    return callback.weights


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    weights = [by_trainer(case) if case.door == "AMPTrainer" else list(in_process(case)) for case in CASES]
    torch.save(weights, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
