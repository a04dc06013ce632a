"""A number on its way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AsyncScalar:
    """A 0-d tensor on its way to the host, which is copied without waiting and read when it has long arrived."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor
        else:
            self._host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device)
            self._event.record()

    def value(self) -> bool | int | float:
        """Return the value; wait for the device if the value has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        value: Any = self._host.tolist()  # tolist() of a 0-d tensor is one number
        return value  # type: ignore[no-any-return]
