"""Raw accelerate loops: an attached module, `amp_backward` and a closure, against the float64 reference."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from accelerate_cases import (
    BALL,
    CASES,
    CLIP,
    INNER_ITER,
    OVERFLOW_AT,
    SGD_ARGS,
    STEPS,
    WORLD,
    Case,
    groups_of,
    make_net,
)
from launch import run_processes
from problems import InOneSlot, assert_same_parameters, parameters_of, small_batches, small_net
from reference import Tensors, amp_trajectory, l2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from windows import window_trajectory

from amp_plugin import AMP, LossModule, amp_backward, attach

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _accelerate_starts_afresh() -> Iterator[None]:
    """Its state is one for the whole process."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def smooth_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Without BatchNorm, so that a window equals one large batch, and without kinks, where small errors grow."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


class Precision(NamedTuple):
    dtype: torch.dtype = torch.float32
    mixed: str = "no"
    scaler: bool = False
    tolerance: float = 3e-6  # of the update of the weights, relative

    def net(self) -> nn.Module:
        return small_net(self.dtype) if self.mixed == "no" else smooth_net(self.dtype)

    def accelerator(self, **kwargs: Any) -> Accelerator:
        """On the CPU accelerate makes no gradient scaler, and fp16 would be float32."""
        accelerator = Accelerator(cpu=True, mixed_precision=self.mixed, **kwargs)
        accelerator.native_amp = self.mixed != "no"
        if self.scaler:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return accelerator


PRECISIONS = {
    "float64": Precision(torch.float64, tolerance=1e-10),
    "float32": Precision(),
    "bf16": Precision(mixed="bf16", tolerance=2e-2),
    "fp16": Precision(mixed="fp16", scaler=True, tolerance=2e-2),
}


def in_order(batches: Batches) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


def assert_trajectory(seen: list[Tensors], want: list[Tensors], start: Tensors, tolerance: float) -> None:
    """The way from the start, after each step: the distance between the two, in parts of its length."""
    for a, b in zip(seen, want, strict=True):
        distance = l2(a[name].double() - b[name].double() for name in start)
        assert distance < tolerance * l2(b[name].double() - start[name].double() for name in start)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("order", ["before prepare()", "after prepare()", "around the prepared model"])
