"""A function whose kernels CUDA captures once, as a graph, and launches at once from then on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from amp_plugin.core.warn import warn_user

Result = TypeVar("Result")


class CapturedCall(Generic[Result]):
    """A function that CUDA replays as one graph after some calls; on other devices every call is one of the function.

    The function must always read and write the same tensors. What Python does in it is frozen with its capture. A
    function that CUDA cannot capture is told, and called as it is from then on. Several captured calls may be replayed
    side by side, each on the stream that is current when it is called.

    Args:
        function: function of no arguments that returns tensors, which the next call overwrites.
        device: device of its tensors.
        name: what the warning calls the function.
        warm_up: number of calls before the capture, for what is made once (momentum, cuDNN's choice of kernels);
            default 0, where something else has warmed up.
        prepare: function that is called before the capture; default none.
        forget: function that undoes, after a failed capture, what Python has noted of kernels that never ran; default
            none.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(
        self,
        function: Callable[[], Result],
        device: torch.device,
        name: str,
        *,
        warm_up: int = 0,
        prepare: Callable[[], object] | None = None,
        forget: Callable[[], object] | None = None,
    ) -> None:
        self._function, self._name, self._warm_up = function, name, warm_up
        self._prepare, self._forget = prepare, forget
        self._record = RECORDERS.get(device.type)
        self._replay: Callable[[], Any] | None = None
        self._result: Any = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def captured(self) -> bool:
        """Whether the last call was a replay."""
        return self._replay is not None

    def __call__(self) -> Result:
        """Call the function, or replay it.

        Returns:
            What the function returns; after a capture always the same tensors, with new values.
        """
        if self._record is None:
            return self._function()
        if self._warm_up:
            self._warm_up -= 1
            return self._beside()
        if self._replay is None and not self._capture(self._record):
            return self._function()
        assert self._replay is not None
        self._replay()
        result: Result = self._result
        return result

    def _beside(self) -> Result:
        """Call the function on the stream of the capture, as CUDA wants it before."""
        stream = self._own_stream()
        if stream is None:
            return self._function()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self._function()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _own_stream(self) -> torch.cuda.Stream | None:
        """Return a stream of this call alone: graphs of one stream share, and fight for, its workspace."""
        if self._stream is None and torch.cuda.is_available():
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._stream

    def _capture(self, record: Recorder) -> bool:
        """Capture a call without making it; return False, with a warning, if that cannot be done."""
        if self._prepare is not None:
            self._prepare()
        try:
            self._replay, self._result = record(self._function, self._own_stream())
        except Exception as error:
            self._record = None
            if self._forget is not None:
                self._forget()
            lines = str(error).strip().splitlines() or [""]
            warn_user(
                f"{self._name} cannot be captured, and is made as it is from now on. {type(error).__name__}: {lines[0]}"
            )
            return False
        return True


def _cuda_graph(function: Callable[[], Any], stream: torch.cuda.Stream | None) -> tuple[Callable[[], Any], Any]:
    """Capture a call without making it; return a function that makes it, and what the call returned."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The outer stream is the current one: to it torch does not come back where CUDA has broken the capture off.
        outer = torch.cuda.stream(torch.cuda.current_stream())
        # Other threads (a loader that pins memory) may go on with what a capture forbids.
        with (
            _no_garbage_collection(),
            outer,
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = function()
    except torch.AcceleratorError as error:
        _clean_up_after(pool)
        # CUDA's error at the end of a capture that it has broken off only says that there was one before.
        raise (error.__context__ or error) from None
    return graph.replay, result


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and none for a while: a graph of an earlier training that is freed breaks a capture off."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _clean_up_after(pool: Any) -> None:
    """Undo what torch leaves as in a capture, where CUDA has broken that off: memory and random numbers."""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # torch has ended the allocation itself
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


# The function that captures a call, by type of device. It is given a stream to capture on.
Recorder = Callable[[Callable[[], Any], Any], tuple[Callable[[], Any], Any]]
RECORDERS: dict[str, Recorder] = {"cuda": _cuda_graph}


def can_capture(device: torch.device) -> bool:
    """Return whether calls on a device can be captured."""
    return device.type in RECORDERS
