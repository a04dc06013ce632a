"""Arbitrary small training problems for the property-based tests: weights, groups and gradients of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from amp_plugin import AMP, attach

Layout = Literal["contiguous", "transposed", "every second", "channels last", "in one buffer"]
Gradient = Literal["some", "large", "zero", "none"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
SHAPES = ((5,), (), (2, 3), (2, 3, 2, 2), (1,), (0,), (2, 0, 3))
SGD_ARGS: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


@dataclass(frozen=True)
class Weight:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    at_zero: bool  # so that theta + delta is delta, to the last digit
    frozen: bool


@dataclass(frozen=True)
class Group:
    size: int
    epsilon: float
    inner_lr: float
    maximize: bool
    first_twice: bool


@dataclass(frozen=True)
class Case:
    """A problem; `gradients` has what each weight gets in each of the at most four passes of a step."""

    weights: tuple[Weight, ...]
    groups: tuple[Group, ...]
    gradients: tuple[tuple[Gradient, ...], ...]
    norm: Literal["tensor", "global"]
    inner_iter: int
    seed: int


@dataclass(frozen=True)
class Failure:
    """What goes wrong in one pass."""

    in_pass: int
    where: Literal["forward", "backward"]
    error: type[BaseException]


def weights() -> st.SearchStrategy[Weight]:
    layouts: list[Layout] = ["contiguous", "transposed", "every second", "channels last", "in one buffer"]
    return st.builds(
        Weight, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(layouts), st.booleans(), rarely()
    )


def rarely() -> st.SearchStrategy[bool]:
    return st.sampled_from([False] * 9 + [True])


@st.composite
def cases(draw: st.DrawFn, *, perturbs: bool | None = None, min_ascents: int = 0) -> Case:
    """Any problem, or one that AMP's hyper-parameters do or do not perturb."""
    some = tuple(draw(st.lists(weights(), min_size=1, max_size=4)))
    sizes = draw(st.lists(st.integers(0, 2), max_size=3))
    sizes = [min(n, max(0, len(some) - sum(sizes[:k]))) for k, n in enumerate(sizes)]
    radii, steps = [0.5, 0.01, 100.0, 0.5], [1.0, 0.25, 1.0, 0.25]
    group = st.tuples(
        st.sampled_from(radii if perturbs else [*radii, 0.0]),
        st.sampled_from(steps if perturbs else [*steps, 0.0]),
        st.booleans(),
        rarely(),
    )
    groups = [Group(n, *draw(group)) for n in [*sizes, len(some) - sum(sizes)]]
    if perturbs is False:
        groups = [Group(g.size, 0.0, *(g.inner_lr, g.maximize, g.first_twice)) for g in groups]
    kinds: list[Gradient] = ["some", "large", "some", "large", "zero", "none"]
    one_pass = st.tuples(*(st.sampled_from(kinds) for _ in some))
    gradients = tuple(draw(st.lists(one_pass, min_size=4, max_size=4)))
    return Case(
        some,
        tuple(groups),
        gradients,
        draw(st.sampled_from(["tensor", "global"])),
        draw(st.sampled_from([n for n in (1, 2, 3, 1, 2, 0) if n >= min_ascents])),
        draw(st.integers(0, 9)),
    )


def failures() -> st.SearchStrategy[Failure]:
    where: list[Literal["forward", "backward"]] = ["forward", "backward"]
    errors = [ValueError, KeyboardInterrupt, SystemExit]
    return st.builds(Failure, st.integers(0, 3), st.sampled_from(where), st.sampled_from(errors))


class Raise(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: type[BaseException]) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ctx.error


