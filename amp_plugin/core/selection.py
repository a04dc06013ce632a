"""Which parameters are perturbed: ``parameters="norm"``, a regular expression on names, or a predicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from amp_plugin.core.bucket import Ascent
from amp_plugin.core.checks import check_not_negative
from amp_plugin.core.sharding import is_distributed
from amp_plugin.core.shared_memory import overwritable_gradient
from amp_plugin.suggest import did_you_mean

Parameters = str | Callable[[str, Tensor], bool]
Groups = list[dict[str, Any]]


class ParameterSelection:
    """The choice of parameters, in the groups of an optimizer, that are perturbed: those that are in the ball.

    Args:
        parameters: choice by name, see :func:`select_parameters`; None for all parameters.
    """

    def __init__(self, parameters: Parameters | None) -> None:
        self.parameters = parameters
        # By identity; weak, so that a replaced layer is let go. None until the names are known.
        self._chosen: dict[int, TensorWeakRef] | None = None

    def choose(self, groups: Groups, named: Iterable[tuple[str, Tensor]]) -> None:
        """Choose by these names, unless there is a choice for these groups; ValueError if no parameter is chosen."""
        if self.parameters is None:
            return
        if self._chosen is not None and len(self._chosen_in(groups)) == len(self._chosen):
            return
        own = {id(p) for group in groups for p in group["params"]}
        everything = dict(named)
        trained = {name: p for name, p in everything.items() if id(p) in own}
        self._chosen = _by_identity(select_parameters(self.parameters, trained, everything))

    def choose_anew(self, groups: Groups) -> None:
        """Choose again, because the groups have changed: by the names in them, or else at the next `choose`."""
        self._chosen = None
        if all("param_names" in group for group in groups):
            self.choose(groups, [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)])

    def of(self, group: Mapping[str, Any]) -> Iterable[Tensor]:
        """Return the selected parameters of a group; RuntimeError if their names are not known."""
        params: list[Tensor] = group["params"] if group["epsilon"] and group["inner_lr"] else []
        if self.parameters is None:
            return params
        if self._chosen is None:
            raise RuntimeError(
                f"parameters={self.parameters!r} chooses by name, but the parameters have none here: make AMP of"
                " model.named_parameters(), or call optimizer.name_parameters(model)"
            )
        return (p for p in params if self._is_chosen(p))

    def within(self, groups: Groups) -> Iterator[Tensor]:
        """Yield the selected parameters of all groups."""
        return (p for group in groups for p in self.of(group))

    def ascents(self, groups: Groups, directions: Mapping[Tensor, Tensor] | None) -> list[Ascent]:
        """Return what each selected parameter contributes to an ascent step.

        Args:
            groups: groups of the optimizer.
            directions: tensors to ascend along, by parameter; None for the gradients in ``.grad``.

        Raises:
            ValueError: a radius or a step length is negative.
            RuntimeError: the selected parameters are not in the groups any more, or FSDP has kept the gradients of
                the sharded ones to itself.
        """
        ascents: dict[Tensor, Ascent] = {}  # by tensor, because a tensor listed twice is one weight, moved once
        for group in groups:
            epsilon, inner_lr = group["epsilon"], group["inner_lr"]
            check_not_negative(epsilon=epsilon, inner_lr=inner_lr)  # a schedule may have changed them
            for p in self.of(group):
                along = overwritable_gradient(p) if directions is None else directions.get(p)
                # A group that maximises has its worst loss downhill.
                ascents[p] = Ascent(p, along, -inner_lr if group.get("maximize") else inner_lr, epsilon)
        if not ascents:
            self._check_still_there(groups)
        elif directions is None:
            _check_gradients(ascents)
        return list(ascents.values())

    def prunes(self, groups: Groups) -> bool:
        """Return whether :meth:`pruned` may leave parameters out; never under FSDP, which would not notice."""
        return self.parameters is not None and not any(is_distributed(p) for g in groups for p in g["params"])

    @contextmanager
    def pruned(self, groups: Groups) -> Iterator[list[Tensor]]:
        """Switch off the gradients of the parameters outside the ball; yield these parameters."""
        outside: list[Tensor] = []
        if self.prunes(groups):
            inside = set(self.within(groups))
            outside = [p for g in groups for p in g["params"] if p.requires_grad and p not in inside]
        try:
            for p in outside:
                p.requires_grad_(False)
            yield outside
        finally:
            for p in outside:
                p.requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        chosen = None if self._chosen is None else [p for ref in self._chosen.values() if (p := ref()) is not None]
        return {"parameters": self.parameters, "chosen": chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.parameters, chosen = state["parameters"], state["chosen"]
        self._chosen = chosen if chosen is None else _by_identity(chosen)

    def _is_chosen(self, param: Tensor) -> bool:
        ref = (self._chosen or {}).get(id(param))
        return ref is not None and ref() is param

    def _chosen_in(self, groups: Groups) -> set[int]:
        """Return the identities of the chosen parameters that are in the groups."""
        return {id(p) for group in groups for p in group["params"] if self._is_chosen(p)}

    def _check_still_there(self, groups: Groups) -> None:
        if self._chosen and not self._chosen_in(groups):
            raise RuntimeError(
                f"the parameters that parameters={self.parameters!r} chose have been replaced in the optimizer's groups"
                " since, so nothing would be perturbed; call optimizer.name_parameters(model) to choose anew"
            )


def select_parameters(
    parameters: Parameters, named: Mapping[str, Tensor], everything: Mapping[str, Tensor]
) -> set[Tensor]:
    """Return the parameters that are to be perturbed.

    Args:
        parameters: ``"norm"`` for the weight and bias of every layer whose weight has one dimension, as a
            normalisation layer's has; another string for a regular expression to be found in the name; or a function
            of name and parameter.
        named: parameters to choose from, by name.
        everything: these and the parameters that the optimizer does not have, for the error.

    Raises:
        ValueError: no parameter is chosen, or the string is not a regular expression.
    """
    predicate = parameters if callable(parameters) else _predicate(parameters, named)
    chosen = {p for name, p in named.items() if predicate(name, p)}
    if not chosen and any(predicate(name, p) for name, p in everything.items()):
        raise ValueError(f"parameters={parameters!r} matches only parameters that are not trained by the optimizer")
    if not chosen:
        shown = list(named)[:3] + ["..."] * (len(named) > 3)
        hint = did_you_mean(parameters, ["norm"]) if isinstance(parameters, str) else ""
        raise ValueError(
            f"parameters={parameters!r} matches none of the {len(named)} parameters{hint}; their names are"
            f" {', '.join(shown)}"
        )
    return chosen


def _predicate(parameters: str, named: Mapping[str, Tensor]) -> Callable[[str, Tensor], bool]:
    if parameters == "norm":
        return lambda name, p: _belongs_to_norm(name, named)
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise ValueError(f"parameters={parameters!r} is no regular expression: {error}") from None
    return lambda name, p: pattern.search(name) is not None


def _belongs_to_norm(name: str, named: Mapping[str, Tensor]) -> bool:
    """Return whether a parameter is the weight or bias of a layer whose weight has one dimension."""
    layer, _, last = name.rpartition(".")
    weight = named.get(f"{layer}.weight" if layer else "weight")
    return weight is not None and weight.dim() == 1 and last in ("weight", "bias")


def _check_gradients(ball: Mapping[Tensor, Ascent]) -> None:
    sharded = [p for p in ball if is_distributed(p) and p.requires_grad]
    if sharded and all(p.grad is None for p in sharded):
        raise RuntimeError(
            "a pass left no gradient on the sharded parameters: leave gradient synchronisation on in the ascent"
            " pass, model.set_requires_gradient_sync(True); without it FSDP keeps the gradients to itself"
        )


def _by_identity(params: Iterable[Tensor]) -> dict[int, TensorWeakRef]:
    return {id(p): TensorWeakRef(p) for p in params}
