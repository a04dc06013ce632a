"""A training step against that of the base optimizer alone: time, and peak memory of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, LossModule, attach
from amp_plugin.hosts.classifier import image_classifier
from benchmarks.rows import Row, counted, timed
from benchmarks.turns import Contestant, Turn, take_turns

SGD_ARGS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
# PreActResNets from 0.3M to 37M parameters.
LADDER: dict[str, dict[str, Any]] = {
    "0.3M": {"width": 16, "layers": [1, 1, 1, 1]},
    "0.7M": {"width": 16},
    "2.8M": {"width": 32},
    "11.2M": {"width": 64},
    "36.7M": {"width": 116},
}
BATCH_SIZES = (8, 50, 128)


def problem(model_args: dict[str, Any], batch_size: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A PreActResNet and a batch (batch_size, 3, 32, 32) with its labels, on the accelerator if there is one."""
    torch.manual_seed(0)
    model = timm.create_model("preactresnet18", num_classes=10, **model_args)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    batch = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    return model.to(device), (batch[0].to(device), batch[1].to(device))


def plain_loop(turn: Turn, model_args: dict[str, Any], batch_size: int, *, attached: bool = False) -> None:
    """``loss.backward(); optimizer.step()``, with SGD or, attached, with AMP around it."""
    model, batch = problem(model_args, batch_size)
    module = LossModule(model, F.cross_entropy)
    optimizer: torch.optim.Optimizer = (AMP if attached else SGD)(model.parameters(), **SGD_ARGS)
    if attached:
        attach(optimizer, module)
    while True:
        turn()
        module(*batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def closure_of(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """What `step` of AMP and of SAM calls."""
    images, labels = batch

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    return closure


def closure_loop(turn: Turn, model_args: dict[str, Any], batch_size: int) -> None:
    """``optimizer.step(closure)`` of AMP."""
    model, batch = problem(model_args, batch_size)
    optimizer = AMP(model.parameters(), **SGD_ARGS)

    closure = closure_of(model, batch, optimizer)
    while True:
        turn()
        optimizer.step(closure)
        optimizer.zero_grad()


def sam_loop(turn: Turn, model_args: dict[str, Any], batch_size: int) -> None:
    """The SAM of pytorch_optimizer, as its documentation shows it."""
    from pytorch_optimizer import SAM

    model, batch = problem(model_args, batch_size)
    optimizer = SAM(model.parameters(), SGD, **SGD_ARGS)

    closure = closure_of(model, batch, optimizer)
    while True:
        turn()
        closure()
        optimizer.step(closure)
        optimizer.zero_grad()


def trainer_loop(turn: Turn, model_args: dict[str, Any], batch_size: int, *, optim: str, output_dir: str) -> None:
    """`AMPTrainer` with AMP or, where `optim` says so, without; clipping is on in both, as it is by default."""
    classes = [str(i) for i in range(10)]
    model = image_classifier("preactresnet18", classes, mean=(0.5,) * 3, std=(0.2,) * 3, **model_args)
    _, batch = problem(model_args, batch_size)
    args = AMPTrainingArguments(
        output_dir=output_dir,
        optim=optim,
        optim_args="momentum=0.9,nesterov=True",
        weight_decay=1e-4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_steps=10**9,
        per_device_train_batch_size=1,  # a row of the data set is a batch
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # the batch is on the device already
        use_cpu=not torch.accelerator.is_available(),
    )

    class OnStep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn()

    data = _Same(batch)
    AMPTrainer(model, args, train_dataset=data, data_collator=_first, callbacks=[OnStep()]).train()


class _Same(IterableDataset[dict[str, Tensor]]):
    """The same batch for ever."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self._batch = dict(zip(("pixel_values", "labels"), batch, strict=True))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return repeat(self._batch)


def _first(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return batches[0]


# Each way to train, and what it is compared with.
WAYS: dict[str, tuple[Any, str | None]] = {
    "SGD": (plain_loop, None),
    "AMP, closure": (closure_loop, "SGD"),
    "AMP, attach": (partial(plain_loop, attached=True), "SGD"),
    "SAM of pytorch_optimizer": (sam_loop, "SGD"),
    "Trainer, SGD": (partial(trainer_loop, optim="sgd"), None),
    "AMPTrainer": (partial(trainer_loop, optim="amp"), "Trainer, SGD"),
}


def cell(
    size: str, model_args: dict[str, Any], batch_size: int, threads: int, seconds: float, output_dir: str
) -> list[Row]:
    """The rows of one model and batch size."""
    arguments = {"model_args": model_args, "batch_size": batch_size}
    contestants = {}
    for name, (loop, _) in WAYS.items():
        extra = {"output_dir": output_dir} if "Trainer" in name else {}
        contestants[name] = Contestant(loop, {**arguments, **extra})
    results = take_turns(contestants, seconds=seconds, min_rounds=5, max_rounds=40, warm_up=2, threads=threads)
    case = f"{size} parameters, batch {batch_size}"
    rows = []
    for name, (_, baseline) in WAYS.items():
        if baseline is not None:
            times, base = ([1e3 * t for t in results[n].seconds] for n in (name, baseline))
            rows.append(timed("Step", case, name, baseline, times, base, "ms"))
    for name, (_, baseline) in WAYS.items():
        if baseline is not None:
            pairs = {"of the process": [results[n].peak_memory for n in (name, baseline)]}
            if results[name].peak_allocated:
                pairs["of the accelerator"] = [results[n].peak_allocated for n in (name, baseline)]
            for where, (ours, base_peak) in pairs.items():
                section = f"Peak memory {where}"
                rows.append(counted(section, case, name, baseline, ours / 2**20, base_peak / 2**20, "MiB"))
    return rows
