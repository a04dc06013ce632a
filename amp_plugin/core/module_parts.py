"""A module's parts and parameters, by a walk that is quick enough for every training step.

`nn.Module.modules` builds the name of each part in nested generators, which takes several times as long.
"""

from __future__ import annotations

from torch import Tensor, nn


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Return a module and all its parts, each once, in the order of ``module.modules()``."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if id(part) not in found:
            found[id(part)] = part
            if part._modules:  # most have none
                waiting += [child for child in reversed(part._modules.values()) if child is not None]
    return list(found.values())


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters of a module and its parts, each once, in the order of ``module.parameters()``."""
    return parameters_in(parts_of(module))


def parameters_in(parts: list[nn.Module]) -> list[Tensor]:
    """Return the parameters of these parts of a module, each once."""
    held = (p for part in parts for p in part._parameters.values())
    return list({id(p): p for p in held if p is not None}.values())  # by id, because torch hashes in Python
