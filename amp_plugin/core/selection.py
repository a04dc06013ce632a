"""Which parameters the ball is for, by name: ``parameters="norm"``, a regular expression, or a predicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from amp_plugin.core.sharding import is_distributed
from amp_plugin.suggest import did_you_mean

Parameters = str | Callable[[str, Tensor], bool]
Groups = list[dict[str, Any]]


class Ball:
    """The parameters that are perturbed, of those in the groups of an optimizer.

    Args:
        parameters: which, see :func:`chosen_parameters`; None for all.
    """

    def __init__(self, parameters: Parameters | None) -> None:
        self.parameters = parameters
        self._chosen: set[Tensor] | None = None  # once the names are known

    def choose(self, groups: Groups, named: Iterable[tuple[str, Tensor]]) -> None:
        """Choose by these names, unless that has been done for these parameters; ValueError if none is chosen."""
        if self.parameters is None:
            return
        own = _ids(groups)
        if self._chosen is not None and all(id(p) in own for p in self._chosen):
            return
        self._chosen = chosen_parameters(self.parameters, {name: p for name, p in named if id(p) in own})

    def choose_anew(self, groups: Groups) -> None:
        """The groups have changed: choose by the names in them, if they were made of named parameters."""
        self._chosen = None
        if all("param_names" in group for group in groups):
            self.choose(groups, [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)])

    def require_chosen(self, groups: Groups) -> None:
        """RuntimeError if not one of those that were chosen is in the groups any more."""
        own = _ids(groups)
        if self._chosen and not any(id(p) in own for p in self._chosen):
            raise RuntimeError(
                f"the parameters that parameters={self.parameters!r} chose have been replaced in the optimizer's groups"
                " since, so nothing would be perturbed; call optimizer.name_parameters(model) to choose anew"
            )

    def of(self, group: Mapping[str, Any]) -> Iterable[Tensor]:
        """Those of a group.

        Raises:
            RuntimeError: their names are not known.
        """
        params: list[Tensor] = group["params"] if group["epsilon"] and group["inner_lr"] else []
        if self.parameters is None:
            return params
        if self._chosen is None:
            raise RuntimeError(
                f"parameters={self.parameters!r} chooses by name, but the parameters have none here: make AMP of"
                " model.named_parameters(), or call optimizer.name_parameters(model)"
            )
        chosen = self._chosen
        return [p for p in params if p in chosen]

    def prunes(self, groups: Groups) -> bool:
        """Whether :meth:`pruned` does anything; FSDP would not notice."""
        return self.parameters is not None and not any(is_distributed(p) for g in groups for p in g["params"])

    @contextmanager
    def pruned(self, groups: Groups) -> Iterator[list[Tensor]]:
        """Let no gradient be computed for parameters outside; gives those for which one would have been."""
        outside: list[Tensor] = []
        if self.prunes(groups):
            inside = {p for group in groups for p in self.of(group)}
            outside = [p for g in groups for p in g["params"] if p.requires_grad and p not in inside]
        try:
            for p in outside:
                p.requires_grad_(False)
            yield outside
        finally:
            for p in outside:
                p.requires_grad_(True)


def _ids(groups: Groups) -> set[int]:
    return {id(p) for group in groups for p in group["params"]}


def chosen_parameters(parameters: Parameters, named: Mapping[str, Tensor]) -> set[Tensor]:
    """Those of the ball.

    Args:
        parameters: ``"norm"``: weight and bias of every layer whose weight has one dimension, as that of
            normalisation layers; another string: a regular expression to be found in the name; or a function of
            name and parameter.
        named: the parameters to choose from.

    Raises:
        ValueError: none is chosen, or the regular expression is none.
    """
    predicate = parameters if callable(parameters) else _predicate(parameters, named)
    chosen = {p for name, p in named.items() if predicate(name, p)}
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
        return lambda name, p: _weight_of_layer(name, named) is not None
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise ValueError(f"parameters={parameters!r} is no regular expression: {error}") from None
    return lambda name, p: pattern.search(name) is not None


def _weight_of_layer(name: str, named: Mapping[str, Tensor]) -> Tensor | None:
    """The one-dimensional weight of the layer that a parameter belongs to, if it has one."""
    layer, _, last = name.rpartition(".")
    weight = named.get(f"{layer}.weight" if layer else "weight")
    return weight if weight is not None and weight.dim() == 1 and last in ("weight", "bias") else None
