"""Relatives of training loops that once came out wrong: each trains as AMP written by hand, or is told a sentence."""

from __future__ import annotations

import copy
import random
import warnings
from collections import UserDict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stateful import (
    CLASSES,
    DOORS,
    EPSILON,
    FEATURES,
    HIDDEN,
    INNER_LR,
    LR,
    SGD_OF_TRAINER,
    Batch,
    Kind,
    Net,
    batches,
    by_hand,
    difference,
    seed,
    trainer_settings,
)
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, _apply_optimizer_in_backward
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import SequentialSampler

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, amp_backward, attach

BALL: dict[str, Any] = {"epsilon": EPSILON, "inner_lr": INNER_LR}
SEE_THE_BATCH = ("attach", "amp_backward", "AMPTrainer")


def net_with(part: Callable[[], Kind]) -> Net:
    net = Net([])
    torch.manual_seed(1)
    net.parts.append(part())
    return net.double().train()


def assert_equal(net: nn.Module, expected: nn.Module) -> None:
    assert difference(net, expected) < 1e-10


# --- state that follows the weights or the features, as a momentum encoder and its queue do


class Centres(Kind):
    """Running centres, of which a batch moves some."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(CLASSES, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        y = h - self.centres[: len(h)].mean(0)
        self.centres[:2] += 0.5 * (h.detach()[:2] - self.centres[:2])
        return y


class TargetNetwork(Kind):
    """A slow copy with statistics of its own, moved by one batched kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 0.1)
        y: Tensor = self.online(h) + 0.5 * self.target(h.detach())
        return y


class LateQueue(Kind):
    """A queue in a buffer that is None until the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", None)

    def forward(self, h: Tensor) -> Tensor:
        y = h if self.queue is None else h + torch.softmax(h @ self.queue.t(), 1) @ self.queue
        self.queue = h.detach() if self.queue is None else torch.cat([h.detach(), self.queue])[:6]
        return y


class Bank(Kind):
    """Features of earlier batches in a container that is empty at first, and is changed in place."""

    def __init__(self, kind: Callable[[], Any]) -> None:
        super().__init__()
        self.bank = kind()

    def forward(self, h: Tensor) -> Tensor:
        kept = list(self.bank.values() if isinstance(self.bank, dict) else self.bank)
        if isinstance(self.bank, dict):
            self.bank[len(self.bank) % 2] = h.detach()[0]
        else:
            self.bank.append(h.detach()[0])
        return h + 0.5 * torch.stack(kept).mean(0) if kept else h


class Zero(Kind):
    """A hidden state that is a number until the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = 0.0

    def forward(self, h: Tensor) -> Tensor:
        y = h - self.state
        self.state = h.detach().mean(0)
        return y


# --- values computed from the weights, as `parametrize.cached()` keeps them


class Rounded(Kind):
    """Weights that are rounded with a straight-through gradient; a cache is keyed by the version of the weight."""

    def __init__(self, cache: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(HIDDEN, HIDDEN))
        self.key = -1 if cache else None
        self.kept: Any = None

    def forward(self, h: Tensor) -> Tensor:
        if self.key is None or self.key != self.weight._version:
            self.key = None if self.key is None else self.weight._version
            self.kept = [((8 * self.weight.detach()).round() / 8).numpy()]  # out of sight of the replay
        return torch.tanh(h @ (self.weight + (torch.from_numpy(self.kept[0]) - self.weight.detach())).t())


class Spectral(Kind):
    """Spectral normalisation without its power iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(HIDDEN, HIDDEN))

    def train(self, mode: bool = True) -> Spectral:
        super().train(mode)
        self.layer.eval()
        return self

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.layer(h))


class Normed(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.layer = weight_norm(nn.Linear(HIDDEN, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.layer(h))


# --- randomness from elsewhere than torch's own generator


class Shuffles(Kind):
    def forward(self, h: Tensor) -> Tensor:
        order = list(range(HIDDEN))
        random.shuffle(order)
        return torch.tanh(h[:, order] * torch.arange(HIDDEN))


class Masks(Kind):
    """Masks from a generator of the module's own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, h: Tensor) -> Tensor:
        if isinstance(self.generator, torch.Generator):
            values = torch.rand(h.numel(), generator=self.generator)
        else:
            values = torch.tensor([self.generator.random() for _ in range(h.numel())])
        return h * (values.view_as(h) > 0.3).to(h)


