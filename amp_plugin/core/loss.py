"""The loss that a module returns: alone, as ``.loss``, or under ``"loss"``, as transformers and timm's tasks do."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn


class LossModule(nn.Module):
    """A model and a criterion as one module that returns its loss, for :func:`attach`.

    Args:
        model: module that is called with all arguments but the last.
        criterion: function ``criterion(outputs, targets)`` that returns the mean loss of a batch.
    """

    def __init__(self, model: nn.Module, criterion: Any) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, *inputs_and_targets: Any, **kwargs: Any) -> dict[str, Any]:
        """Return ``{"loss": 0-d tensor, "output": what the model returned}``; the last argument is the targets."""
        *inputs, targets = inputs_and_targets
        output = self.model(*inputs, **kwargs)
        return {"loss": self.criterion(output, targets), "output": output}


_FOR_ATTACH = (
    "attach() needs the mean loss in training mode",
    "For a model and a criterion attach to amp_plugin.LossModule(model, criterion); for label smoothing or"
    " compute_loss_func in transformers use amp_plugin.AMPTrainer",
)


def loss_of(output: Any, module: nn.Module, needed: tuple[str, str] = _FOR_ATTACH) -> Tensor:
    """Return the loss in what a module returned.

    Args:
        output: what the module returned.
        module: module that returned it.
        needed: words for the error, who needs a loss and what else can be done; default those of ``attach()``.

    Raises:
        TypeError: there is no loss, or it is not a scalar.
    """
    if isinstance(output, Tensor):
        loss: Any = output
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    found = (
        f"a loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(output).__name__} with no loss"
    )
    raise TypeError(
        f"{type(module).__name__} returned {found}, but {needed[0]}: a scalar tensor, an object with .loss, or a"
        f" mapping with 'loss'. {needed[1]}"
    )


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return the output with another loss in it; a mapping and an object are changed in place."""
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, MutableMapping):
        output["loss"] = loss
    elif isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(loss=loss)
    else:
        output.loss = loss
    return output
