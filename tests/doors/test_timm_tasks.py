"""timm's training tasks with AMP in the way of its train.py, where nothing names AMP but the optimizer's name."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import by_closure, plain_loop
from launch import run_processes
from problems import assert_same_parameters, parameters_of, small_batches, small_net
from reference import Tensors
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm_cases import (
    BALL,
    CLIP,
    EMA_DECAY,
    OF_TWO_PROCESSES,
    OVERFLOW_AT,
    SCALE,
    SGD_ARGS,
    STEPS,
    TASK_WEIGHT,
    TEMPERATURE,
    WEIGHT_DECAY,
    Case,
    Criterion,
    Facts,
    Training,
    groups_of,
    student,
    teacher,
    windows_of,
)
from timm_reference import assert_trajectory, averages, clipped_and_decayed, smoothed_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from windows import window_trajectory

from amp_plugin import AMP, detach

# --- the weights are the reference's


def distillation_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of targets that are the class number and, behind it, the teacher's logits."""
    labels, logits = targets[:, 0].long(), targets[:, 1:]
    student, teacher = ((z / TEMPERATURE).log_softmax(-1) for z in (outputs, logits))
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean() * TEMPERATURE**2
    return TASK_WEIGHT * smoothed_cross_entropy(outputs, labels) + (1 - TASK_WEIGHT) * divergence


def with_teacher(case: Case, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The student's images and the teacher's differ in their statistics."""
    statistics = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std, its_mean, its_std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in statistics)
    with torch.no_grad():
        logits = teacher(case).double()((batch[0].double() * std + mean - its_mean) / its_std)
    return batch[0], torch.cat([batch[1].double()[:, None], logits], 1)


@functools.cache
def expected(case: Case) -> list[Tensors]:
    """The reference's weights after each step; one with an overflow is skipped."""
    steps, loss = groups_of(case), smoothed_cross_entropy
    if case.kind == "distillation":
        steps, loss = [[[with_teacher(case, b) for b in g] for g in groups] for groups in steps], distillation_loss
    if case.bad_pass >= 0:
        del steps[OVERFLOW_AT]
    weights = window_trajectory(
        student(case),
        loss,
        steps,
        nesterov=True,
        clip_norm=CLIP["norm"] if case.clip == "norm" else None,
        transform=clipped_and_decayed(case.clip, CLIP.get(case.clip or "", 0.0), WEIGHT_DECAY),
        **BALL,
        **SGD_ARGS,
    )
    return weights if case.bad_pass < 0 else [*weights[:OVERFLOW_AT], *weights[OVERFLOW_AT - 1 :]]


def assert_reference(case: Case, facts: Facts, tolerance: float) -> None:
    want, start = expected(case), parameters_of(student(case))
    assert_trajectory(facts["weights"], want, start, tolerance)
    assert_trajectory(facts["ema"], averages(start, want, EMA_DECAY), start, tolerance / (1 - EMA_DECAY))
    after = SCALE if case.bad_pass < 0 else SCALE / 2
    assert facts["scales"] == (
        [SCALE] * OVERFLOW_AT + [after] * (STEPS - OVERFLOW_AT) if case.scaled else [None] * STEPS
    )


FLOAT32: dict[str, Any] = {"dtype": torch.float32}
CASES: dict[str, tuple[Case, float]] = {
    "float64": (Case(), 1e-10),
    "float32": (Case(**FLOAT32), 1e-6),
    "bf16": (Case(**FLOAT32, autocast=torch.bfloat16), 2e-2),
    "bf16, accumulation": (Case(**FLOAT32, autocast=torch.bfloat16, accumulation=3), 2e-2),
    "fp16": (Case(**FLOAT32, autocast=torch.float16, scaled=True, clip="norm"), 2e-2),
    "scaled": (Case(scaled=True), 1e-10),
    "scaled, accumulation, clip agc": (Case(scaled=True, accumulation=3, clip="agc"), 1e-10),
    **{f"overflow in pass {i}": (Case(scaled=True, clip="norm", bad_pass=i), 1e-10) for i in range(3)},
    "overflow in an accumulation": (Case(scaled=True, accumulation=3, bad_pass=0), 1e-10),
    **{f"accumulation of {k}": (Case(accumulation=k), 1e-10) for k in (2, 4)},
    **{f"clip {mode}": (Case(clip=mode), 1e-10) for mode in ("norm", "value", "agc")},  # type: ignore[arg-type]
    "mixup": (Case(mixup=True, accumulation=2), 1e-10),
    "distillation": (Case("distillation"), 1e-10),
    "distillation, accumulation, clip norm": (Case("distillation", accumulation=3, clip="norm"), 1e-10),
    **{f"compiled by {b}": (Case(backend=b, accumulation=2), 1e-10) for b in ("eager", "aot_eager", "inductor")},
    "distillation, compiled": (Case("distillation", backend="aot_eager"), 1e-10),
}
BOTH_ORDERS = ("float64", "distillation")


@pytest.mark.parametrize(
    ("name", "optimizer_first"),
    [
        *(pytest.param(name, False, marks=[pytest.mark.slow] * ("inductor" in name)) for name in CASES),
        *((name, True) for name in BOTH_ORDERS),
    ],
)
def test_the_weights_and_their_average_are_the_references(name: str, optimizer_first: bool) -> None:
    case, tolerance = CASES[name]
    training = Training(case, optimizer_first=optimizer_first)
    assert_reference(case, training.train(windows_of(case, 0)), tolerance)


def test_running_statistics_are_those_of_the_passes_at_the_unperturbed_weights() -> None:
    model, batches = small_net(torch.float64), small_batches(STEPS, dtype=torch.float64)
    replica = copy.deepcopy(model)
    weights = window_trajectory(model, F.cross_entropy, [[[b]] for b in batches], lr=0.1, **BALL)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    step = plain_loop(task, create_optimizer_v2(model, "amp", lr=0.1, momentum=0.0, nesterov=False, **BALL))
    for batch, theta in zip(batches, weights, strict=True):
        step(batch)
        replica(batch[0])
        for (name, seen), want in zip(model.named_buffers(), replica.buffers(), strict=True):
            torch.testing.assert_close(seen, want, rtol=1e-10, atol=1e-12, msg=name)
        replica.load_state_dict(theta, strict=False)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Facts]]:
    """What each process saw, for each case."""
    folder = tmp_path_factory.mktemp("timm")
    run_processes(2, "timm_cases.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", OF_TWO_PROCESSES)