class ReversesGradients(Kind):
    """The reversal of a part's gradient, as adversarial training of domains has it, within the module."""

    def forward(self, h: Tensor) -> Tensor:
        return h - 2 * (0.3 * h - (0.3 * h).detach())


RELATIVES: dict[str, Callable[[], Kind]] = {
    "running centres": Centres,
    "target network": TargetNetwork,
    "queue that is None at first": LateQueue,
    "memory bank in a list": lambda: Bank(list),
    "memory bank in a deque": lambda: Bank(lambda: deque(maxlen=3)),
    "memory bank in a mapping": lambda: Bank(dict),
    "hidden state that is a number at first": Zero,
    "spectral norm in eval mode": Spectral,
    "random.shuffle": Shuffles,
    "numpy.random.Generator": lambda: Masks(np.random.default_rng(0)),
    "numpy.random.RandomState": lambda: Masks(np.random.RandomState(0)),
    "random.Random": lambda: Masks(random.Random(0)),
    "torch.Generator": lambda: Masks(torch.Generator()),
    "reversed gradients": ReversesGradients,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("relative", RELATIVES)
def test_parts_of_a_module(relative: str, door: str) -> None:
    net, twin = (net_with(RELATIVES[relative]) for _ in range(2))
    seed()
    DOORS[door](net, batches(4))
    assert_equal(net, by_hand(twin, batches(4)))


@pytest.mark.parametrize("door", DOORS)
def test_a_cache_that_is_keyed_by_the_version_of_the_weight(door: str) -> None:
    net = net_with(lambda: Rounded(cache=True))
    seed()
    DOORS[door](net, batches(4))
    assert_equal(net, by_hand(net_with(lambda: Rounded(cache=False)), batches(4)))


@pytest.mark.parametrize("door", DOORS)
def test_a_cache_of_parametrizations_around_the_whole_training(door: str) -> None:
    net = net_with(Normed)
    seed()
    with parametrize.cached():
        DOORS[door](net, batches(4))
    assert_equal(net, by_hand(net_with(Normed), batches(4)))


# --- what a module does to its batch, and what it is given


@dataclass
class Graph:
    """A batch that keeps what it holds in a mapping, as graph libraries do."""

    store: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.store[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.store[name] = value


@dataclass(slots=True)
class Slots:
    x: Any
    y: Any


class Marked(Tensor):
    """A subclass of Tensor, as torchvision's images are."""


def _halves(box: Any) -> tuple[Tensor, Tensor]:
    box["x"] = box["x"] / 2
    return box["x"], box["y"]


def _halves_in_slots(box: Any) -> tuple[Tensor, Tensor]:
    box.x = box.x / 2
    return box.x, box.y


def _halves_within(box: Any) -> tuple[Tensor, Tensor]:
    return _halves(box.inside)


def _masks_labels(box: Any) -> tuple[Tensor, Tensor]:
    return box[0], box[1].masked_fill_(box[1] == 0, 1)


def _reverses(box: Any) -> tuple[Tensor, Tensor]:
    box.reverse()
    return box[1], box[0]


def _attacks(box: Any) -> tuple[Tensor, Tensor]:
    x = box[0].requires_grad_()
    (g,) = torch.autograd.grad((x**3).sum(), x)
    return x.detach() + 0.1 * g.sign(), box[1]


Box = tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Any, Tensor]]]
RIGHT: dict[str, Box] = {
    "list that is reversed": (lambda x, y: [x, y], _reverses),
    "inputs whose gradient is switched on": (lambda x, y: (x, y), _attacks),
    "complex numbers": (lambda x, y: (torch.complex(x, -x), y), lambda box: (box[0].real, box[1])),
    "subclass of Tensor": (lambda x, y: (x.as_subclass(Marked), y), lambda box: (box[0].as_subclass(Tensor), box[1])),
    "UserDict": (lambda x, y: UserDict(x=x, y=y), lambda box: (box.pop("x"), box.pop("y"))),
    "slots that are given others": (Slots, _halves_in_slots),
}
REFUSED: dict[str, Box] = {
    "labels that are masked": (lambda x, y: (x, y), _masks_labels),
    "graph that is given others": (lambda x, y: Graph({"x": x, "y": y}), _halves),
    "mapping in an object": (lambda x, y: SimpleNamespace(inside={"x": x, "y": y}), _halves_within),
    "array in an object": (
        lambda x, y: SimpleNamespace(x=x.numpy(), y=y),
        lambda box: (torch.from_numpy(np.multiply(box.x, 0.5, out=box.x)), box.y),
    ),
}


