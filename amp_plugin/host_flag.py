"""A truth value that is on its way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostFlag:
    """A device flag on its way to the host: copied without waiting, read when it has long arrived."""

    def __init__(self, flag: Tensor) -> None:
        self._event: torch.Event | None = None
        if flag.device.type == "cpu":
            self._host = flag
        else:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.Event(flag.device)
            self._event.record()

    def value(self) -> bool:
        """The value; waits for the device if it is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host.tolist())