class Problem(nn.Module):
    """A sum over the weights p of c (p + p^2 / 2), with other numbers c in every pass, and so gradients c (1 + p)."""

    def __init__(self, case: Case, base: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        self.tensors = nn.ParameterList(_parameters(case.weights, generator))
        self.factors = [[_random(w.shape, w.dtype, generator) for w in case.weights] for _ in case.gradients]
        groups, params = [], list(self.tensors)
        for group in case.groups:
            members, params = params[: group.size], params[group.size :]
            members = members + members[:1] * group.first_twice
            options = {} if base else {"epsilon": group.epsilon, "inner_lr": group.inner_lr}
            groups.append({"params": members, "maximize": group.maximize, **options})
        arguments = {"lr": 0.125, **SGD_ARGS, **kwargs}
        self.optimizer = (
            base(groups, **arguments) if base else AMP(groups, norm=case.norm, inner_iter=case.inner_iter, **arguments)
        )
        self.passes = 0
        self.failure: Failure | None = None
        self.bad: dict[int, float] = {}  # a factor that is not finite, by pass
        self.on_pass: Callable[[], None] = lambda: None

    def forward(self) -> Tensor:
        k, self.passes = self.passes, self.passes + 1
        self.on_pass()
        fails = self.failure is not None and self.failure.in_pass == k
        if fails and self.failure.where == "forward":
            raise self.failure.error
        terms = [torch.zeros((), dtype=torch.float64)]
        for p, c, kind in zip(self.tensors, self.factors[k % 4], self.case.gradients[k % 4], strict=True):
            if kind != "none":
                c = c * {"some": 1.0, "large": 1024.0, "zero": 0.0}[kind] * self.bad.get(k, 1.0)
                terms.append((c * (real(p) + real(p).square() / 2)).sum().double())
        loss = torch.stack(terms).sum()
        return Raise.apply(loss, self.failure.error) if fails else loss

    @property
    def ascents(self) -> int:
        return self.optimizer.inner_iter if self.optimizer.perturbs else 0

    def has_gradients(self) -> bool:
        """Whether there is one in every pass of a step, which loops without a closure need."""
        passes = self.case.gradients[: self.ascents + 1]
        return all(any(p.requires_grad and k != "none" for p, k in zip(self.tensors, g, strict=True)) for g in passes)

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.tensors]


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers between 1/4 and 4 in size, as reals."""
    shape = (*shape, 2) if dtype.is_complex else shape
    sizes = torch.exp2(4 * torch.rand(shape, generator=generator) - 2)
    signs = torch.randint(2, shape, generator=generator) * 2 - 1
    return (sizes * signs).to(torch.float32 if dtype.is_complex else dtype)


def _parameters(weights: tuple[Weight, ...], generator: torch.Generator) -> list[nn.Parameter]:
    buffers = {d: torch.zeros(200, dtype=d) for d in DTYPES}
    made = []
    for k, weight in enumerate(weights):
        values = _random(weight.shape, weight.dtype, generator)
        values = torch.zeros_like(values) if weight.at_zero else values
        values = torch.view_as_complex(values) if weight.dtype.is_complex else values
        size, shape = values.numel(), values.shape
        if weight.layout == "transposed":
            backwards = tuple(reversed(range(values.ndim)))
            values = values.permute(backwards).contiguous().permute(backwards)
        elif weight.layout == "every second" and values.ndim:
            values = torch.stack([values, values], -1).flatten(-2)[..., ::2]
        elif weight.layout == "channels last" and values.ndim == 4:
            values = values.to(memory_format=torch.channels_last)
        elif weight.layout == "in one buffer":
            place = buffers[weight.dtype][50 * k : 50 * k + size].view(shape)
            values = place.copy_(values)
        made.append(nn.Parameter(values, requires_grad=not weight.frozen))
    return made


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN here, and 0.0 is not -0.0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = (real(t.detach()).contiguous() for t in (a, b))
    return torch.equal(a.view(integers[a.element_size()]), b.view(integers[b.element_size()]))


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def length(tensor: Tensor) -> float:
    return math.sqrt(real(tensor.detach()).double().square().sum().item())


# --- the doors: each makes a step of a problem


def by_closure(problem: Problem) -> None:
    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        loss: Tensor = problem()
        if loss.requires_grad:
            loss.backward()
        return loss

    problem.passes = 0
    problem.optimizer.step(closure)


def by_ascend(problem: Problem) -> None:
    problem.passes = 0
    problem.optimizer.zero_grad()
    try:
        for _ in range(problem.ascents):
            problem().backward()
            problem.optimizer.ascend()
        problem().backward()
    except BaseException:
        problem.optimizer.restore()  # as the loop has to
        raise
    problem.optimizer.step()


def by_attach(problem: Problem) -> None:
    if not problem.optimizer.attached:
        attach(problem.optimizer, problem)
    problem.passes = 0
    problem.optimizer.zero_grad()
    problem().backward()
    problem.optimizer.step()


DOORS = {"closure": by_closure, "ascend": by_ascend, "attach": by_attach}