class Takes(nn.Module):
    """A module that takes its batch out of a box."""

    accepts_loss_kwargs = False

    def __init__(self, net: Net, take: Callable[[Any], tuple[Any, Tensor]]) -> None:
        super().__init__()
        self.net, self.take = net, take

    def forward(self, box: Any) -> Any:
        return self.net(*self.take(box))


def by_door(door: str, module: nn.Module, boxes: Sequence[Any]) -> None:
    seed()
    if door == "AMPTrainer":
        trained_by(_InOrder, module, [{"box": box} for box in boxes])
    else:
        DOORS[door](module, [(box,) for box in boxes])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", RIGHT)
def test_batches_that_every_pass_sees_as_they_came(kind: str, door: str) -> None:
    pack, take = RIGHT[kind]
    net = Net(["queue"])
    by_door(door, Takes(net, take), [pack(x.clone(), y.clone()) for x, y in batches(3)])
    assert_equal(net, by_hand(Net(["queue"]), [take(pack(x.clone(), y.clone())) for x, y in batches(3)]))


@pytest.mark.parametrize("door", SEE_THE_BATCH)
@pytest.mark.parametrize("kind", REFUSED)
def test_batches_that_a_pass_has_changed_are_refused(kind: str, door: str) -> None:
    pack, take = REFUSED[kind]
    with pytest.raises(RuntimeError, match="in place, so a second pass would see another batch; change a copy instead"):
        by_door(door, Takes(Net([]), take), [pack(x.clone(), y.clone()) for x, y in batches(3)])


@pytest.mark.parametrize("door", SEE_THE_BATCH)
def test_an_iterator_is_no_batch(door: str) -> None:
    with pytest.raises(TypeError, match="can be read only once, so a second pass would see another batch"):
        by_door(door, Takes(Net([]), tuple), [iter(batch) for batch in batches(3)])


# --- gradients of what AMP does not own


def beside_by_attach(net: nn.Module, amp: AMP) -> Callable[[Batch], object]:
    attach(amp, net)
    return lambda batch: net(*batch)["loss"].backward()


def beside_by_amp_backward(net: nn.Module, amp: AMP) -> Callable[[Batch], object]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, amp)
    return lambda batch: amp_backward(accelerator, model, optimizer, lambda b: model(*b)["loss"], [batch])


class Normalised(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.norm(h))


OWNED: dict[str, Callable[[Net], list[nn.Parameter]]] = {
    "one layer of three": lambda net: list(net.last.parameters()),
    "normalisation in the middle": lambda net: list(net.parts.parameters()),
    "one bias": lambda net: [net.first.bias],
}


@pytest.mark.parametrize("owned", OWNED)
@pytest.mark.parametrize(
    ("door", "others"),
    [
        (beside_by_attach, "step each time"),
        (beside_by_attach, "step every second time"),  # amp_backward() drops gradients from before, as it says
        (beside_by_attach, "never step"),
        (beside_by_amp_backward, "step each time"),
        (beside_by_amp_backward, "never step"),
    ],
)
def test_parameters_beside_those_of_amp(door: Any, owned: str, others: str) -> None:
    """Clipping sees all of them, and the gradients of others may add up over steps where nobody clears them."""
    net, twin = net_with(Normalised), net_with(Normalised)
    amp = AMP(OWNED[owned](net), LR, **BALL)
    own = {id(p) for p in OWNED[owned](net)}
    other = torch.optim.SGD([p for p in net.parameters() if id(p) not in own], LR)
    backward = door(net, amp)
    kept = [torch.zeros_like(p) for p in twin.parameters()]
    mine = [any(p is q for q in OWNED[owned](twin)) for p in twin.parameters()]
    for k, batch in enumerate(batches(4)):
        steps = others == "step each time" or (others == "step every second time" and k % 2 == 1)
        backward(batch)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        amp.step()
        amp.zero_grad()
        if steps:
            other.step()
        if steps or others == "never step":
            net.zero_grad()

        at = copy.deepcopy(twin)
        grads = torch.autograd.grad(at(*batch)["loss"], list(at.parameters()))
        with torch.no_grad():
            for p, g, is_mine in zip(at.parameters(), grads, mine, strict=True):
                p.add_(INNER_LR * g * min(1.0, EPSILON / float(INNER_LR * g.norm())) * is_mine)
        grads = torch.autograd.grad(at(*batch)["loss"], list(at.parameters()))
        total = [a + b for a, b in zip(kept, grads, strict=True)]
        shrunk = min(1.0, 0.5 / (float(torch.cat([g.flatten() for g in total]).norm()) + 1e-6))
        total = [shrunk * g for g in total]
        with torch.no_grad():
            for p, g, is_mine in zip(twin.parameters(), total, mine, strict=True):
                p.sub_(LR * g * (is_mine or steps))
        carries = others == "step every second time" and not steps
        kept = [g * (carries and not is_mine) for g, is_mine in zip(total, mine, strict=True)]
    assert_equal(net, twin)