def test_replicas_are_the_same_to_the_bit_and_equal_the_reference(name: str, of_two_processes: Any) -> None:
    first, second = (facts[name] for facts in of_two_processes)
    assert_reference(OF_TWO_PROCESSES[name], first, 1e-10)
    for key in ("weights", "ema"):
        for a, b in zip(first[key], second[key], strict=True):
            assert all(torch.equal(a[p], b[p]) for p in a)
    assert first["scales"] == second["scales"]


@pytest.mark.parametrize("opt", ["amp", "ampadamw", "lookahead_amp"])
@pytest.mark.parametrize("kind", ["classification", "distillation"])
def test_a_run_continued_from_a_checkpoint_is_the_uninterrupted_one_to_the_bit(
    opt: str, kind: Any, tmp_path: Path
) -> None:
    case = Case(kind, **FLOAT32, scaled=True, accumulation=2)
    windows = 2 * windows_of(case, 0)  # timm's Lookahead first looks back after twelve steps
    uninterrupted = Training(case, opt).train(windows)
    first = Training(case, opt)
    first.train(windows[:13])
    first.saver(tmp_path).save_checkpoint(epoch=0)
    second, last = Training(case, opt), str(tmp_path / "last.pth.tar")
    assert resume_task_checkpoint(second.task, last, second.optimizer, second.scaler, log_info=False) == 1
    load_task_ema_checkpoint(second.task, last)
    for name, seen in second.train(windows[13:]).items():
        for a, b in zip(seen, uninterrupted[name][13:], strict=True):
            assert a == b if name == "scales" else all(torch.equal(a[p], b[p]) for p in b)


# --- which task, which optimizer, and when


@pytest.mark.parametrize("opt", ["amp", "ampadamw"])
def test_a_closure_keeps_its_task_for_itself_and_gives_the_same_weights_to_the_bit(opt: str) -> None:
    """With dropout and stochastic depth, which draw the same random numbers in all passes of a step."""
    case, kwargs = Case(), {"depth": 2, "drop_rate": 0.2, "drop_path_rate": 0.5}
    plain, closure = (Training(case, opt, **kwargs) for _ in range(2))
    step = by_closure(closure.task, closure.optimizer)
    torch.manual_seed(1)
    for window in windows_of(case, 0):
        step(window[0])
    assert not closure.optimizer.attached
    torch.manual_seed(1)
    plain.train(windows_of(case, 0))
    assert plain.optimizer.attached
    assert_same_parameters(plain.task.trainable_module, closure.task.trainable_module)
    assert plain.criterion.calls == closure.criterion.calls == STEPS * (BALL["inner_iter"] + 1)


def test_two_passes_of_ones_own_need_the_task_detached_first() -> None:
    training, (batch,) = Training(Case()), windows_of(Case(), 0)[0]
    training.task(*batch)["loss"].backward()
    with pytest.raises(RuntimeError, match="detach it first"):
        training.optimizer.ascend()
    detach(training.task)
    training.optimizer.zero_grad()
    for _ in range(BALL["inner_iter"]):
        training.task(*batch)["loss"].backward()
        training.optimizer.ascend()
    training.task(*batch)["loss"].backward()
    training.optimizer.step()
    assert not training.optimizer.attached
    assert_trajectory([training.weights()], expected(Case())[:1], parameters_of(student(Case())), 1e-10)


