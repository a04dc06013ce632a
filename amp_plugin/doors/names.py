"""The names of a model's parameters, whatever a host has put around the model or its layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile, and of FSDP's activation checkpointing


def own_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters by the names that they have in the model before a host wraps it."""
    model = getattr(model, "_orig_mod", model)
    model = model.module if isinstance(model, DistributedDataParallel) else model
    for name, param in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, param