# --- losses that are turned round outside the module


def _hooked(loss: Tensor) -> Tensor:
    loss.register_hook(lambda g: -g)
    return loss


OUTSIDE: dict[str, Callable[[nn.Module, Batch, Batch], Tensor]] = {
    "a reward above a baseline": lambda net, a, _: 3.0 - net(*a)["loss"],
    "a hook on the loss": lambda net, a, _: _hooked(net(*a)["loss"]),
    "one batch against another": lambda net, a, b: net(*a)["loss"] - net(*b)["loss"],
    "the inverse": lambda net, a, _: 1 / net(*a)["loss"],
}


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_loss_that_is_turned_round_outside_is_refused(outside: str) -> None:
    net, (a, b) = Net([]), batches(2)
    amp = AMP(net.parameters(), LR, **BALL)
    attach(amp, net)
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"multiplied by a negative number|two losses of an attached module"):
        (OUTSIDE[outside](net, a, b).backward(), amp.step())
    assert difference(net, before) == 0.0


def test_a_base_optimizer_that_maximises_is_given_the_reverse_of_the_loss() -> None:
    net = Net([])
    amp = AMP(net.parameters(), LR, maximize=True, **BALL)
    for x, y in batches(4):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            amp.zero_grad()
            loss: Tensor = -net(x, y)["loss"]
            loss.backward()
            return loss

        amp.step(closure)
    assert_equal(net, by_hand(Net([]), batches(4)))


# --- loops that skip a batch


def _looks_at_the_loss(net: nn.Module, amp: AMP, batch: Batch) -> bool:
    loss = net(*batch)["loss"]
    if loss.isfinite():
        loss.backward()
    return bool(loss.isfinite())


def _clips_or_fails(net: nn.Module, amp: AMP, batch: Batch) -> bool:
    net(*batch)["loss"].backward()
    try:
        nn.utils.clip_grad_norm_(net.parameters(), 1e9, error_if_nonfinite=True)
    except RuntimeError:
        return False
    return True


