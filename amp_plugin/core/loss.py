"""The loss that a module returns: alone, as ``.loss``, under ``"loss"``, first in a tuple, or where the caller says.

So transformers, its stock Trainer and timm's tasks have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

from torch import Tensor, nn

from amp_plugin.core.outputs import exchange

LossPlace: TypeAlias = int | str | Callable[[Any], Any]  # index or key in the output, or a function of the output


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
    "If it is elsewhere in the output, say where, attach(optimizer, module, loss=1) for (logits, loss); for a model and"
    " a criterion attach to amp_plugin.LossModule(model, criterion). In transformers, where the Trainer computes the"
    " loss (label smoothing, compute_loss_func, Trainers of other libraries), use amp_plugin.AMPTrainer or class"
    " MyTrainer(amp_plugin.AMPMixin, TheirTrainer)",
)


def loss_of(
    output: Any, module: nn.Module, needed: tuple[str, str] = _FOR_ATTACH, *, place: LossPlace | None = None
) -> Tensor:
    """Return the loss in what a module returned.

    Args:
        output: what the module returned.
        module: module that returned it.
        needed: words for the error, who needs a loss and what else can be done; default those of ``attach()``.
        place: where the output has the loss; default None, in one of the usual places.

    Raises:
        TypeError: there is no loss, or it is not a scalar.
    """
    loss = _loss_in(output, place)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    found = (
        f"a loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(output).__name__} with no loss"
    )
    if place is not None:
        raise TypeError(f"{type(module).__name__} returned {found} at loss={place!r}, but {needed[0]} there")
    raise TypeError(
        f"{type(module).__name__} returned {found}, but {needed[0]}: a scalar tensor, an object with .loss, a"
        f" mapping with 'loss', or a tuple that begins with it. {needed[1]}"
    )


def with_tensors(
    output: Any,
    loss: Tensor,
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    module: nn.Module,
    *,
    place: LossPlace | None = None,
) -> Any:
    """Return an output of the same type with other tensors in it; it is changed in place where it can be.

    Args:
        output: what the module returned.
        loss: what the loss of the output is to be, one of the new tensors.
        old: tensors to be replaced, wherever the output holds them.
        new: tensors that take their places.
        module: module that returned the output.
        place: where the output has the loss, see :func:`loss_of`.

    Raises:
        TypeError: the output cannot be written.
    """
    successors = {id(a): b for a, b in zip(old, new, strict=True)}
    failure: Exception | None = None
    try:
        output = exchange(output, lambda tensor: successors.get(id(tensor), tensor))
        if place is None and _loss_in(output) is not loss:  # the output computes it
            if isinstance(output, MutableMapping):
                output["loss"] = loss
            else:
                output.loss = loss
    except Exception as error:  # whatever the class of the output raises
        failure = error
    if failure is not None or _loss_in(output, place) is not loss:
        raise TypeError(
            f"attach() cannot put another loss into the {type(output).__name__} that {type(module).__name__} returned;"
            ' attach to a module around it whose forward() returns {"loss": loss}'
        ) from failure
    return output


def _loss_in(output: Any, place: LossPlace | None = None) -> Any:
    if place is not None:
        return place(output) if callable(place) else itemgetter(place)(output)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("loss")
    loss = getattr(output, "loss", None)
    return output[0] if loss is None and isinstance(output, (tuple, list)) and output else loss
