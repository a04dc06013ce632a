"""All passes of a step are one function at several weights: the module's state and random numbers are replayed."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.deprecation import Renamed
from amp_plugin.core.module_parts import parameters_of, parts_of
from amp_plugin.core.module_state import ModuleState
from amp_plugin.core.other_gradients import GradientsAside, leaves_of
from amp_plugin.core.state_search import StateSearch

BatchNormPolicy = Literal["clean", "all"]
RngPolicy = Literal["same", "fresh"]
_CAPTURED = ("cuda",)  # types of devices whose steps can be captured


class ExtraPasses:
    """Guards of the passes of a training step, under which the passes after the first leave no trace in the module.

    Every pass starts from the state that the clean pass, at theta, started from, and the step ends with the state that
    the clean pass has left. State is buffers of any layer, parameters that require no gradient (a momentum encoder; but
    not where they take more memory than the trained ones, as a frozen backbone does), and detached tensors in plain
    attributes and in containers there. Which of them change is looked for in the first clean pass, the second, the
    fourth, and so on; a warning tells what is found late, and of such a backbone that a pass moves after all.

    Args:
        module: module whose state and whose devices' random number generators are replayed.
        batch_norm: ``"clean"`` (default) to keep in the buffers what the clean pass has written, so that running
            statistics describe the weights that are kept (with ``ascent="split(0.25)"``, whose clean pass has the
            smaller part of the batch, what the descent's pass has written); ``"all"`` to let every pass update the
            buffers, as the released code of the paper does.
        rng: ``"same"`` (default) to let every pass of a step draw the random numbers (dropout masks, drop-path) of the
            clean pass, from torch's, numpy's and Python's generators, and from generators in plain attributes of the
            module; ``"fresh"`` to let each pass draw new ones.
        generators: further generators that a pass draws from, `torch.Generator`, `numpy.random.Generator` or
            `random.Random`, which the module does not hold; default none.

    Raises:
        ValueError: a policy is unknown.
        TypeError: a generator is of another kind.
    """

    number = Renamed("nth")
    extra = Renamed("perturbed")

    def __init__(
        self,
        module: nn.Module,
        *,
        batch_norm: BatchNormPolicy = "clean",
        rng: RngPolicy = "same",
        generators: Sequence[Any] = (),
    ) -> None:
        check_policies(batch_norm, rng)
        self.module = module
        self.batch_norm = batch_norm
        self.rng = rng
        self.generators = list(generators)
        for generator in self.generators:
            _restorer(generator)  # raises for what is no generator
        self._held_generators: list[Any] = []
        self._known_devices: set[torch.device] = set()
        self._restore_random: list[Callable[[], object]] = []
        self._start, self._end = ModuleState(), ModuleState()
        self._search = StateSearch(module, buffers=batch_norm == "clean")
        self._states: dict[torch.device, Tensor] = {}  # of the devices' generators, before the first clean pass
        self._drawing: set[torch.device] = set()  # devices whose generator that pass drew from
        self._looked = False  # whether there was such a pass
        self._own: set[int] = set()  # identities of the optimizer's parameters
        self._splits = False  # whether the descent of the step under way is on other samples than the ascent
        self._aside: GradientsAside | None = None  # gradients of all others, in a pass of the ascent

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Guard the clean pass, at theta: remember the state and the random numbers that it starts from."""
        self._begin()
        yield
        self._settle()

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Guard a pass at theta + delta: replay state and random numbers, and put the state back afterwards."""
        with self._repeated(keeps=False):
            yield

    def nth(self, index: int) -> AbstractContextManager[None]:
        """Return the guard of a pass by its index in the step: :meth:`clean` for 0, wherever the weights are.

        The last pass of a step whose passes share out the batch (``"split(0.25)"``) keeps the state that it leaves.
        """
        return self._repeated(keeps=self._splits) if index else self.clean()

    @contextmanager
    def ascent(self, index: int, own: Iterable[Tensor], *, splits: bool = False) -> Iterator[None]:
        """Guard a pass of the ascent, which leaves no gradient on parameters of the module that others train.

        Args:
            index: index of the pass in the step.
            own: parameters of the optimizer, whose gradients the ascent is along.
            splits: whether the pass of the descent is on other samples; default False.
        """
        self._own = {id(p) for p in own}
        aside = self._aside = GradientsAside(p for p in parameters_of(self.module) if id(p) not in self._own)
        try:
            with self.perturbed() if index else self.clean():
                self._splits = splits
                yield
        finally:
            self._aside = None
            aside.put_back()

    def spare_leaves(self, loss: Tensor) -> None:
        """Let the backward pass of a loss leave no gradient on what the loss alone holds, if this is an ascent."""
        if self._aside is not None:
            self._aside.add(p for p in leaves_of(loss) if id(p) not in self._own)

    def seen(self) -> ModuleState:
        """Return, at the end of a perturbed forward pass, the state that its backward pass may need to find."""
        seen = ModuleState()
        self._search.save(seen)
        return seen

    @contextmanager
    def backward(self, seen: ModuleState) -> Iterator[None]:
        """Guard the backward pass of a perturbed forward pass that is over; checkpointed layers run again in it."""
        self._search.save(self._end)
        try:
            seen.load_for_graph()
            yield
        finally:
            self._end.load()

    @contextmanager
    def _repeated(self, *, keeps: bool) -> Iterator[None]:
        """Guard a pass that starts as the clean one did, and that keeps its own state or puts back what there was."""
        self._search.save(self._end)
        try:
            self._replay()
            yield
        except BaseException:
            self._end.load()
            raise
        if not keeps:
            self._end.load()

    @not_compiled
    def _begin(self) -> None:
        self._splits = False
        capturing = _is_capturing()
        self._search.begin(self._start, may_wait=not capturing)
        if self.rng == "same":
            if self._search.looks:
                self._held_generators = _generators_of(self.module)
                self._states = {device: _state(device) for device in self._devices()}
            generators = list(self._all_generators())
            if capturing:
                generators = [g for g in generators if not self._is_captured(g)]
            self._restore_random = [_restorer(generator) for generator in generators]

    @not_compiled
    def _settle(self) -> None:
        if self._search.looks:
            self._search.settle(self._start)
            with _disable_current_modes():  # states are real tensors, also where a mode makes fake ones
                self._drawing |= {d for d, state in self._states.items() if not torch.equal(state, _state(d))}
            self._looked = True

    @not_compiled
    def _replay(self) -> None:
        for restore in self._restore_random:
            restore()
        self._start.load()

    def _is_captured(self, generator: Any) -> bool:
        """Return whether the state of a generator cannot be read, in a CUDA graph; raise if that matters."""
        if not isinstance(generator, torch.device) or generator.type not in _CAPTURED:
            return False
        if not self._looked or generator in self._drawing:
            raise RuntimeError(
                f"the passes of a captured step cannot draw the same random numbers ({type(self.module).__name__} draws"
                f" some on {generator}): take rng='fresh', an option of ExtraPasses, of attach() and of the Trainer"
            )
        return True

    def _all_generators(self) -> Iterator[Any]:
        yield random
        if "numpy" in sys.modules:  # nothing can have drawn from it otherwise
            yield sys.modules["numpy"].random
        yield from {id(g): g for g in (*self.generators, *self._held_generators)}.values()
        yield from self._devices()

    def _devices(self) -> set[torch.device]:
        first = next(self.module.parameters(), None)
        moved = first is not None and first.device not in self._known_devices
        if moved or not self._known_devices:  # to ask each parameter takes a while
            self._known_devices = {torch.device("cpu"), *(p.device for p in self.module.parameters())}
        return self._known_devices


def _generators_of(module: nn.Module) -> list[Any]:
    """Return the random number generators in plain attributes of a module and its parts."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if "numpy" in sys.modules:
        kinds += sys.modules["numpy"].random.Generator, sys.modules["numpy"].random.RandomState
    held = (value for part in parts_of(module) for value in vars(part).values())
    return [g for g in held if isinstance(g, kinds) and not isinstance(g, random.SystemRandom)]


def _restorer(generator: Any) -> Callable[[], object]:
    """Return a function that sets a generator back to where it is now.

    Args:
        generator: the module `random` or `numpy.random`, a device whose default generator is meant, or an object.
    """
    if isinstance(generator, torch.device):
        if generator.type == "cpu":
            return functools.partial(torch.set_rng_state, _state(generator))
        return functools.partial(torch.get_device_module(generator).set_rng_state, _state(generator), generator)
    if hasattr(generator, "get_state"):  # torch.Generator, numpy.random.RandomState, and the module numpy.random
        return functools.partial(generator.set_state, generator.get_state())
    if hasattr(generator, "getstate"):  # random.Random, and the module random
        return functools.partial(generator.setstate, generator.getstate())
    if hasattr(generator, "bit_generator"):  # numpy.random.Generator
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    raise TypeError(f"generators must be of torch, numpy or Python's random, got {type(generator).__name__}")


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def check_policies(batch_norm: str, rng: str) -> None:
    """Raise ValueError unless both policies are known."""
    for name, value, known in (("batch_norm", batch_norm, BatchNormPolicy), ("rng", rng, RngPolicy)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {value!r}")