def _fails_in_forward(net: Any, amp: AMP, batch: Batch) -> bool:
    def check(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.isfinite().all():
            raise ArithmeticError

    handle = net.last.register_forward_hook(check)
    try:
        net(*batch)["loss"].backward()
    except ArithmeticError:
        return False
    finally:
        handle.remove()
    return True


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("try_batch", [_looks_at_the_loss, _clips_or_fails, _fails_in_forward])
@pytest.mark.parametrize("door", ["attach", "passes"])
def test_a_batch_that_the_loop_skips_leaves_nothing(door: str, try_batch: Any, set_to_none: bool) -> None:
    good = batches(4)
    bad = (torch.full((4, FEATURES), torch.inf).double(), good[0][1])
    net = Net([])
    amp = AMP(net.parameters(), LR, **BALL)
    if door == "attach":
        attach(amp, net)
    for batch in [good[0], bad, *good[1:]]:
        fine = True
        if door == "passes":
            for _ in amp.ascent_passes():
                if not (fine := try_batch(net, amp, batch)):
                    break
        if fine and try_batch(net, amp, batch):
            amp.step()
        else:
            amp.restore()
        net.zero_grad(set_to_none=set_to_none)
    assert amp.skipped_steps == 0
    assert_equal(net, by_hand(Net([]), good))


# --- optimizers around AMP, and AMP around AMP


@pytest.mark.usefixtures("process_group")
def test_local_sgd_around_amp() -> None:
    net = Net([])
    amp = AMP(net.parameters(), LR, **BALL)
    attach(amp, net)
    optimizer = PostLocalSGDOptimizer(amp, PeriodicModelAverager(period=2))
    for batch in batches(4):
        net(*batch)["loss"].backward()
        optimizer.step()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
    assert_equal(net, by_hand(Net([]), batches(4)))


def test_an_amp_for_each_parameter_that_steps_in_backward_is_refused() -> None:
    net, (batch,) = Net([]), batches(1)
    _apply_optimizer_in_backward(AMP, net.parameters(), {"lr": LR})
    with pytest.raises(RuntimeError, match="would train without the perturbation that you asked for"):
        net(*batch)["loss"].backward()


def test_amp_around_amp_is_refused() -> None:
    net, (batch,) = Net([]), batches(1)
    amp = AMP(net.parameters(), LR, base_optimizer=AMP)
    attach(amp, net)
    net(*batch)["loss"].backward()
    with pytest.raises(RuntimeError, match="would train without the perturbation that you asked for"):
        amp.step()


def test_two_amps_in_one_attached_module_are_refused() -> None:
    net = Net([])
    attach(AMP(net.first.parameters(), LR), net)
    with pytest.raises(ValueError, match="attached already"):
        attach(AMP(net.last.parameters(), LR), net)


# --- subclasses of the Trainer


class _InOrder(AMPTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class OwnLoss(_InOrder):
    """Takes the labels out of the inputs, and mixes inputs and labels up."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        share = float(np.random.random())
        x = share * inputs["x"] + (1 - share) * inputs["x"].flip(0)
        loss = lambda y: model(x=x, labels=y)["loss"]  # noqa: E731
        return share * loss(labels) + (1 - share) * loss(labels.flip(0))


class OwnStep(_InOrder):
    """Everything by itself."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, {**inputs, "x": -2 * inputs["x"]})
        self.accelerator.backward(loss)
        return loss.detach()


class Skips(_InOrder):
    """Makes nothing of every batch whose first label is 0."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if int(inputs["labels"][0]) == 0:
            return torch.zeros(())
        return super().training_step(model, inputs, num_items_in_batch)


class Twice(_InOrder):
    """Two backward passes in a step."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        other = {**inputs, "x": -inputs["x"]}
        return super().training_step(model, inputs) + super().training_step(model, other)


class Counts(_InOrder):
    """Prepares each batch by a count of its own."""

    prepared = 0

    def _prepare_inputs(self, inputs: Any) -> Any:
        self.prepared += 1
        return super()._prepare_inputs({**inputs, "x": inputs["x"] * self.prepared})


class LossOf(nn.Module):
    """The loss that a subclass of the Trainer makes, for AMP by hand."""

    def __init__(self, loss: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = Net([]), loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.net, x, labels)}


def _mixed(net: Net, x: Tensor, y: Tensor) -> Tensor:
    share = float(np.random.random())
    x = share * x + (1 - share) * x.flip(0)
    total: Tensor = share * net(x, y)["loss"] + (1 - share) * net(x, y.flip(0))["loss"]
    return total


def trained_by(kind: type[_InOrder], model: nn.Module, rows: Sequence[Any], **kwargs: Any) -> None:
    ball = {"amp_epsilon": EPSILON, "amp_inner_lr": INNER_LR}
    settings = {**trainer_settings(len(rows)), **SGD_OF_TRAINER, **ball}
    args = AMPTrainingArguments(**{**settings, **kwargs})
    trainer = kind(model=model, args=args, train_dataset=rows, data_collator=lambda whole: whole[0])  # type: ignore[arg-type]
    seed_at_first = trainer.get_batch_samples

    def get_batch_samples(*args: Any, **kwargs: Any) -> Any:  # the loader has drawn its own seed by then
        if trainer.state.global_step == 0:
            seed()
        return seed_at_first(*args, **kwargs)

    trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
    trainer.train()


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (OwnLoss, _mixed),
        (OwnStep, lambda net, x, y: net(-2 * x, y)["loss"]),
        (Twice, lambda net, x, y: net(x, y)["loss"] + net(-x, y)["loss"]),
        (Counts, None),
    ],
)
@pytest.mark.parametrize("inner_iter", [1, 2])
def test_steps_of_a_subclass_of_the_trainer(kind: type[_InOrder], loss: Any, inner_iter: int) -> None:
    net, data = Net([]), batches(4)
    trained_by(kind, net, [{"x": x, "labels": y} for x, y in data], amp_inner_iter=inner_iter)
    if loss is None:
        loss, data = (lambda net, x, y: net(x, y)["loss"]), [(k * x, y) for k, (x, y) in enumerate(data, 1)]
    assert_equal(net, by_hand(LossOf(loss), data, inner_iter=inner_iter).net)  # type: ignore[arg-type]


