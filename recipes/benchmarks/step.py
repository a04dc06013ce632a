"""A training step against that of the base optimizer alone: time and peak memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, LossModule, attach
from amp_plugin.models.classifier import image_classifier
from benchmarks.memory import peak_memory
from benchmarks.rows import Row, counted, timed
from benchmarks.turns import Turn, take_turns

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
MEMORY_BATCH_SIZE = 50


Batch = tuple[Tensor, Tensor]
Problem = Callable[[], tuple[nn.Module, Batch]]


def problem(model_args: dict[str, Any], batch_size: int) -> tuple[nn.Module, Batch]:
    """A PreActResNet as a transformers classifier, and a batch (batch_size, 3, 32, 32) with its labels.

    On the accelerator if there is one.
    """
    torch.manual_seed(0)
    classes = [str(i) for i in range(10)]
    model = image_classifier("preactresnet18", classes, mean=(0.5,) * 3, std=(0.2,) * 3, **model_args)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    nn.Module.to(model, device)  # transformers hides the signature
    return model.train(), (images.to(device), labels.to(device))


def architecture(classifier: nn.Module) -> nn.Module:
    """timm's model in a transformers classifier, which takes images and returns logits."""
    return classifier.get_submodule("timm_model")


def plain_loop(turn: Turn, make: Problem, *, attached: bool = False) -> None:
    """``loss.backward(); optimizer.step()``, with SGD or, attached, with AMP around it."""
    model, batch = make()
    module = LossModule(architecture(model), F.cross_entropy)
    optimizer: torch.optim.Optimizer = (AMP if attached else SGD)(module.parameters(), **SGD_ARGS)
    if attached:
        attach(optimizer, module)
    while True:
        turn()
        module(*batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def closure_of(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """What `step` of AMP and of SAM calls."""
    images, labels = batch

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    return closure


def closure_loop(turn: Turn, make: Problem) -> None:
    """``optimizer.step(closure)`` of AMP."""
    model, batch = make()
    optimizer = AMP(model.parameters(), **SGD_ARGS)
    closure = closure_of(architecture(model), batch, optimizer)
    while True:
        turn()
        optimizer.step(closure)
        optimizer.zero_grad()


def sam_loop(turn: Turn, make: Problem) -> None:
    """The SAM of pytorch_optimizer, as its documentation shows it."""
    model, batch = make()
    optimizer = SAM(model.parameters(), SGD, **SGD_ARGS)
    closure = closure_of(architecture(model), batch, optimizer)
    while True:
        turn()
        closure()
        optimizer.step(closure)
        optimizer.zero_grad()


def trainer_loop(turn: Turn, make: Problem, *, optim: str) -> None:
    """`AMPTrainer` with AMP or, where `optim` says so, without; clipping is on in both, as it is by default."""
    model, batch = make()
    args = AMPTrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        optim=optim,
        optim_args="momentum=0.9,nesterov=True",
        weight_decay=SGD_ARGS["weight_decay"],
        learning_rate=SGD_ARGS["lr"],
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

    AMPTrainer(model, args, train_dataset=_Same(batch), data_collator=_first, callbacks=[OnStep()]).train()


class _Same(IterableDataset[dict[str, Tensor]]):
    """The same batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self._batch = dict(zip(("pixel_values", "labels"), batch, strict=True))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return repeat(self._batch)


def _first(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return batches[0]


# Each way to train, and what it is compared with.
WAYS: dict[str, tuple[Callable[..., None], str | None]] = {
    "SGD": (plain_loop, None),
    "AMP, closure": (closure_loop, "SGD"),
    "AMP, attach": (partial(plain_loop, attached=True), "SGD"),
    "SAM of pytorch_optimizer": (sam_loop, "SGD"),
    "Trainer, SGD": (partial(trainer_loop, optim="sgd"), None),
    "AMPTrainer": (partial(trainer_loop, optim="amp"), "Trainer, SGD"),
}


def times(size: str, model_args: dict[str, Any], batch_size: int, seconds: float) -> list[Row]:
    """The time of a step of one model and batch size; all ways train the same model on the same batch."""
    same = problem(model_args, batch_size)
    loops = {name: partial(loop, make=lambda: same) for name, (loop, _) in WAYS.items()}
    results = take_turns(loops, seconds=seconds, min_rounds=4, max_rounds=60, warm_up=1)
    milliseconds = {name: [1e3 * t for t in some] for name, some in results.items()}
    case = f"{size} parameters, batch {batch_size}"
    return [
        timed("Step", case, name, baseline, milliseconds[name], milliseconds[baseline], "ms")
        for name, (_, baseline) in WAYS.items()
        if baseline is not None
    ]


def memory(size: str, model_args: dict[str, Any], batch_size: int, threads: int) -> list[Row]:
    """The peak memory of a step, each way in a process of its own."""
    make = partial(problem, model_args, batch_size)
    peaks = {name: peak_memory(partial(loop, make=make), threads) for name, (loop, _) in WAYS.items()}
    case, rows = f"{size} parameters, batch {batch_size}", []
    for i, where in enumerate(("process", "accelerator")):
        for name, (_, baseline) in WAYS.items():
            if baseline is not None and peaks[baseline][i]:
                ours, theirs = (peaks[n][i] / 2**20 for n in (name, baseline))
                rows.append(counted(f"Peak memory of the {where}", case, name, baseline, ours, theirs, "MiB"))
    kept = peak_memory(partial(WAYS["SGD"][0], make=make), threads, keep_freed=True)
    rows.append(
        counted("Page faults", case, "SGD, as under --fast", "SGD", kept.faults, peaks["SGD"].faults, "pages a step")
    )
    return rows
