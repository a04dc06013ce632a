"""Modules that are no plain stack of layers: an attached one trains as with a closure, bit for bit.

Recurrent ones keep flat lists of their weights, parametrized ones compute theirs from other parameters in each pass
(and some update buffers meanwhile), tied ones have two names for one weight.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from doors import DOORS, Door, by_attach, by_closure
from problems import SGD_ARGS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from amp_plugin import AMP, LossModule

STEPS, BATCH, LENGTH, WIDTH, CLASSES = 10, 4, 5, 6, 3
Wrap = Callable[[nn.Module], nn.Module]


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x + self.attention(x, x, x)[0]).mean(1))
        return y


def normalised(wrap: Wrap) -> nn.Module:
    """Its middle layer's weight is computed from other parameters."""
    layers = [nn.Flatten(), nn.Linear(LENGTH * WIDTH, 8), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.again.weight = self.up.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.up, self.down, self.again):
            x = torch.tanh(layer(x))
        y: Tensor = self.head(x.mean(1))
        return y


class Listed(nn.Module):
    """Keeps its weights in lists of its own, and views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.weights = [[layer.weight, layer.bias] for layer in self.layers]
        self.views = [p.detach().view(-1) for p in self.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in self.weights:
            x = torch.tanh(F.linear(x, weight, bias))
        size = torch.stack([v.square().sum() for v in self.views]).sum()
        y: Tensor = self.head(x.mean(1)) / size.sqrt()
        return y


KINDS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM(WIDTH, 7, 2, batch_first=True, dropout=0.2, bidirectional=True)),
    "LSTM with projections": lambda: Recurrent(nn.LSTM(WIDTH, 7, batch_first=True, proj_size=3)),
    "GRU": lambda: Recurrent(nn.GRU(WIDTH, 7, 2, batch_first=True, dropout=0.2)),
    "attention": Attention,
    "weight norm": lambda: normalised(parametrizations.weight_norm),
    "weight norm by hooks": lambda: normalised(nn.utils.weight_norm),
    "spectral norm": lambda: normalised(parametrizations.spectral_norm),
    "spectral norm by hooks": lambda: normalised(nn.utils.spectral_norm),
    "orthogonal": lambda: normalised(parametrizations.orthogonal),
    "tied": Tied,
    "listed": Listed,
}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, LENGTH, WIDTH, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def module_of(kind: str) -> LossModule:
    torch.manual_seed(0)
    module = LossModule(KINDS[kind](), F.cross_entropy).eval()
    module(*batches()[0])  # lazy layers
    return module.train()


def amp(module: nn.Module, epsilon: float = 0.1) -> AMP:
    return AMP(module.parameters(), epsilon=epsilon, inner_lr=0.5, inner_iter=2, **SGD_ARGS)


def trained(kind: str, door: Door, epsilon: float = 0.1) -> LossModule:
    module = module_of(kind)
    step = door(module, amp(module, epsilon))
    torch.manual_seed(5)
    for batch in batches():
        step(batch)
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_doors_are_the_same_bit_for_bit(kind: str) -> None:
    weights = [trained(kind, door).state_dict() for door in DOORS]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])
    unperturbed = trained(kind, by_attach, epsilon=0.0).state_dict()
    distance = torch.cat([(weights[0][name] - unperturbed[name]).flatten() for name in unperturbed]).norm()
    assert distance > 1e-2 * torch.cat([w.flatten() for w in unperturbed.values()]).norm(), "AMP must act"


@pytest.mark.parametrize("kind", ["spectral norm", "spectral norm by hooks"])
def test_buffers_that_a_parametrization_updates_count_the_clean_pass_alone(kind: str) -> None:
    module, plain = module_of(kind), module_of(kind)
    by_attach(module, amp(module))
    batch = batches()[0]
    module(*batch)["loss"].backward()
    plain(*batch)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("door", [by_closure, by_attach])
def test_a_weight_that_was_computed_before_the_perturbation_is_computed_again(door: Door) -> None:
    """`parametrize.cached` keeps it from the pass at theta; the pass at theta + delta must not train with that."""
    module, twin = module_of("weight norm"), module_of("weight norm")
    step, without_cache = door(module, amp(module)), door(twin, amp(twin))
    for batch in batches():
        with parametrize.cached():
            step(batch)
        without_cache(batch)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