def test_a_step_that_skips_a_micro_batch_skips_it_in_every_pass() -> None:
    net, data = Net([]), batches(6)
    data[2][1][0], data[3][1][0] = 0, 1  # one micro-batch of the second window
    for k in (0, 1, 4, 5):
        data[k][1][0] = 1
    rows = [{"x": x, "labels": y} for x, y in data]
    trained_by(Skips, net, rows, gradient_accumulation_steps=2, max_steps=3)
    windows = [(torch.stack(x), torch.stack(y)) for x, y in (zip(*data[k : k + 2], strict=True) for k in (0, 2, 4))]

    def loss(net: Net, x: Tensor, y: Tensor) -> Tensor:
        losses = [net(a, b)["loss"] for a, b in zip(x, y, strict=True) if int(b[0])]
        return torch.stack(losses).sum() / len(x)

    assert_equal(net, by_hand(LossOf(loss), windows).net)  # type: ignore[arg-type]


def test_a_step_that_skips_a_whole_batch_is_told() -> None:
    data = batches(3)
    data[1][1][0] = 0
    with pytest.warns(RuntimeWarning, match="a pass left no gradient to ascend along"):
        trained_by(Skips, Net([]), [{"x": x, "labels": y} for x, y in data])


# --- copies of the weights


def _functional(net: Net, batch: Batch) -> None:
    copies = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    functional_call(net, copies, batch)["loss"].backward()
    for name, p in net.named_parameters():
        p.grad = copies[name].grad


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("door", ["closure", "passes"])
def test_a_loop_that_computes_with_copies_is_right_or_told(door: str, fresh: bool) -> None:
    """Copies that are made anew in every pass see the perturbation; those of the step before do not."""
    net, stale = Net([]), Net([])
    amp = AMP(net.parameters(), LR, **BALL)
    told = nullcontext() if fresh else pytest.warns(UserWarning, match="the loop does not see the perturbation")
    with warnings.catch_warnings(), told:
        if fresh:
            warnings.simplefilter("error")
        for batch in batches(4):
            stale.load_state_dict(net.state_dict())

            def backward(batch: Batch = batch) -> Tensor:
                amp.zero_grad()
                _functional(net if fresh else stale, batch)
                for p, q in zip(net.parameters(), stale.parameters(), strict=True):
                    p.grad = p.grad if fresh else q.grad
                return torch.zeros(())

            if door == "closure":
                amp.step(backward)
            else:
                for _ in amp.ascent_passes():
                    backward()
                backward()
                amp.step()
    if fresh:
        assert_equal(net, by_hand(Net([]), batches(4)))


@pytest.mark.parametrize("door", ["closure", "passes", "attach"])
def test_a_model_that_was_copied_after_the_optimizer_was_made_is_refused_or_told(door: str) -> None:
    net, (batch,) = Net([]), batches(1)
    amp = AMP(net.parameters(), LR, **BALL)
    net = copy.deepcopy(net)

    def pass_by_hand() -> None:
        for _ in amp.ascent_passes():
            net(*batch)["loss"].backward()

    if door == "closure":
        with pytest.warns(RuntimeWarning, match="a pass left no gradient to ascend along"):
            amp.step(lambda: net(*batch)["loss"].backward())
    elif door == "passes":
        with pytest.warns(RuntimeWarning, match="a pass left no gradient to ascend along"):
            pass_by_hand()
    else:
        with pytest.raises(ValueError, match="not in the module"):
            attach(amp, net)


def test_a_flat_parameter_whose_views_are_the_weights() -> None:
    """One tensor for the optimizer has one ball, as all weights together have with ``norm="global"``."""
    net = Net([])
    flat = nn.Parameter(nn.utils.parameters_to_vector(net.parameters()).detach().clone())
    nn.utils.vector_to_parameters(flat.detach(), net.parameters())
    amp = AMP([flat], LR, **BALL)
    for batch in batches(4):

        def backward(batch: Batch = batch) -> Tensor:
            net.zero_grad()
            loss: Tensor = net(*batch)["loss"]
            loss.backward()
            flat.grad = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            return loss

        amp.step(backward)
    assert_equal(net, by_hand(Net([]), batches(4), norm="global"))
