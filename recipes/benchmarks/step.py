"""A training step against a step of the base optimizer alone: time and peak memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Any

import torch
from pytorch_optimizer import SAM
from reproduction.published import methods
from reproduction.trade_off import SECTION
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, ExtraPasses, LossModule, attach
from amp_plugin.models.classifier import image_classifier
from benchmarks.memory import peak_memory
from benchmarks.rows import Row, counted
from benchmarks.turns import Turn, Ways, compare

SGD_ARGS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
# PreActResNets by their number of parameters.
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
Step = Callable[[], Any]


def problem(model_args: dict[str, Any], batch_size: int) -> tuple[nn.Module, Batch]:
    """Return a PreActResNet as a transformers classifier, and a batch (batch_size, 3, 32, 32) with its labels.

    Both are on the accelerator if there is one.
    """
    torch.manual_seed(0)
    classes = [str(i) for i in range(10)]
    model = image_classifier("preactresnet18", classes, mean=(0.5,) * 3, std=(0.2,) * 3, **model_args)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    nn.Module.to(model, device)  # transformers hides the signature
    return model.train(), (images.to(device), labels.to(device))


def architecture(classifier: nn.Module) -> nn.Module:
    """Return timm's model in a transformers classifier, which takes images and returns logits."""
    return classifier.get_submodule("timm_model")


def plain(
    model: nn.Module, batch: Batch, *, amp: bool = False, sync_ascent: bool = True, steps: int = 1, **settings: Any
) -> Step:
    """Return ``loss.backward(); optimizer.step()``, with SGD or with AMP attached.

    A call makes `steps` training steps, which AMP's ascent policy takes for a whole training; `settings` go to the
    optimizer.
    """
    module = LossModule(model, F.cross_entropy)
    optimizer = (AMP if amp else SGD)(module.named_parameters(), **SGD_ARGS, **settings)
    if isinstance(optimizer, AMP):
        optimizer.total_steps = steps
        attach(optimizer, module, sync_ascent=sync_ascent)

    def step() -> None:
        for group in optimizer.param_groups:
            if "ascent_step" in group:
                group["ascent_step"] = 0
        for _ in range(steps):
            module(*batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def own_passes(model: nn.Module, batch: Batch, *, steps: int = 1, **settings: Any) -> Step:
    """Return the passes of a loop's own, over the batches that AMP's ascent policy asks for; a call makes `steps`."""
    optimizer = AMP(model.named_parameters(), **SGD_ARGS, **settings)
    passes = ExtraPasses(model)

    def backward(batches: Iterable[Batch]) -> None:
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()

    def step() -> None:
        for _ in range(steps):
            for part in optimizer.ascent_passes([batch], passes=passes):
                backward(part)
            with passes.nth(1):
                backward(optimizer.descent_batches([batch]))
            optimizer.step()
            optimizer.zero_grad()

    return step


def closure(model: nn.Module, batch: Batch, *, sam: bool = False, **settings: Any) -> Step:
    """Return ``optimizer.step(closure)`` of AMP, or of the SAM of pytorch_optimizer as its documentation shows it."""
    images, labels = batch
    kind = partial(SAM, base_optimizer=SGD) if sam else AMP
    optimizer = kind(model.parameters(), **SGD_ARGS, **settings)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    def step() -> None:
        if sam:
            closure()
        optimizer.step(closure)
        optimizer.zero_grad()

    return step


def loop(turn: Turn, make: Problem, way: Callable[..., Step], **settings: Any) -> None:
    """Train in one of these ways, a call of it in each turn."""
    model, batch = make()
    step = way(architecture(model), batch, **settings)
    while True:
        turn()
        step()


def trainer_loop(turn: Turn, make: Problem, *, optim: str, trainer: type[Trainer] = AMPTrainer) -> None:
    """Train with a Trainer and the optimizer `optim`. Gradients are clipped, as they are by default."""
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

    trainer(model, args, train_dataset=_Same(batch), data_collator=itemgetter(0), callbacks=[OnStep()]).train()


class _Same(IterableDataset[dict[str, Tensor]]):
    """A data set that repeats one batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self._batch = dict(zip(("pixel_values", "labels"), batch, strict=True))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return repeat(self._batch)


WAYS: Ways = {
    "SGD": (partial(loop, way=plain), None),
    "AMP, closure": (partial(loop, way=closure), "SGD"),
    "AMP, attach": (partial(loop, way=plain, amp=True), "SGD"),
    "SAM of pytorch_optimizer": (partial(loop, way=closure, sam=True), "SGD"),
    "Trainer, SGD": (partial(trainer_loop, optim="sgd"), None),
    "AMPTrainer": (partial(trainer_loop, optim="amp"), "Trainer, SGD"),
}
STEPS = 4  # in four steps each of the modes makes all that it ever does
_MODE = partial(loop, way=plain, amp=True, steps=STEPS)
# The modes of the sweep, and the ball of the normalisation layers.
MODES: Ways = {
    "SGD": (partial(loop, way=plain, steps=STEPS), None),
    **{m.ascent: (partial(_MODE, ascent=m.ascent), "SGD") for m in methods().values() if m.ascent is not None},
    "split(0.25), passes of one's own": (partial(loop, way=own_passes, steps=STEPS, ascent="split(0.25)"), "SGD"),
    'parameters="norm"': (partial(_MODE, parameters="norm"), "SGD"),
}


def times(size: str, model_args: dict[str, Any], batch_size: int, seconds: float, *, modes: bool = False) -> list[Row]:
    """Compare the times of a step in all ways to train, or in all `modes` of AMP, of one model on one batch."""
    same = problem(model_args, batch_size)
    ways, section, steps = (MODES, SECTION, STEPS) if modes else (WAYS, "Step", 1)
    made = {name: (partial(loop, make=lambda: same), baseline) for name, (loop, baseline) in ways.items()}
    return compare(section, case(size, batch_size), made, "ms", steps, seconds=seconds, rounds=(4, 60))


def case(size: str, batch_size: int) -> str:
    """Name a model and batch size."""
    return f"{size} parameters, batch {batch_size}"


def memory(size: str, model_args: dict[str, Any], batch_size: int, threads: int) -> list[Row]:
    """Compare the peak memory of a step, each way in a process of its own."""
    make = partial(problem, model_args, batch_size)
    peaks = {name: peak_memory(partial(loop, make=make), threads) for name, (loop, _) in WAYS.items()}
    where, rows = case(size, batch_size), []
    for i, kind in enumerate(("process", "accelerator")):
        for name, (_, baseline) in WAYS.items():
            if baseline and peaks[baseline][i]:
                ours, theirs = (peaks[n][i] / 2**20 for n in (name, baseline))
                rows.append(counted(f"Peak memory of the {kind}", where, name, baseline, ours, theirs, "MiB"))
    kept = peak_memory(partial(WAYS["SGD"][0], make=make), threads, keep_freed=True)
    faults = kept.faults, peaks["SGD"].faults
    return [*rows, counted("Page faults", where, "SGD, as under --fast", "SGD", *faults, "pages a step")]
