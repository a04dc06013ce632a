"""An optimizer around another one: the same groups and the same state, with options of its own in the groups."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Groups and state are the base optimizer's own, by property, so that no load, copy or schedule can part them.

    Args:
        base: the optimizer that makes the step.
        options: defaults of the options that every group gets besides the base optimizer's.
    """

    def __init__(self, base: Optimizer, options: dict[str, Any]) -> None:
        self.base_optimizer = base
        self._options = options
        groups, state = base.param_groups, base.state
        super().__init__(groups, {**base.defaults, **options})
        self.param_groups, self.state = groups, state  # the initialiser above emptied them

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may set the options of both optimizers."""
        self.base_optimizer.add_param_group(param_group)
        self._fill_options()

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "base_optimizer": self.base_optimizer, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # from a copy or a pickle
            super().__setstate__(state)
        else:  # from load_state_dict: groups and state, perhaps of a checkpoint that the base optimizer alone wrote
            self.base_optimizer.__setstate__(state)
            self._fill_options()

    def _fill_options(self) -> None:
        for group in self.param_groups:
            for name, default in self._options.items():
                group.setdefault(name, default)
