"""The mean loss over fixed batches as a function of a model's weights, which every measure of flatness looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from amp_plugin.core.loss import loss_of
from amp_plugin.core.replay import ExtraPasses
from amp_plugin.core.sharding import is_distributed

_NEEDED = (
    "without a criterion its mean loss is needed",
    "Give a criterion, or labels in the batches of a model of transformers",
)
_TARGETS = ("labels", "label")  # keys of a batch that is a mapping
_SCORES = ("logits", "output")  # keys or attributes of an output


class Evaluation(NamedTuple):
    """Loss and error of a model on the batches.

    Attributes:
        loss: mean over the examples, in the units of the criterion.
        error: share of wrong predictions in per cent; None if the model is no classifier.
    """

    loss: float
    error: float | None


class Objective:
    """The mean loss of a model over fixed batches, as a function of its weights.

    The batches are read once and kept, so that a loader that shuffles or augments gives every measure the same ones.
    A measure leaves the weights, ``.grad``, the buffers (BatchNorm statistics), the training mode and the random
    number generators as they were.

    By default the model is in eval mode. The loss is then a deterministic function of the weights of the network that
    is used later: there is no dropout, and no example's loss depends on the others of its batch.

    Args:
        model: model that takes the inputs of a batch, on one device or several.
        loader: batches, e.g. a `DataLoader`: sequences of inputs with the targets last, or mappings of named inputs
            with the targets under "labels" or "label". The first dimension counts the examples, and each example
            weighs the same, whatever the size of its batch.
        criterion: mean loss of a batch, called as ``criterion(outputs, targets)``, or ``criterion(logits, targets)``
            where outputs have ``.logits``. By default the model returns its loss, as models of transformers do when
            they are given labels.
        training: whether the model is in training mode: BatchNorm normalises with the statistics of each batch, and
            dropout draws the same masks in every pass. First `amp_plugin.detach` an attached model, because it would
            perturb itself.
        progress: whether progress bars are shown, if the output is a terminal.

    Attributes:
        parameters: parameters of the model that require a gradient; the measures move them.
        examples: number of examples.

    Raises:
        ValueError: there are no batches, no trainable parameters, or parameters that are sharded over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        criterion: Callable[[Any, Any], Tensor] | None = None,
        *,
        training: bool = False,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.training = training
        self.progress = progress
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient, so no loss landscape")
        if any(is_distributed(p) for p in self.parameters):
            raise ValueError("the parameters are sharded over processes; measure a model that is whole in one process")
        self._batches = list(loader)
        sizes = [find_batch_size(batch) for batch in self._batches]
        if not all(sizes):
            raise ValueError("every batch must hold at least one tensor, with an example in each row")
        self.examples = sum(sizes)
        if not self.examples:
            raise ValueError("the loader gave no batches; an iterator can be read only once, so give a fresh one")
        self._shares = [size / self.examples for size in sizes]
        self._passes = ExtraPasses(model, rng="fresh")

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Return loss and error at the present weights, by one forward pass over all batches."""
        loss, error = 0.0, 0.0
        with self._undisturbed():
            for share, batch_loss, scores, targets in self._forward():
                loss += share * float(batch_loss)
                error += share * 100 * _wrong(scores, targets)
        return Evaluation(loss, None if math.isnan(error) else error)

    def gradient(self) -> tuple[float, list[Tensor | None]]:
        """Return the loss and its gradient at the present weights; None for a parameter without influence on it."""
        loss = 0.0
        total: list[Tensor | None] = [None] * len(self.parameters)
        with self._undisturbed():
            for share, batch_loss, _, _ in self._forward():
                loss += share * float(batch_loss.detach())
                grads = torch.autograd.grad(share * batch_loss, self.parameters, allow_unused=True)
                total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        return loss, total

    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Multiply the Hessian of the loss at the present weights by a vector; both are lists by parameter."""
        total = [torch.zeros_like(p) for p in self.parameters]
        with self._undisturbed(), sdpa_kernel(SDPBackend.MATH):  # no other attention kernel has a second derivative
            for share, batch_loss, _, _ in self._forward():
                for t, product in zip(total, _product(batch_loss, self.parameters, vector), strict=True):
                    t.add_(product, alpha=share)
        return total

    def _forward(self) -> Iterator[tuple[float, Tensor, Any, Any]]:
        """Yield the share of the examples, the loss, the outputs and the targets of each batch."""
        device = self.parameters[0].device
        for share, batch in zip(self._shares, self._batches, strict=True):
            yield share, *self._call(send_to_device(batch, device))

    def _call(self, batch: Any) -> tuple[Tensor, Any, Any]:
        named = dict(batch) if isinstance(batch, Mapping) else {}
        unnamed = [] if named else list(batch) if isinstance(batch, list | tuple) else [batch]
        key = next((name for name in _TARGETS if name in named), None)
        if self.criterion is None:
            targets = named[key] if key else unnamed[-1] if unnamed else None
            output = self.model(*unnamed, **named)
            return loss_of(output, self.model, _NEEDED), _scores(output), targets
        if named and key is None:
            raise ValueError(f"a batch has {', '.join(named)}, but no targets under {' or '.join(_TARGETS)}")
        targets = named.pop(key) if key else unnamed.pop()
        scores = _scores(self.model(*unnamed, **named))
        loss = self.criterion(scores, targets)
        if loss.numel() != 1:
            raise ValueError(f"the criterion must return the mean loss of the batch, got shape {tuple(loss.shape)}")
        return loss, scores, targets

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Run a pass in the chosen mode and with the same random numbers every time, and undo its traces."""
        modes = [(module, module.training) for module in self.model.modules()]
        devices = {p.device for p in self.parameters if p.device.type == "cuda"}
        try:
            self.model.train(self.training)
            with self._passes.perturbed(), torch.random.fork_rng(devices):
                torch.manual_seed(0)
                yield
        finally:
            for module, mode in modes:
                module.training = mode


def progress_bar(objective: Objective, steps: Iterable[Any] | None, what: str, total: int | None = None) -> Any:
    """Wrap the steps in a bar that goes away at the end, or in none where the output is no terminal."""
    return tqdm(steps, desc=what, total=total, disable=None if objective.progress else True, leave=False)


def _product(loss: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> Sequence[Tensor]:
    grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    curved = [(g, v) for g, v in zip(grads, vector, strict=True) if g.requires_grad]
    if not curved:  # the loss is linear
        return [torch.zeros_like(p) for p in parameters]
    outputs, weights = zip(*curved, strict=True)
    return torch.autograd.grad(outputs, parameters, weights, allow_unused=True, materialize_grads=True)


def _scores(output: Any) -> Any:
    """Return the logits of an output, or the output itself if it has none."""
    for name in _SCORES:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return output


def _wrong(scores: Any, targets: Any) -> float:
    """Return the fraction of wrong predictions; NaN unless these are scores (n, K) and classes (n,)."""
    if not (isinstance(scores, Tensor) and isinstance(targets, Tensor)):
        return math.nan
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or targets.is_floating_point():
        return math.nan
    return float((scores.argmax(dim=1) != targets).float().mean())
