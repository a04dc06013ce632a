"""An optimizer around another one: the same groups and the same state, with options of its own in the groups."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


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

    def state_dict(self) -> dict[str, Any]:
        """As the base optimizer saves it: some save more than torch does, and each knows how to load its own."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base optimizer loads it; what it saved without this one is filled up with the defaults."""
        self.base_optimizer.load_state_dict(state_dict)
        self._fill_options()

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As of the base optimizer, which is what the hook is given; and so the other three."""
        return self.base_optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As of the base optimizer."""
        return self.base_optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As of the base optimizer."""
        return self.base_optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As of the base optimizer."""
        return self.base_optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def train(self) -> None:
        """For a base optimizer with modes (schedule-free ones have): the training's; for others nothing."""
        getattr(self.base_optimizer, "train", _nothing)()

    def eval(self) -> None:
        """For a base optimizer with modes: the evaluation's; for others nothing."""
        getattr(self.base_optimizer, "eval", _nothing)()

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "base_optimizer": self.base_optimizer, "_options": self._options}

    def _fill_options(self) -> None:
        for group in self.param_groups:
            for name, default in self._options.items():
                group.setdefault(name, default)


def _nothing() -> None: ...
