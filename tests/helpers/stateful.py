"""Modules with every kind of state and randomness, the doors that train them, and a hand-written AMP to compare with.

The hand-written AMP makes the pass at theta + delta on a copy of the module that was taken before the clean pass, so
that it starts from the same state whatever that is; it shares no code with the package.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections import defaultdict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import SequentialSampler
from transformers import BatchEncoding, TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, ExtraPasses, amp_backward, attach
from amp_plugin.core.inputs import detached_inputs

LR, EPSILON, INNER_LR = 0.1, 0.3, 0.5
FEATURES, HIDDEN, CLASSES = 4, 6, 3
Batch = tuple[Any, ...]  # arguments of a call


class Kind(nn.Module):
    """A part of a module that changes features with the help of its state, or of random numbers."""

    def forward(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class MomentumEncoder(Kind):
    """A frozen copy that follows the trained weights: by in-place operations, through ``.data``, or by other data."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.query, self.way = nn.Linear(HIDDEN, HIDDEN), way
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            if self.way == "in place":
                k.mul_(0.9).add_(q, alpha=0.1)
            elif self.way == "data in place":
                k.data.mul_(0.9).add_(q.data, alpha=0.1)
            else:
                k.data = k.data * 0.9 + q.data * 0.1

    def forward(self, h: Tensor) -> Tensor:
        self.follow()
        return torch.tanh(self.query(h)) + 0.5 * self.key(h.detach())


class Queue(Kind):
    """A queue of features of earlier batches, with a pointer; the queue is a buffer that is written, or replaced."""

    def __init__(self, *, rebinds: bool) -> None:
        super().__init__()
        self.rebinds = rebinds
        self.register_buffer("queue", torch.randn(5, HIDDEN))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, h: Tensor) -> Tensor:
        y = h + torch.softmax(h @ self.queue.clone().t(), 1) @ self.queue.clone()
        with torch.no_grad():
            if self.rebinds:
                self.queue = torch.cat([h.detach()[:1], self.queue])[:5]
            else:
                self.queue[int(self.pointer)] = h.detach()[0]
            self.pointer.add_(1).remainder_(5)
        return y


class Observer(Kind):
    """Running extremes in a buffer that is empty at first, as those of quantization-aware training are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.empty(0))

    def forward(self, h: Tensor) -> Tensor:
        now = h.detach().abs().amax(0)
        if self.largest.numel():
            self.largest.copy_(0.9 * self.largest + 0.1 * now)
        else:
            self.largest.resize_(now.shape).copy_(now)
        return h / (1 + self.largest.clone())


class Codebook(Kind):
    """Codes that follow the features, rebound through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(3, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        nearest = torch.cdist(h.detach(), self.codes).argmin(1)
        y = h + 0.3 * self.codes.clone()[nearest]
        counts = F.one_hot(nearest, 3).to(h)
        self.codes.data = 0.9 * self.codes + 0.1 * (counts.t() @ h.detach())
        return y


class Hidden(Kind):
    """A hidden state in a plain attribute, None before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(HIDDEN, HIDDEN)
        self.state: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.cell(h, None if self.state is None else self.state.expand(len(h), -1))
        self.state = y.detach().mean(0, keepdim=True)
        return y


class History(Kind):
    """Features of earlier batches in a list that grows and is empty at first, or in lists in a dictionary."""

    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        self.nested = nested
        self.bank: Any = defaultdict(list) if nested else []

    def forward(self, h: Tensor) -> Tensor:
        bank = self.bank["features"] if self.nested else self.bank
        y = h + 0.1 * torch.stack([h.detach()[0], *bank]).sum(0)
        bank.append(h.detach()[0])
        return y


class Late(Kind):
    """A mean of features in a plain attribute, which is a number until the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Any = 0.0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, h: Tensor) -> Tensor:
        y = h + self.mean
        if self.seen > 0:
            self.mean = 0.5 * self.mean + h.detach().mean(0)
        self.seen += 1
        return y