def test_a_task_that_no_amp_optimizer_trains_is_left_alone() -> None:
    case, other = Case(clip="norm"), AMP(small_net().parameters(), 0.1)
    training, model = Training(case, "sgd"), student(case)
    training.train(windows_of(case, 0))
    assert training.criterion.calls == STEPS
    assert not other.attached
    sgd = create_optimizer_v2(model, "sgd", weight_decay=WEIGHT_DECAY, **SGD_ARGS)
    for ((x, y),) in windows_of(case, 0):
        smoothed_cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP["norm"])
        sgd.step()
        sgd.zero_grad()
    assert_trajectory([training.weights()], [parameters_of(model)], parameters_of(student(case)), 1e-12)


def test_an_optimizer_with_parameters_outside_the_task_is_refused_when_it_steps() -> None:
    model, outside = small_net(), nn.Linear(2, 2)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2([*model.parameters(), *outside.parameters()], "amp", lr=0.1)
    task(*small_batches(1)[0])["loss"].backward()
    assert not optimizer.attached
    with pytest.raises(RuntimeError, match="would train without the perturbation"):
        optimizer.step()


def test_of_two_optimizers_with_the_same_parameters_none_is_guessed() -> None:
    training, (batch,) = Training(Case()), windows_of(Case(), 0)[0]
    other = create_optimizer_v2(training.task.get_trainable_module(), "amp", lr=0.1)
    with pytest.raises(RuntimeError, match="2 AMP optimizers hold parameters of this ClassificationTask"):
        training.task(*batch)
    assert not any(optimizer.attached for optimizer in (other, training.optimizer))
    del other
    gc.collect()
    training.train(windows_of(Case(), 0))
    assert_reference(Case(), training.facts, 1e-10)


def test_two_tasks_with_an_optimizer_each_train_in_turn() -> None:
    cases = Case(), Case("distillation", accumulation=2)
    trainings = [Training(case) for case in cases]
    for windows in zip(*(windows_of(case, 0) for case in cases), strict=True):
        for training, window in zip(trainings, windows, strict=True):
            training.step(window)
    for training in trainings:
        assert_reference(training.case, training.facts, 1e-10)


@pytest.mark.parametrize("attached", [False, True])
def test_copies_and_averages_are_not_attached(attached: bool) -> None:
    training, windows = Training(Case()), windows_of(Case(), 0)
    if attached:
        training.step(windows[0])
    copied, average = copy.deepcopy(training.task), training.task.get_trainable_module(ema=True).module
    criteria = [copied.criterion, Criterion(nn.CrossEntropyLoss())]
    calls = [criterion.calls for criterion in criteria]
    losses = [copied(*windows[1][0])["loss"], criteria[1](average.train()(windows[1][0][0]), windows[1][0][1])]
    for loss in losses:
        loss.backward()
    assert [criterion.calls for criterion in criteria] == [n + 1 for n in calls]
    assert training.optimizer.attached == attached
    training.train(windows[attached:])
    assert_reference(Case(), training.facts, 1e-10)


def test_a_copy_with_an_optimizer_of_its_own_attaches_itself() -> None:
    task = copy.deepcopy(Training(Case()).task)
    optimizer = create_optimizer_v2(task.trainable_module, "amp", weight_decay=WEIGHT_DECAY, **SGD_ARGS, **BALL)
    plain_loop(task, optimizer)(windows_of(Case(), 0)[0][0])
    assert optimizer.attached
    assert_trajectory(
        [parameters_of(task.trainable_module)], expected(Case())[:1], parameters_of(student(Case())), 1e-10
    )


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("off", ["eval", "no_grad"])
def test_a_pass_that_does_not_train_is_not_perturbed(off: str, attached: bool) -> None:
    training, windows = Training(Case()), windows_of(Case(), 0)
    if attached:
        training.step(windows[0])
    calls, ((x, y),) = training.criterion.calls, windows[1]
    training.task.train(off != "eval")
    with torch.set_grad_enabled(off != "no_grad"):
        loss = training.task(x, y)["loss"]
        want = training.criterion.criterion(training.task.trainable_module(x), y)
    training.task.train()
    assert torch.equal(loss, want)
    assert training.criterion.calls == calls + 1
    assert training.optimizer.attached == attached
    training.train(windows[attached:])
    assert_reference(Case(), training.facts, 1e-10)


def test_where_no_amp_optimizer_lives_a_task_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def parameters(*args: Any) -> Any:
        raise AssertionError("the parameters were looked at")

    monkeypatch.setattr("amp_plugin.doors.timm_tasks._instances", weakref.WeakSet())
    training, (batch,) = Training(Case(), "sgd"), windows_of(Case(), 0)[0]
    monkeypatch.setattr(training.task, "parameters", parameters)
    monkeypatch.setattr(training.task, "modules", parameters)
    training.task(*batch)["loss"].backward()
    assert training.criterion.calls == 1


def test_the_user_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Training(Case(backend="eager")).train(windows_of(Case(), 0)[:3])
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("amp_plugin")]
    assert len(messages) == 1
    assert "Adversarial Model Perturbation is attached to ClassificationTask" in messages[0]
