"""Steps that have nothing to ascend along: every door goes on as the same loop would with SGD, or says why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from stateful import EPSILON, INNER_LR, LR, SGD_OF_TRAINER, trainer_settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, amp_backward, attach

OPTIONS = {"epsilon": EPSILON, "inner_lr": INNER_LR}
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A classifier whose loss is of a kind of its own for batches of zeros."""

    accepts_loss_kwargs = False

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.last(torch.tanh(self.first(x))), labels)
        if self.kind == "constant" and not x.any():
            loss = 0 * loss
        if self.kind == "unreached" and not x.any():
            loss = torch.zeros((), dtype=torch.float64, requires_grad=True) * 1
        if self.kind == "detached" and not x.any():
            loss = loss.detach()
        return {"loss": loss}


def batches(rows: int | None) -> list[Batch]:
    """Three batches; the second one of zeros, with this number of rows, or left out."""
    generator = torch.Generator().manual_seed(1)
    some = [torch.randn(4, 4, generator=generator).double() for _ in range(2)]
    all_of_them = [some[0], *([] if rows is None else [torch.zeros(rows, 4).double()]), some[1]]
    return [(x, torch.zeros(len(x), dtype=torch.int64)) for x in all_of_them]


def by_sgd(net: Net, data: list[Batch], **_: Any) -> None:
    optimizer = SGD(net.parameters(), LR)
    for batch in data:
        net(*batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def _amp(net: Net, **kwargs: Any) -> AMP:
    return AMP(net.named_parameters(), LR, **OPTIONS, **kwargs)  # type: ignore[arg-type]


def by_closure(net: Net, data: list[Batch], **kwargs: Any) -> None:
    amp = _amp(net, **kwargs)
    for batch in data:

        def closure(batch: Batch = batch) -> Tensor:
            amp.zero_grad()
            loss: Tensor = net(*batch)["loss"]
            loss.backward()
            return loss

        amp.step(closure)


def by_passes(net: Net, data: list[Batch], **kwargs: Any) -> None:
    amp = _amp(net, **kwargs)
    for batch in data:
        for _ in amp.ascent_passes():
            net(*batch)["loss"].backward()
        net(*batch)["loss"].backward()
        amp.step()
        amp.zero_grad()


def by_attach(net: Net, data: list[Batch], **kwargs: Any) -> None:
    amp = _amp(net, **kwargs)
    attach(amp, net)
    for batch in data:
        net(*batch)["loss"].backward()
        amp.step()
        amp.zero_grad()


def by_amp_backward(net: Net, data: list[Batch], **kwargs: Any) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, _amp(net, **kwargs))
    for batch in data:
        amp_backward(accelerator, model, optimizer, lambda b: model(*b)["loss"], [batch])
        optimizer.step()
        optimizer.zero_grad()


def _by_trainer(kind: type[Trainer], args: TrainingArguments, net: Net, data: list[Batch], **kwargs: Any) -> None:
    class InOrder(kind):  # type: ignore[valid-type,misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    def collate(rows: list[int]) -> dict[str, Tensor]:
        return dict(zip(("x", "labels"), data[rows[0]], strict=True))

    InOrder(model=net, args=args, train_dataset=list(range(len(data))), data_collator=collate, **kwargs).train()


def by_amp_trainer(net: Net, data: list[Batch], parameters: str | None = None) -> None:
    options = {"amp_parameters": parameters, **{f"amp_{name}": value for name, value in OPTIONS.items()}}
    _by_trainer(AMPTrainer, AMPTrainingArguments(**trainer_settings(len(data)), **SGD_OF_TRAINER, **options), net, data)


def by_stock_trainer(net: Net, data: list[Batch], **kwargs: Any) -> None:
    amp = _amp(net, **kwargs)
    args = TrainingArguments(**trainer_settings(len(data)))
    _by_trainer(Trainer, args, net, data, optimizers=(amp, LambdaLR(amp, lambda _: 1.0)))