def test_an_attached_module_in_a_plain_loop(order: str, precision: str, accumulation: int) -> None:
    kind = PRECISIONS[precision]
    net, batches = kind.net(), small_batches(STEPS * accumulation, dtype=kind.dtype)
    start, reference = parameters_of(net), copy.deepcopy(net)
    accelerator = kind.accelerator(gradient_accumulation_steps=accumulation)
    module: nn.Module = LossModule(net, F.cross_entropy)
    optimizer: Any = AMP(net.parameters(), **BALL, **SGD_ARGS)
    if order == "before prepare()":
        attach(optimizer, module)
    if order == "around the prepared model":
        module.model, optimizer, loader = accelerator.prepare(net, optimizer, in_order(batches))
    else:
        module, optimizer, loader = accelerator.prepare(module, optimizer, in_order(batches))
    if order != "before prepare()":
        attach(optimizer, module)
    seen = []
    for batch in loader:
        with accelerator.accumulate(module):
            loss = module(*batch)["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            seen.append(parameters_of(net))
    steps = [[[b] for b in batches[i : i + accumulation]] for i in range(0, len(batches), accumulation)]
    want = window_trajectory(reference, F.cross_entropy, steps, **BALL, **SGD_ARGS, clip_norm=CLIP)
    assert_trajectory(seen, want, start, kind.tolerance)


def loop(
    accelerator: Accelerator, net: nn.Module, batches: Batches, window_size: int, **kwargs: Any
) -> tuple[list[Tensors], list[Tensor]]:
    """Weights and losses after each window, the last of which may be shorter."""
    net, optimizer, loader = accelerator.prepare(net, AMP(net.parameters(), **BALL, **SGD_ARGS), in_order(batches))
    weights, losses, micro_batches = [], [], iter(loader)
    while window := list(itertools.islice(micro_batches, window_size)):
        losses.append(
            amp_backward(
                accelerator, net, optimizer, lambda batch: F.cross_entropy(net(batch[0]), batch[1]), window, **kwargs
            )
        )
        accelerator.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(parameters_of(net))
    return weights, losses


@pytest.mark.parametrize("window_size", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("set_in_accelerate", [1, 4])
def test_amp_backward(precision: str, window_size: int, set_in_accelerate: int) -> None:
    kind = PRECISIONS[precision]
    net = kind.net()
    batches = small_batches(STEPS * window_size + window_size // 2, dtype=kind.dtype)
    start, reference = parameters_of(net), copy.deepcopy(net)
    accelerator = kind.accelerator(gradient_accumulation_steps=set_in_accelerate)
    seen, _ = loop(accelerator, net, batches, window_size)
    steps = [[batches[i : i + window_size]] for i in range(0, len(batches), window_size)]
    want = window_trajectory(reference, F.cross_entropy, steps, **BALL, **SGD_ARGS, clip_norm=CLIP)
    assert_trajectory(seen, want, start, kind.tolerance)


def test_a_window_equals_one_large_batch() -> None:
    net, batches = smooth_net(), small_batches(4 * STEPS, dtype=torch.float64)
    start, large = (
        parameters_of(net),
        [(torch.cat([x for x, _ in w]), torch.cat([y for _, y in w])) for w in zip(*[iter(batches)] * 4, strict=True)],
    )
    want = amp_trajectory(net, F.cross_entropy, large, **BALL, **SGD_ARGS, clip_norm=CLIP)
    seen, losses = loop(Accelerator(cpu=True), net, batches, 4)
    assert_trajectory(seen, [step.params for step in want], start, 1e-10)
    assert [loss.item() for loss in losses] == pytest.approx([step.loss for step in want], rel=1e-10)
    assert not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize(("policy", "updates"), [("clean", 6), ("all", 6 * 3)])
def test_running_statistics_follow_the_policy(policy: Any, updates: int) -> None:
    net = small_net()
    loop(Accelerator(cpu=True), net, small_batches(6), 2, batch_norm=policy)
    assert net[1].num_batches_tracked == updates


@pytest.mark.parametrize("rng", ["same", "fresh"])
def test_dropout_masks_follow_the_policy(rng: Any) -> None:
    """In a vanishing ball, the same masks in all passes make it SGD with accumulation."""
    nets, batches = [small_net(dropout=0.5) for _ in range(2)], small_batches(6)
    accelerator = Accelerator(cpu=True)
    amp, sgd = AMP(nets[0].parameters(), 0.1, epsilon=1e-30), torch.optim.SGD(nets[1].parameters(), 0.1)
    torch.manual_seed(3)
    for window in (batches[:3], batches[3:]):
        amp_backward(accelerator, nets[0], amp, lambda b: F.cross_entropy(nets[0](b[0]), b[1]), window, rng=rng)
        amp.step()
    torch.manual_seed(3)
    for window in (batches[:3], batches[3:]):
        for x, y in window:
            (F.cross_entropy(nets[1](x), y) * (1 / 3)).backward()
        sgd.step()
        sgd.zero_grad()
    same = [torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True)]
    assert all(same) == (rng == "same")


def test_without_perturbation_it_is_a_plain_backward_pass() -> None:
    net, batches, calls = small_net(), small_batches(3), []
    accelerator, other = Accelerator(cpu=True), copy.deepcopy(net)
    amp = AMP(net.parameters(), 0.1, epsilon=0.0)
    losses = [F.cross_entropy(other(x), y) for x, y in batches]
    torch.stack(losses).mean().backward()

    def compute_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(batch)
        return F.cross_entropy(net(batch[0]), batch[1])

    loss = amp_backward(accelerator, net, amp, compute_loss, batches)
    assert len(calls) == 3
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_gradients_are_those_of_the_last_pass_alone() -> None:
    """Not those from before; and those of parameters that belong to another optimizer are of that pass too."""
    (ours, theirs), (x, y) = [small_net(torch.float64) for _ in range(2)], small_batches(1, dtype=torch.float64)[0]
    amp, by_hand = (AMP(net[0].parameters(), 0.1, 0.1, inner_iter=2) for net in (ours, theirs))
    for p in ours.parameters():
        p.grad = torch.randn_like(p)
    amp_backward(Accelerator(cpu=True), ours, amp, lambda batch: F.cross_entropy(ours(batch[0]), batch[1]), [(x, y)])
    for _ in range(2):
        F.cross_entropy(theirs(x), y).backward()
        by_hand.ascend()
        theirs.zero_grad()
    F.cross_entropy(theirs(x), y).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_a_batch_that_the_loss_takes_to_pieces() -> None:
    net, (x, y) = small_net(), small_batches(1)[0]
    amp = AMP(net.parameters(), 0.1, inner_iter=2)

    def compute_loss(batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(net(**batch), labels)

    amp_backward(Accelerator(cpu=True), net, amp, compute_loss, [{"input": x, "labels": y}])
    amp.step()


def test_a_batch_that_the_loss_changes_is_an_error() -> None:
    net, (x, y) = small_net(), small_batches(1)[0]
    amp, before = AMP(net.parameters(), 0.1), parameters_of(net)
    with pytest.raises(RuntimeError, match="changes its batch in place"):
        amp_backward(Accelerator(cpu=True), net, amp, lambda b: F.cross_entropy(net(b[0].mul_(2)), b[1]), [(x, y)])
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert not amp.gradients()


@pytest.mark.parametrize("failing_call", range(6))
def test_a_failure_in_any_pass_leaves_the_weights_clean_and_no_gradient(failing_call: int) -> None:
    net, batches, calls = small_net(), small_batches(2), itertools.count()
    amp, before = AMP(net.parameters(), 0.1, inner_iter=2), copy.deepcopy(net.state_dict())

    def compute_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(calls) == failing_call:
            raise MemoryError
        return F.cross_entropy(net(batch[0]), batch[1])

    with pytest.raises(MemoryError):
        amp_backward(Accelerator(cpu=True), net, amp, compute_loss, batches)
    assert_same_parameters(net, _loaded(before))
    assert not amp.perturbed
    assert not amp.gradients()
    with pytest.raises(RuntimeError, match="without the perturbation"):
        amp.step()


def _loaded(state: dict[str, Tensor]) -> nn.Module:
    net = small_net()
    net.load_state_dict(state)
    return net


def test_what_amp_backward_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = small_net(), small_batches(2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    amp = AMP(net.parameters(), 0.1)

    def call(optimizer: torch.optim.Optimizer = amp, batches: Batches = batches) -> None:
        amp_backward(accelerator, net, optimizer, lambda b: F.cross_entropy(net(b[0]), b[1]), batches)

    with pytest.raises(TypeError, match=r"needs amp_plugin.AMP, got SGD"):
        call(torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(ValueError, match="at least one micro-batch"):
        call(batches=[])
    with accelerator.accumulate(net), pytest.raises(RuntimeError, match=r"outside accelerator.accumulate\(\)"):
        call()
    for host, instead in (
        (DistributedType.DEEPSPEED, "DEEPSPEED; use DDP or FSDP2"),
        (DistributedType.FSDP, "FSDP1; use FSDP2 .* or DDP"),
        (DistributedType.XLA, "XLA; use DDP or FSDP2"),
        (DistributedType.MEGATRON_LM, "MEGATRON_LM; use DDP or FSDP2"),
    ):
        with monkeypatch.context() as patch, accelerator.accumulate(net):
            patch.setattr(Accelerator, "distributed_type", host)
            patch.setattr(Accelerator, "sync_gradients", True)
            with pytest.raises(ValueError, match=f"does not work exactly with {instead}"):
                call()
    accelerator.sync_gradients = True
    attach(amp, LossModule(net, F.cross_entropy))
    with pytest.raises(RuntimeError, match="attached to a module"):
        call()


# --- a closure, through accelerate's wrapper of the optimizer


def closure_of(accelerator: Accelerator, net: nn.Module, optimizer: Any, batch: Any) -> Callable[[], None]:
    def closure() -> None:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(net(batch[0]), batch[1]))

    return closure


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_closure_without_accumulation(accumulate: bool) -> None:
    net, batches = small_net(torch.float64), small_batches(STEPS, dtype=torch.float64)
    start, accelerator = parameters_of(net), Accelerator(cpu=True)
    want = [step.params for step in amp_trajectory(net, F.cross_entropy, batches, **BALL, **SGD_ARGS, batch_norm="all")]
    net, optimizer, loader = accelerator.prepare(net, AMP(net.parameters(), **BALL, **SGD_ARGS), in_order(batches))
    seen = []
    for batch in loader:
        with accelerator.accumulate(net) if accumulate else nullcontext():
            optimizer.step(closure_of(accelerator, net, optimizer, batch))
        seen.append(parameters_of(net))
    assert_trajectory(seen, want, start, 1e-10)


@pytest.mark.parametrize("base", [AMP, torch.optim.SGD])
def test_a_closure_that_accelerate_would_drop_is_an_error_if_it_is_amps(base: Any) -> None:
    net, batches = small_net(), small_batches(2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, optimizer = accelerator.prepare(net, base(net.parameters(), lr=0.1))
    with accelerator.accumulate(net):
        if base is AMP:
            with pytest.raises(RuntimeError, match="drops the others; use amp_plugin"):
                optimizer.step(closure_of(accelerator, net, optimizer, batches[0]))
        else:
            optimizer.step(closure_of(accelerator, net, optimizer, batches[0]))
        optimizer.step()  # nothing, as ever


def test_a_closure_with_a_gradient_scaler_is_refused() -> None:
    net, batch = small_net(), small_batches(1)[0]
    accelerator, before = PRECISIONS["fp16"].accelerator(), parameters_of(net)
    net, optimizer = accelerator.prepare(net, AMP(net.parameters(), 0.1))
    closure = closure_of(accelerator, net, optimizer, batch)
    closure()
    with pytest.raises(RuntimeError, match=r"gradient scaler cannot drive step\(closure\)"):
        optimizer.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


# --- two processes


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, dict[str, Any], dict[str, Any]]]:
    """The cases, and what both processes saw."""
    folder = tmp_path_factory.mktemp("accelerate")
    run_processes(WORLD, "accelerate_cases.py", folder)
    return list(zip(CASES, *(torch.load(folder / f"{r}.pt", weights_only=True) for r in range(WORLD)), strict=True))


def expected(case: Case) -> list[Tensors]:
    """The reference's weights after each step; one with an overflow is skipped."""
    overflows = case.bad_pass >= 0
    steps = [groups_of(case, step) for step in range(STEPS) if not (overflows and step == OVERFLOW_AT)]
    clip = None if case.scaled else CLIP
    weights = window_trajectory(make_net(), F.cross_entropy, steps, **BALL, **SGD_ARGS, clip_norm=clip)
    return [*weights[:OVERFLOW_AT], *weights[OVERFLOW_AT - 1 :]] if overflows else weights


def test_replicas_are_the_same_to_the_bit_and_equal_the_reference(facts: Any) -> None:
    for case, first, second in facts:
        for a, b in zip(first["weights"], second["weights"], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a), case
        assert_trajectory(first["weights"], expected(case), parameters_of(make_net()), 1e-10)


def test_each_process_gets_the_clean_loss_of_its_own_micro_batches(facts: Any) -> None:
    for case, *of_ranks in facts:
        if case.door != "amp_backward" or case.bad_pass >= 0:
            continue
        net, points = make_net(), expected(case)
        for step in range(1, STEPS):
            net.load_state_dict(points[step - 1])
            batches = [batch for group in groups_of(case, step) for batch in group]
            for rank, seen in enumerate(of_ranks):
                own = batches[rank * case.micro_batches : (rank + 1) * case.micro_batches]
                mean = sum(F.cross_entropy(net(x), y).item() for x, y in own) / len(own)
                assert seen["losses"][step] == pytest.approx(mean, rel=1e-10)


def test_gradients_are_averaged_over_processes_once_in_a_pass_over_the_window(facts: Any) -> None:
    """Without sync_ascent, and by DDP's own means for an attached module, in the descent alone."""
    for case, *of_ranks in facts:
        passes = INNER_ITER + 1 if case.door == "amp_backward" and case.sync else 1
        for seen in of_ranks:
            assert seen["reductions"] == [passes] * STEPS, case


def test_an_overflow_in_one_process_halves_the_scale_of_all_once_and_accelerate_knows(facts: Any) -> None:
    for case, *of_ranks in facts:
        if not case.scaled:
            continue
        for seen in of_ranks:
            assert seen["scales"] == [1024.0] * OVERFLOW_AT + [512.0] * (STEPS - OVERFLOW_AT), case
            assert seen["skipped"] == [step == OVERFLOW_AT for step in range(STEPS)], case


def test_losses_of_a_window_may_come_in_the_same_memory() -> None:
    slot, means = torch.zeros(()), []
    for reuses in (False, True):
        accelerator, net = Accelerator(cpu=True), small_net()
        model, optimizer = accelerator.prepare(net, AMP(net.parameters(), 0.1))

        def loss(batch: Any, model: Any = model, reuses: bool = reuses) -> Tensor:
            value = F.cross_entropy(model(batch[0]), batch[1])
            return InOneSlot.apply(value, slot) if reuses else value  # type: ignore[no-any-return]

        means.append(amp_backward(accelerator, model, optimizer, loss, small_batches(3)))
    assert torch.equal(*means)
