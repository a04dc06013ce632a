"""An optimizer around another one, with the same groups and the same state, and options of its own in the groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from amp_plugin.core.warn import warn_user


class OptimizerWrapper(Optimizer):
    """An optimizer whose groups and state are the base optimizer's own, so that no load, copy or schedule parts them.

    Args:
        base: optimizer that makes the step.
        options: defaults of the options that every group gets besides those of the base optimizer.

    Attributes:
        base_optimizer: optimizer that makes the step.
    """

    _copied: ClassVar[tuple[str, ...]] = ("defaults", "base_optimizer", "_options")  # attributes that copies keep

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

    def gradients(self) -> list[Tensor]:
        """Return the gradients that are there, in the order of the groups."""
        return [grad for p in self._params() if (grad := p.grad) is not None]

    def has_gradients(self) -> bool:
        """Return whether any gradient is there."""
        return any(p.grad is not None for group in self.param_groups for p in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return what the base optimizer saves: some save more than torch does, and each loads its own."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as the base optimizer does; options that a checkpoint of the base optimizer lacks get their defaults."""
        self.base_optimizer.load_state_dict(state_dict)
        self._fill_options()

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook on the base optimizer, which the hook is given."""
        return self.base_optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook on the base optimizer, which the hook is given."""
        return self.base_optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook on the base optimizer, which the hook is given."""
        return self.base_optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook on the base optimizer, which the hook is given."""
        return self.base_optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def train(self) -> None:
        """Put a base optimizer with modes (a schedule-free one) into the mode of training."""
        getattr(self.base_optimizer, "train", _do_nothing)()

    def eval(self) -> None:
        """Put a base optimizer with modes (a schedule-free one) into the mode of evaluation."""
        getattr(self.base_optimizer, "eval", _do_nothing)()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._copied}

    def _fill_options(self) -> None:
        for group in self.param_groups:
            for name, default in self._options.items():
                group.setdefault(name, default)

    def _params(self) -> Iterator[Tensor]:
        # A tensor listed twice is one weight. Tensors are told by id, because torch hashes them ten times slower.
        return iter({id(p): p for group in self.param_groups for p in group["params"]}.values())

    def _set_gradients(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Give every parameter its gradient in the mapping, and None to a parameter that is not in it."""
        for p in self._params():
            p.grad = gradients.get(p) if gradients else None

    def warn_once(self, message: str, category: type[Warning] = UserWarning) -> None:
        """Warn, unless this optimizer has said so before."""
        warned: set[str] = self.__dict__.setdefault("_warned", set())
        if message not in warned:
            warned.add(message)
            warn_user(message, category)


def _do_nothing() -> None: ...