DOORS: dict[str, Callable[..., None]] = {
    "closure": by_closure,
    "passes": by_passes,
    "attach": by_attach,
    "amp_backward": by_amp_backward,
    "AMPTrainer": by_amp_trainer,
    "stock Trainer": by_stock_trainer,
}


def same(net: nn.Module, other: nn.Module) -> bool:
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=1e-12, atol=0.0) for p, q in pairs)


@pytest.fixture
def told() -> Iterator[Callable[[str], int]]:
    """How many warnings have these words."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield lambda words: sum(words in str(w.message) for w in record)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("kind", "rows"), [("constant", 4), ("unreached", 4), ("mean", 0)])
def test_a_batch_without_a_gradient_moves_nothing_and_the_training_goes_on(
    kind: str, rows: int, door: str, told: Callable[[str], int]
) -> None:
    net, expected = Net(kind), Net(kind)
    DOORS[door](net, batches(rows))
    by_passes(expected, batches(None))
    assert same(net, expected)
    assert told("a pass left no gradient to ascend along") == (kind == "unreached")


@pytest.mark.parametrize("door", DOORS)
def test_a_loss_that_requires_no_gradient_is_torchs_error(door: str) -> None:
    for run in (by_sgd, DOORS[door]):
        with pytest.raises(RuntimeError, match=r"does not require grad|requires no gradient"):
            run(Net("detached"), batches(4))


@pytest.mark.parametrize("door", sorted(set(DOORS) - {"AMPTrainer"}))
def test_a_ball_of_frozen_parameters_is_told_once_and_the_rest_is_trained(
    door: str, told: Callable[[str], int]
) -> None:
    nets = [Net("mean"), Net("mean")]
    for net in nets:
        net.last.requires_grad_(False)
    by_sgd(nets[0], batches(4))
    DOORS[door](nets[1], batches(4), parameters="last")
    assert same(*nets)
    assert told("none of the parameters that are to be perturbed requires a gradient") == 1


def test_a_ball_that_the_trainer_gives_no_optimizer_is_refused() -> None:
    """The Trainer's groups leave frozen parameters out."""
    net = Net("mean")
    net.last.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters='last' matches only parameters that are not trained"):
        by_amp_trainer(net, batches(4), parameters="last")


def test_a_ball_that_is_unfrozen_is_perturbed_from_then_on() -> None:
    net, expected = Net("mean"), Net("mean")
    for run in (net, expected):
        run.last.requires_grad_(False)
    amp = _amp(net, parameters="last")
    attach(amp, net)
    for unfreezes, batch in zip((False, True), batches(None), strict=True):
        net.last.requires_grad_(unfreezes)
        net(*batch)["loss"].backward()
        amp.step()
        amp.zero_grad()
    by_sgd(expected, batches(None)[:1])
    expected.last.requires_grad_(True)
    by_passes(expected, batches(None)[1:], parameters="last")
    assert same(net, expected)


def test_passes_without_backward_are_an_error_when_the_descent_has_a_gradient() -> None:
    net = Net("mean")
    amp, before = _amp(net), [p.clone() for p in net.parameters()]
    for _ in amp.ascent_passes():
        net(*batches(4)[0])
    net(*batches(4)[0])["loss"].backward()
    with pytest.raises(RuntimeError, match=r"passes before the ascent left no gradient.*call backward\(\)"):
        amp.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("door", ["passes", "attach", "amp_backward"])
def test_an_optimizer_that_steps_in_backward_by_hooks_is_refused(door: str) -> None:
    net = Net("mean")

    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.1 * p.grad)  # type: ignore[operator]
        p.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    with pytest.raises(RuntimeError, match="found no gradient after a pass, and the parameters have hooks"):
        DOORS[door](net, batches(4))


def test_fsdp_is_spoken_of_only_where_it_is() -> None:
    optimizer: Optimizer = _amp(Net("mean"))
    with pytest.raises(RuntimeError, match="found no gradient") as error:
        optimizer.ascend()  # type: ignore[attr-defined]
    assert "FSDP" not in str(error.value)
