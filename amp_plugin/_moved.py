"""Old names of modules that have moved, which work for one version and warn.

A pickled optimizer or a ``training_args.bin`` of an earlier version names its classes by them, too.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MOVED = {
    "ascent": "core.policies",
    "ascent.policy": "core.policies.policy",
    "distributed": "core.distributed",
    "hosts": "doors",
    "hosts.accelerate": "doors.accelerate",
    "hosts.classifier": "models.classifier",
    "hosts.pretrained": "models.pretrained",
    "hosts.timm": "doors.timm",
    "hosts.training_args": "trainer.arguments",
    "hosts.transformers": "trainer.trainer",
    "loss": "core.loss",
    "optimizer": "core.optimizer",
    "passes": "core.replay",
    "perturbation": "core.perturbation",
}


class _MovedFinder(MetaPathFinder, Loader):
    """A finder of modules by their old names."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return a spec for the old name of a module, None for any other name."""
        package, _, old = name.partition(".")
        if package != __package__ or old not in _MOVED:
            return None
        return ModuleSpec(name, self, is_package=any(other.startswith(f"{old}.") for other in _MOVED))

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with what is under its new name: the same objects, so that classes are the same."""
        name = f"{__package__}.{_MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(f"{module.__name__} is now {name}; the old name goes in the next version", DeprecationWarning, 2)
        found = vars(importlib.import_module(name))
        vars(module).update({key: value for key, value in found.items() if not key.startswith("__")})


def find_moved_modules() -> None:
    """Let Python look for a module's old name where it finds no such module."""
    sys.meta_path.append(_MovedFinder())