class Centre(Kind):
    """A running centre in a parameter that requires no gradient, and a count of batches in another."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(HIDDEN), requires_grad=False)
        self.seen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        y = (h - self.centre.clone()) / self.seen.sqrt()
        self.centre.mul_(0.8).add_(h.detach().mean(0), alpha=0.2)
        self.seen += 1
        return y


class Spectral(Kind):
    """Spectral normalisation, whose power iteration goes on in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(HIDDEN, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.layer(h))


class Masks(Kind):
    """Dropout from a generator of torch's, numpy's or Python's, or from one of its own."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.own = SimpleNamespace(generator=np.random.default_rng(3))  # where nobody finds it

    def forward(self, h: Tensor) -> Tensor:
        n = h.numel()
        if self.source == "torch":
            values = torch.rand(n)
        elif self.source == "numpy":
            values = torch.from_numpy(np.random.random(n))
        elif self.source == "own":
            values = torch.from_numpy(self.own.generator.random(n))
        else:
            values = torch.tensor([random.random() for _ in range(n)])
        return h * (values.view_as(h) > 0.3).to(h)


KINDS: dict[str, Callable[[], Kind]] = {
    "momentum encoder": lambda: MomentumEncoder("in place"),
    "momentum encoder through data": lambda: MomentumEncoder("data in place"),
    "momentum encoder with new data": lambda: MomentumEncoder("new data"),
    "queue": lambda: Queue(rebinds=False),
    "queue that is replaced": lambda: Queue(rebinds=True),
    "observer": Observer,
    "codebook": Codebook,
    "hidden state": Hidden,
    "history": lambda: History(nested=False),
    "history in a dictionary": lambda: History(nested=True),
    "mean from the second batch on": Late,
    "centre": Centre,
    "spectral norm": Spectral,
    "masks of torch": lambda: Masks("torch"),
    "masks of numpy": lambda: Masks("numpy"),
    "masks of Python": lambda: Masks("python"),
    "masks of an own generator": lambda: Masks("own"),
}


class Net(nn.Module):
    """A classifier with such parts in the middle, which returns its loss."""

    accepts_loss_kwargs = False

    def __init__(self, kinds: Sequence[str], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.parts = nn.ModuleList(KINDS[kind]() for kind in kinds)
        self.last = nn.Linear(HIDDEN, CLASSES)
        self.to(dtype)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        for part in self.parts:
            h = part(h)
        return {"loss": F.cross_entropy(self.last(h), labels)}


def batches(steps: int, size: int = 4, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, FEATURES, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


@dataclass
class Data:
    x: Any
    y: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any


Pair = namedtuple("Pair", "x y")


class Container(NamedTuple):
    """A container of a batch.

    Attributes:
        pack: function that puts inputs and labels into a container.
        unpack: function that takes them out, and leaves the container empty if it can.
    """

    pack: Callable[[Tensor, Tensor], Any]
    unpack: Callable[[Any], tuple[Any, Tensor]]


def _take_attributes(box: Any) -> tuple[Any, Tensor]:
    pair = box.x, box.y
    box.x = box.y = None
    return pair


def _packed(x: Tensor, y: Tensor) -> Any:
    return pack_padded_sequence(x.view(2, -1, FEATURES), [len(x) // 2] * 2, batch_first=True), y


CONTAINERS: dict[str, Container] = {
    "tuple": Container(lambda x, y: (x, y), tuple),
    "named tuple": Container(Pair, tuple),
    "list": Container(lambda x, y: [x, y], lambda box: (box.pop(0), box.pop())),
    "mapping": Container(lambda x, y: {"x": x, "y": y}, lambda box: (box.pop("x"), box.pop("y"))),
    "tokenizer's mapping": Container(
        lambda x, y: BatchEncoding({"x": x, "y": y}), lambda box: (box.pop("x"), box.pop("y"))
    ),
    "nested": Container(lambda x, y: {"a": [{"x": x}, (y,)]}, lambda box: (box["a"][0].pop("x"), box["a"].pop()[0])),
    "dataclass": Container(Data, _take_attributes),
    "frozen dataclass": Container(Frozen, lambda box: (box.x, box.y)),
    "object": Container(lambda x, y: SimpleNamespace(x=x, y=y, name="graph"), _take_attributes),
    "array": Container(lambda x, y: (x.numpy(), y), lambda box: (torch.from_numpy(box[0]), box[1])),
    "packed sequence": Container(
        _packed, lambda box: (nn.utils.rnn.pad_packed_sequence(box[0], batch_first=True)[0].flatten(0, 1), box[1])
    ),
    "nested tensor": Container(
        lambda x, y: (torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged), y),
        lambda box: (torch.cat(box[0].unbind()), box[1]),
    ),
    "sparse tensor": Container(lambda x, y: (x.to_sparse(), y), lambda box: (box[0].to_dense(), box[1])),
}


class Boxed(nn.Module):
    """A module whose batch comes in a container."""

    accepts_loss_kwargs = False

    def __init__(self, net: Net, container: str) -> None:
        super().__init__()
        self.net, self.container = net, container

    def forward(self, box: Any) -> Any:
        return self.net(*CONTAINERS[self.container].unpack(box))


def seed() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def _random_state() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def loss_of(net: nn.Module, batch: Batch, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss: Tensor = net(*batch)["loss"]
    return loss


def by_hand(
    net: Net,
    data: Sequence[Batch],
    *,
    ascent: str = "full",
    inner_iter: int = 1,
    norm: str = "tensor",
    autocast: bool = False,
) -> Net:
    """Train with AMP around SGD, written down directly."""
    seed()
    for k, (x, y) in enumerate(data):
        half = len(x) // 2
        part = (x[:half], y[:half]) if ascent in ("subset(0.5)", "split(0.5)") else (x, y)
        rest = (x[half:], y[half:]) if ascent == "split(0.5)" else (x, y)
        ascents = 0 if ascent == "every(2)" and k % 2 else inner_iter
        start, begin = copy.deepcopy(net), _random_state()
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        deltas = {name: torch.zeros_like(p) for name, p in net.named_parameters() if name in names}
        runs: Net = net
        for i in range(ascents + 1):
            if i:
                runs = copy.deepcopy(start)
                with torch.no_grad():
                    for name, p in runs.named_parameters():
                        if name in deltas:
                            p.add_(deltas[name])
                _set_random_state(begin)
            params = [p for p in runs.parameters() if p.requires_grad]
            loss = loss_of(runs, part if i < ascents else rest, autocast)
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            if i < ascents:
                for name, g in zip(names, grads, strict=True):
                    if g is not None:
                        deltas[name] = deltas[name] + INNER_LR * g
                every = torch.cat([d.flatten() for d in deltas.values()])
                for name, d in deltas.items():
                    size = float((every if norm == "global" else d).norm())
                    deltas[name] = d * min(1.0, EPSILON / max(size, 1e-300))
        if ascent == "split(0.5)":  # the state is that which the descent has left
            with torch.no_grad():
                for (name, p), q in zip(runs.named_parameters(), net.parameters(), strict=True):
                    p.copy_(q if name in names else p)
            net = runs
        for own, last in zip(own_generators(net), own_generators(runs), strict=True):
            own.bit_generator.state = last.bit_generator.state  # random numbers go on from the last pass
        with torch.no_grad():
            for p, g in zip([p for p in net.parameters() if p.requires_grad], grads, strict=True):
                if g is not None:
                    p.sub_(LR * g)
    return net


def _amp(net: nn.Module, **kwargs: Any) -> AMP:
    return AMP(net.parameters(), LR, epsilon=EPSILON, inner_lr=INNER_LR, **kwargs)


def own_generators(net: nn.Module) -> list[np.random.Generator]:
    return [part.own.generator for part in net.modules() if isinstance(part, Masks)]


def by_closure(net: nn.Module, data: Sequence[Batch], *, autocast: bool = False, **kwargs: Any) -> None:
    amp, passes = _amp(net, **kwargs), ExtraPasses(net, generators=own_generators(net))
    for batch in data:

        def closure(batch: Batch = batch) -> Tensor:
            amp.zero_grad()
            loss = loss_of(net, detached_inputs(batch), autocast)
            loss.backward()
            return loss

        amp.step(closure, passes=passes)


def by_passes(net: nn.Module, data: Sequence[Batch], *, autocast: bool = False, **kwargs: Any) -> None:
    amp, passes = _amp(net, **kwargs), ExtraPasses(net, generators=own_generators(net))
    for batch in data:
        made = 0
        for part in amp.ascent_passes([batch], passes=passes):
            loss_of(net, detached_inputs(part[0]), autocast).backward()
            made += 1
        (rest,) = amp.descent_batches([batch])
        with passes.nth(made):
            loss_of(net, rest, autocast).backward()
        amp.step()
        amp.zero_grad()


def by_attach(net: nn.Module, data: Sequence[Batch], *, autocast: bool = False, **kwargs: Any) -> None:
    amp = _amp(net, **kwargs)
    attach(amp, net, generators=own_generators(net))
    for batch in data:
        loss_of(net, batch, autocast).backward()
        amp.step()
        amp.zero_grad()


def by_amp_backward(net: nn.Module, data: Sequence[Batch], *, autocast: bool = False, **kwargs: Any) -> None:
    AcceleratorState._reset_state()  # which keeps the precision of the first accelerator in the process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if autocast else "no")
    model, optimizer = accelerator.prepare(net, _amp(net, **kwargs))
    for batch in data:
        own = own_generators(net)
        amp_backward(accelerator, model, optimizer, lambda b: loss_of(model, b), [batch], generators=own)
        optimizer.step()
        optimizer.zero_grad()
    AcceleratorState._reset_state()


class _InOrder(AMPTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class _SeedAtFirstStep(TrainerCallback):
    """Seeds again when the loader has drawn its own seed."""

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 0:
            seed()


SGD_OF_TRAINER = {"optim": "amp", "optim_args": "momentum=0.0,nesterov=False"}


def trainer_settings(steps: int) -> dict[str, Any]:
    """Options of a Trainer that makes plain steps at a constant rate, one row a batch, and leaves nothing behind."""
    return {
        "output_dir": tempfile.gettempdir(),  # nothing is written
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def by_trainer(
    net: nn.Module,
    data: Sequence[Batch],
    *,
    ascent: str = "full",
    inner_iter: int = 1,
    norm: str = "tensor",
    autocast: bool = False,
) -> None:
    settings = {
        **trainer_settings(len(data)),
        **SGD_OF_TRAINER,
        "amp_epsilon": EPSILON,
        "amp_inner_lr": INNER_LR,
        "amp_inner_iter": inner_iter,
        "amp_ascent": ascent,
        "amp_norm": norm,
        "bf16": autocast,
        "logging_steps": len(data),
        "seed": 5,
    }
    names = ("box",) if isinstance(net, Boxed) else ("x", "labels")
    rows = [dict(zip(names, batch, strict=True)) for batch in data]
    args = AMPTrainingArguments(**settings)
    trainer = _InOrder(
        model=net,
        args=args,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=lambda whole: whole[0],  # type: ignore[arg-type]
        callbacks=[_SeedAtFirstStep()],
    )
    trainer.amp_generators = own_generators(net)
    trainer.train()


DOORS: dict[str, Callable[..., None]] = {
    "closure": by_closure,
    "passes": by_passes,
    "attach": by_attach,
    "amp_backward": by_amp_backward,
    "AMPTrainer": by_trainer,
}


def difference(net: nn.Module, other: nn.Module) -> float:
    """Largest relative difference of a parameter or buffer."""
    theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    worst = 0.0
    for name, tensor in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
        a, b = tensor.detach().double(), theirs[name].detach().double()
        assert a.shape == b.shape, name
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-30)) if a.numel() else 0.0)
    return worst
