"""`split`: the ascent on a part of the batch, the descent on the rest, every sample once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ascent_doors import BALL, LOOPS, SGD, make, train, train_with_trainer
from ascent_reference import Batch, policy_trajectory
from exactness_problem import Net
from passes import windows_of
from reference import l2
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, ExtraPasses, LossModule, attach
from amp_plugin.core.policies import make_policy
from amp_plugin.core.policies.part import PartOfBatch

PART = "split(0.25)"  # of 8 samples: 2 and 6
SEES_BATCH = [door for door in LOOPS if door not in ("closure", "ascend")]


def displaced(net: Net, batch: Batch) -> Net:
    """A copy at theta + delta, ascended on these samples; its running statistics are those of the net."""
    net = copy.deepcopy(net)
    statistics = {name: b.clone() for name, b in net.named_buffers()}
    grads = torch.autograd.grad(net(*batch)["loss"], list(net.parameters()))
    with torch.no_grad():
        for p, g in zip(net.parameters(), grads, strict=True):
            step = BALL["inner_lr"] * g
            p.add_(step * min(1.0, BALL["epsilon"] / l2(step)))
        for name, b in net.named_buffers():
            b.copy_(statistics[name])
    return net


@pytest.mark.parametrize("door", [*SEES_BATCH, "AMPTrainer"])
def test_the_statistics_are_those_of_the_descent(door: str, tmp_path: Path) -> None:
    """Of the rest, at theta + delta, once."""
    ((x, y),) = windows_of(1)[0]
    net, amp = make(PART, None)
    moved = displaced(net, (x[:2], y[:2]))
    moved(x[2:], y[2:])
    if door == "AMPTrainer":
        args = AMPTrainingArguments(
            str(tmp_path), optim="amp", amp_ascent=PART, amp_epsilon=BALL["epsilon"], amp_inner_lr=BALL["inner_lr"],
            per_device_train_batch_size=8, max_steps=1, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        data: Any = [{"pixel_values": x, "labels": y}]
        trainer = AMPTrainer(model=net, args=args, train_dataset=data, data_collator=lambda rows: rows[0])
        trainer.train()
    elif door == "passes":
        passes = ExtraPasses(net)
        for part in amp.ascent_passes([(x, y)], passes=passes):
            net(*part[0])["loss"].backward()
        with passes.nth(1):
            (rest,) = amp.descent_batches([(x, y)])
            net(*rest)["loss"].backward()
        amp.step()
    else:
        LOOPS[door](net, amp)([(x, y)])
    for (name, b), want in zip(net.named_buffers(), moved.buffers(), strict=True):
        torch.testing.assert_close(b, want, rtol=1e-9, atol=1e-12, msg=f"{door}: {name}")


def test_all_passes_write_the_statistics_if_that_is_asked_for() -> None:
    ((x, y),) = windows_of(1)[0]
    net, amp = make(PART, None)
    moved = displaced(net, (x[:2], y[:2]))
    net_after = copy.deepcopy(net)
    net_after(x[:2], y[:2])
    for b, first in zip(moved.buffers(), net_after.buffers(), strict=True):
        b.copy_(first)
    moved(x[2:], y[2:])
    attach(amp, net, batch_norm="all")
    net(x, y)["loss"].backward()
    for b, want in zip(net.buffers(), moved.buffers(), strict=True):
        torch.testing.assert_close(b, want, rtol=1e-9, atol=1e-12)


def test_the_clean_loss_is_that_of_the_part() -> None:
    windows = windows_of(1)
    ((x, y),) = windows[0]
    want = Net().double()(x[:2], y[:2])["loss"].item()
    net, amp = make(PART, None)
    attachment = attach(amp, net)
    output = net(x, y)
    assert output["loss"].item() == attachment.loss.item() == want  # type: ignore[union-attr]
    assert len(output["logits"]) == 6, "the outputs are those of the descent"
    moved = displaced(make(PART, None)[0], (x[:2], y[:2]))
    assert attachment.amp_loss.item() == pytest.approx(moved(x[2:], y[2:])["loss"].item())  # type: ignore[union-attr]
    first = train("AMPTrainer", PART, None, windows).logs[0]
    assert first["loss"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("door", SEES_BATCH)
@pytest.mark.parametrize("size", [1, 3, 4, 5, 7])
def test_batches_of_few_samples(door: str, size: int) -> None:
    """Both parts have two samples, which BatchNorm needs; what is less than four is passed twice."""
    windows = [[(x[:size], y[:size]) for x, y in window] for window in windows_of(1)]
    ascended = 2 if size > 3 else size

    def rule(m: Any) -> Any:
        return m.gradient([(x[:ascended], y[:ascended]) for x, y in m.window])

    def rest(window: Sequence[Batch]) -> Sequence[Batch]:
        return [(x[ascended:], y[ascended:]) for x, y in window] if size > 3 else window

    net, amp = make(PART, None)
    step = LOOPS[door](net, amp)
    want = policy_trajectory(Net(), F.cross_entropy, windows, rule, **SGD, **BALL, descent_on=rest)
    for window, (theta, _) in zip(windows, want, strict=True):
        step(window)
        assert amp.passes == (2.0 if size < 4 else 1.0)
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), theta[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("door", SEES_BATCH)
def test_several_ascent_steps_take_the_same_part(door: str) -> None:
    net, amp = make("split(0.25, random=True)", None, inner_iter=3)
    seen: list[list[float]] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(sorted(args[0][:, 0, 0, 0].tolist())))
    window = windows_of(1)[0]
    LOOPS[door](net, amp)(window)
    passes = [seen[k] for k in range(len(seen)) if k == 0 or len(seen) == 4 or k in (1, 2, 3)]
    assert len(passes) == 4
    assert passes[0] == passes[1] == passes[2]
    assert sorted(passes[0] + passes[3]) == sorted(window[0][0][:, 0, 0, 0].tolist())
    assert amp.passes == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["subset", "split"])
@pytest.mark.parametrize("micro_batches", [1, 5])
def test_a_random_part_is_drawn_anew_in_every_step(name: str, micro_batches: int) -> None:
    policy = make_policy(f"{name}(0.4, random=True)")
    assert str(policy) == f"{name}(0.4, random=True)"
    assert isinstance(policy, PartOfBatch)
    x = torch.arange(5)
    batches = [(x, x.numpy(), {"x": 10 * x})] if micro_batches == 1 else list(x)
    torch.manual_seed(0)
    drawn = set()
    for _ in range(60):
        part, rest, share = policy.divide(batches, leave=True)
        if micro_batches == 1:
            (part, array, named), rest = part[0], rest[0][0]
            assert part.tolist() == array.tolist() == (named["x"] // 10).tolist()
        chosen, left = (tuple(int(i) for i in some) for some in (part, rest))
        assert share == 0.4
        assert sorted(chosen) == list(chosen), "the order of the batch"
        assert sorted(chosen + left) == list(range(5))
        drawn.add(chosen)
    assert len(drawn) == 10, "all pairs of five"


def test_a_random_part_goes_on_after_a_resume(tmp_path: Path) -> None:
    windows = windows_of(2)
    ascent = "split(0.5, random=True)"
    saves = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 9}
    through = train_with_trainer(ascent, None, windows, **saves)
    resumed = train_with_trainer(ascent, None, windows, resume=str(tmp_path / "checkpoint-9"), **saves)
    for name, tensor in through.weights[-1].items():
        assert torch.equal(resumed.weights[-1][name], tensor), name
    first = train_with_trainer("split(0.5)", None, windows)
    assert any(not torch.equal(first.weights[-1][name], tensor) for name, tensor in through.weights[-1].items())


def test_a_descent_on_the_whole_batch_is_refused() -> None:
    """A loop that was written before there was a rest."""
    ((x, y),) = windows_of(1)[0]
    net, amp = make(PART, None)
    theta = [p.detach().clone() for p in net.parameters()]

    def passes(over: Callable[[Any], Any]) -> None:
        for part in amp.ascent_passes([(x, y)]):
            net(*part[0])["loss"].backward()
        for batch in over([(x, y)]):
            net(*batch)["loss"].backward()
        amp.step()

    with pytest.raises(RuntimeError, match=r"make its pass over optimizer.descent_batches\(\[batch\]\)"):
        passes(lambda batches: batches)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), theta, strict=True))
    amp.zero_grad()
    passes(amp.descent_batches)
    assert amp.passes == 1.0


class ByItems(nn.Module):
    """The sum of squares over the number of items, which is not that of samples: labels of -100 do not count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        counts = labels != -100
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": (self.linear(x).square().sum(1) * counts).sum() / items}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_items_are_counted_in_each_part(micro_batches: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    size = 12 // micro_batches
    x = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, -100, 1, 1, -100, -100, 0, 1, 1, 0, -100, 1])
    model = ByItems()
    expected = copy.deepcopy(model)
    cut = 3 if micro_batches == 1 else 4
    grads = torch.autograd.grad(expected(x[:cut], labels[:cut])["loss"], list(expected.parameters()))
    deltas = [0.2 * g * min(1.0, 0.1 / l2(0.2 * g)) for g in grads]
    with torch.no_grad():
        for p, d in zip(expected.parameters(), deltas, strict=True):
            p.add_(d)
    grads = torch.autograd.grad(expected(x[cut:], labels[cut:])["loss"], list(expected.parameters()))
    with torch.no_grad():
        for p, d, g in zip(expected.parameters(), deltas, grads, strict=True):
            p.sub_(d + 0.5 * g)
    args = AMPTrainingArguments(
        str(tmp_path), optim="amp", optim_args="momentum=0.0", learning_rate=0.5, lr_scheduler_type="constant",
        amp_ascent=PART, amp_epsilon=0.1, amp_inner_lr=0.2, per_device_train_batch_size=size, max_grad_norm=0.0,
        gradient_accumulation_steps=micro_batches, max_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    data: Any = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]

    class InOrder(AMPTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    InOrder(model=model, args=args, train_dataset=data).train()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ascent", "message"),
    [
        ("split(1)", r"split\(fraction\) needs a fraction of the batch in \(0, 1\), got 1"),
        ("split(0)", r"in \(0, 1\), got 0"),
        ("split", r"split takes \(fraction, random\), got split"),
        ("split(0.5, random=2)", "needs random=True or False, got 2"),
        ("split(0.5), subset(0.5)", "there can be one part only, split or subset"),
        ("momentum, split(0.5)", "momentum makes no ascent pass"),
    ],
)
def test_what_cannot_be_meant_is_refused(ascent: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(ascent)


class Captioned(nn.Module):
    """Images against captions, which the forward pass itself turns into numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.lengths = nn.Linear(4, 3), nn.Embedding(16, 3)
        self.pairs: list[tuple[int, list[str]]] = []

    def forward(self, images: Tensor, captions: Any) -> dict[str, Tensor]:
        captions = captions["text"] if isinstance(captions, dict) else captions
        self.pairs.append((len(images), list(captions)))
        scores = self.images(images) @ self.lengths(torch.tensor([len(c) for c in captions])).T
        return {"loss": F.cross_entropy(scores, torch.arange(len(images)))}


CAPTIONS = ["a" * (i + 1) for i in range(8)]


@pytest.mark.parametrize("ascent", ["subset(0.25)", PART, "split(0.25, random=True)"])
@pytest.mark.parametrize("captions", [CAPTIONS, tuple(CAPTIONS), {"text": CAPTIONS}], ids=["list", "tuple", "dict"])
def test_strings_that_would_stay_whole_beside_a_part_are_refused(ascent: str, captions: Any) -> None:
    model = Captioned()
    optimizer = AMP(model.parameters(), lr=0.1, ascent=ascent)
    message = r"as long as it is; give them as a numpy array"
    with pytest.raises(ValueError, match=message):
        next(optimizer.ascent_passes([(torch.randn(8, 4), captions)]))
    attach(optimizer, model)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(8, 4), captions)


def test_an_array_of_strings_is_divided_and_a_list_of_other_length_is_not_of_the_samples() -> None:
    model = Captioned()
    optimizer = AMP(model.parameters(), lr=0.1, ascent=PART)
    attach(optimizer, model)
    model(torch.randn(8, 4), np.array(CAPTIONS))["loss"].backward()
    optimizer.step()
    assert model.pairs == [(2, CAPTIONS[:2]), (6, CAPTIONS[2:])]
    model(torch.randn(8, 4), [*CAPTIONS, "a class more"])
    assert [len(captions) for _, captions in model.pairs[2:]] == [9, 9]


@pytest.mark.parametrize(
    "ascent", ["every(2)", "stale", "adaptive", "split(0.25, random=True)", "split(0.25), every(2)"]
)
def test_steps_that_are_not_alike_cannot_be_captured(ascent: str, tmp_path: Path) -> None:
    params = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match=r"steps that are all alike, ascent='full', 'subset\(0.25\)' or"):
        AMP(params, lr=0.1, fused=True, capturable=True, ascent=ascent)
    with pytest.raises(ValueError, match=r"amp_capture: amp_ascent=.* takes steps of several kinds"):
        AMPTrainingArguments(str(tmp_path), optim="amp", amp_ascent=ascent, amp_capture=True, use_cpu=True)
    AMP(params, lr=0.1, fused=True, capturable=True, ascent=PART)


def test_an_interrupted_step_leaves_no_rest() -> None:
    """A schedule then makes the ball a point, so that there is nothing to ascend for."""
    windows = windows_of(1)
    net, amp = make(PART, None)
    step = LOOPS["passes"](net, amp)
    net.fails_in = 0
    with pytest.raises(KeyboardInterrupt):
        step(windows[0])
    amp.restore()
    amp.param_groups[0]["epsilon"] = 0.0
    net.forwards = 0
    step(windows[1])
    assert net.forwards == 8


def test_upstream_layers_get_the_gradient_of_the_rest() -> None:
    """The module is attached behind a layer that another optimizer trains."""
    torch.manual_seed(0)
    before, model = nn.Linear(4, 3), nn.Linear(3, 2)
    module = LossModule(model, F.cross_entropy)
    attach(AMP(model.parameters(), lr=0.1, ascent=PART, epsilon=1e-9), module)
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    module(before(x), y)["loss"].backward()
    (want,) = torch.autograd.grad(F.cross_entropy(model(before(x[2:])), y[2:]), before.weight)
    torch.testing.assert_close(before.weight.grad, want, rtol=1e-4, atol=1e-6)
