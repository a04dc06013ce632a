"""Test the baselines that AMP is compared with, each against a few lines written from its paper."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_processes
from main_job import QUICK
from method_problem import (
    BATCH,
    CLASSES,
    DECAY,
    EPOCHS,
    IN_PROCESSES,
    LR,
    MEAN,
    SAMPLES,
    SETTINGS,
    STD,
    Batch,
    InOrder,
    Net,
    arguments,
    images,
    in_double,
    trained,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from amp_plugin.data.loader import ImageBatches
from amp_plugin.train import job, options
from amp_plugin.train.card import differences
from amp_plugin.train.methods.mixup import MixedBatches
from amp_plugin.train.settings import settings_of
from amp_plugin.train.tasks import make_task
from amp_plugin.trainer.described import optimizer_in_words


def batches(data: ImageBatches | None = None) -> Iterator[Batch]:
    data = data or images()
    for epoch in range(EPOCHS):
        data.set_epoch(epoch)
        for start in range(0, SAMPLES, BATCH):
            yield in_double(data.__getitems__(range(start, start + BATCH)))


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Move = Callable[[list[Tensor]], list[Tensor]]
Step = Callable[[nn.Module, Tensor, Tensor], Any]  # it leaves the gradient that the optimizer takes


def reference(step: Step, model: Net | None = None, data: ImageBatches | None = None) -> Net:
    model = model or Net()
    sgd = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=DECAY)
    for batch in batches(data):
        sgd.zero_grad()
        step(model, batch["pixel_values"], batch["labels"])
        sgd.step()
    return model


def logits_of(model: Any, x: Tensor) -> Tensor:
    return model(x)["logits"]


def cross_entropy(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(model, x), y)


def assert_same_weights(ours: Any, theirs: Any, **tolerance: float) -> None:
    """Assert that weights and running statistics are equal."""
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    assert ours is not theirs
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def in_windows(accumulation: int) -> dict[str, int]:
    """Return the arguments of a training whose windows are whole batches."""
    return {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}


def moved_far(model: Any, step: Step) -> bool:
    """Tell whether another step gives other weights."""
    other = reference(step)
    return any((p - q).abs().max() > 1e-4 for p, q in zip(model.parameters(), other.parameters(), strict=True))


@contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """Put BatchNorm's running statistics back afterwards."""
    buffers = [b.clone() for b in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    cross_entropy(model, x, y).backward()


# --- losses


def label_smoothed(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(logits_of(model, x), y, label_smoothing=0.2).backward()


def flooded(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = cross_entropy(model, x, y)
    ((loss - 1.3).abs() + 1.3).backward()


def attacked(model: nn.Module, x: Tensor, y: Tensor) -> None:
    pixels = (x * STD + MEAN).requires_grad_()
    with untraced(model):
        cross_entropy(model, (pixels - MEAN) / STD, y).backward()
    assert pixels.grad is not None
    worst = (pixels.detach() + 0.1 * pixels.grad.sign()).clamp(0, 1)
    model.zero_grad()
    cross_entropy(model, (worst - MEAN) / STD, y).backward()


LOSSES: dict[str, tuple[dict[str, Any], Step]] = {
    "label smoothing": ({"label_smoothing_factor": 0.2}, label_smoothed),
    "flooding": ({"flood_level": 1.3}, flooded),
    "adversarial training": ({"adversarial_epsilon": 0.1}, attacked),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", LOSSES)
def test_the_trajectory_of_another_loss(tmp_path: Path, method: str, accumulation: int) -> None:
    chosen, step = LOSSES[method]
    ours = trained(tmp_path, **in_windows(accumulation), **chosen).model
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if method == "label smoothing" else {}  # transformers sums in float32
    assert_same_weights(ours, reference(step), **tolerance)
    assert moved_far(ours, plain)


# --- mixup


def mixed_images() -> ImageBatches:
    return images(lambda *args, **kwargs: MixedBatches(*args, alpha=0.8, classes=CLASSES, **kwargs))


def test_mixup_is_the_cross_entropy_of_both_labels_in_proportion(tmp_path: Path) -> None:
    """Recover the proportion from the mixed labels, mix the images by hand, and weigh the losses of hard labels."""
    unmixed = batches()

    def mixed(model: nn.Module, x: Tensor, shares: Tensor) -> None:
        batch = next(unmixed)
        y, other = batch["labels"], batch["labels"].roll(1)
        k = int((y != other).nonzero()[0])
        lam = shares[k, y[k]]
        x = lam * batch["pixel_values"] + (1 - lam) * batch["pixel_values"].roll(1, 0)
        (lam * cross_entropy(model, x, y) + (1 - lam) * cross_entropy(model, x, other)).backward()

    data = mixed_images()
    ours = trained(tmp_path, data=data, mixup_alpha=0.8).model
    assert_same_weights(ours, reference(mixed, data=mixed_images()), rtol=1e-5, atol=1e-6)  # images are in float32
    assert moved_far(ours, plain)


# --- optimizers


def displaced(model: nn.Module, x: Tensor, y: Tensor, move: Move, loss_of: Loss = cross_entropy) -> None:
    """Leave the gradient at theta + move(gradient at theta)."""
    params = list(model.parameters())
    theta = [p.detach().clone() for p in params]
    gradients = torch.autograd.grad(loss_of(model, x, y), params)
    with torch.no_grad():
        for p, d in zip(params, move(list(gradients)), strict=True):
            p += d
    with untraced(model):
        loss_of(model, x, y).backward()
    with torch.no_grad():
        for p, old in zip(params, theta, strict=True):
            p.copy_(old)


def sam(model: nn.Module, x: Tensor, y: Tensor) -> None:
    displaced(model, x, y, lambda grads: [0.3 * g / torch.cat([g.flatten() for g in grads]).norm() for g in grads])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trajectory_of_sam(tmp_path: Path, accumulation: int) -> None:
    trainer = trained(tmp_path, optim="sam", sam_rho=0.3, **in_windows(accumulation))
    assert_same_weights(trainer.model, reference(sam))
    record = trainer.state.log_history[0]
    assert record["perturbation_norm"] == pytest.approx(0.3)
    assert record["sharpness"] == pytest.approx(record["perturbed_loss"] - record["loss"])
    trainer.create_model_card()  # a push in the middle of the training does so
    assert "with SAM around SGD, without AMP." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trajectory_of_asam(tmp_path: Path, accumulation: int) -> None:
    """Compare with pytorch_optimizer's ASAM."""
    theirs = pytest.importorskip("pytorch_optimizer")
    ours = trained(tmp_path, optim="asam", **in_windows(accumulation)).model
    model = Net()
    sgd = {"lr": LR, "momentum": 0.9, "nesterov": True, "weight_decay": DECAY}
    optimizer = theirs.SAM(model.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, **sgd)
    for batch in batches():

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model, batch["pixel_values"], batch["labels"])
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    assert_same_weights(ours, model, rtol=1e-5, atol=1e-7)  # pytorch_optimizer keeps the norm in float32
    assert moved_far(ours, sam)


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trajectory_of_random_model_perturbation(tmp_path: Path, accumulation: int, norm: str) -> None:
    ours = trained(tmp_path, optim="rmp", rmp_epsilon=0.3, amp_norm=norm, seed=7, **in_windows(accumulation)).model
    steps = iter(range(EPOCHS * SAMPLES // BATCH))

    def perturbed(model: nn.Module, x: Tensor, y: Tensor) -> None:
        seed = np.random.SeedSequence([7, next(steps)]).generate_state(1, np.uint64)
        noise = torch.Generator().manual_seed(int(seed[0]))

        def move(grads: list[Tensor]) -> list[Tensor]:
            drawn = [torch.randn(g.shape, generator=noise, dtype=g.dtype) for g in grads]
            norms = [d.norm() for d in drawn]
            if norm == "global":
                norms = [torch.stack(norms).norm()] * len(norms)
            return [0.3 * d / n for d, n in zip(drawn, norms, strict=True)]

        displaced(model, x, y, move)

    # The Trainer lists the parameters with weight decay first; here they all have it, in the model's order.
    assert_same_weights(ours, reference(perturbed))
    assert moved_far(ours, plain)


# --- what they leave alone


@pytest.mark.parametrize(
    ("chosen", "step"),
    [({"adversarial_epsilon": 0.1}, attacked), ({"optim": "sam", "sam_rho": 0.3}, sam)],
    ids=["adversarial training", "sam"],
)
def test_running_statistics_are_those_of_the_pass_that_counts(
    tmp_path: Path, chosen: dict[str, Any], step: Step
) -> None:
    """The attack leaves no statistics; SAM leaves those of the clean weights."""
    ours = trained(tmp_path, Net(batch_norm=True), **chosen).model
    assert_same_weights(ours, reference(step, Net(batch_norm=True)))


def test_the_attack_sees_the_dropout_masks_of_the_pass_that_trains(tmp_path: Path) -> None:
    masks: list[Tensor] = []

    class Recorded(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            dropped = super().forward(x)
            masks.append(dropped != 0)
            return dropped

    model = Net()
    model.layers[4] = Recorded(0.5)
    trained(tmp_path, model, adversarial_epsilon=0.1, max_steps=2)
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_no_method_touches_an_evaluation(tmp_path: Path) -> None:
    """A smoothed, mixed or attacked loss would be larger."""
    methods = {"label_smoothing_factor": 0.2, "mixup_alpha": 0.8, "adversarial_epsilon": 0.1, "flood_level": 9.0}
    trainer = trained(tmp_path, data=mixed_images(), max_steps=1, **methods)
    batch = in_double(images().__getitems__(range(SAMPLES)))
    with torch.no_grad():
        loss = cross_entropy(trainer.model, batch["pixel_values"], batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_an_interrupted_window_leaves_the_weights_where_they_were(tmp_path: Path) -> None:
    class Interrupted(InOrder):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                seen.append(torch.equal(next(model.parameters()), before[-1]))
                if len(seen) == 2:
                    raise KeyboardInterrupt
            return super().compute_loss(model, *args, **kwargs)

    class Remember(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            before.append(next(model.parameters()).detach().clone())

    seen: list[bool] = []
    before: list[Tensor] = []
    args = arguments(tmp_path, optim="rmp", gradient_accumulation_steps=2)
    trainer = Interrupted(Net(), args, in_double, images(), callbacks=[Remember()])  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [False, False], "both micro-batches see the perturbed weights"
    assert torch.equal(next(trainer.model.parameters()), before[0])  # type: ignore[union-attr]


# --- with AMP, and on several workers


def test_amp_perturbs_for_the_flooded_loss(tmp_path: Path) -> None:
    """AMP goes downhill where the loss is below the level, in both passes."""
    level, signs = 1.3, set()

    def flooded_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model, x, y)
        signs.add(bool(loss > level))
        return (loss - level).abs() + level

    def amp(model: nn.Module, x: Tensor, y: Tensor) -> None:
        displaced(model, x, y, lambda gradients: [0.1 * g for g in gradients], flooded_loss)

    ours = trained(tmp_path, optim="amp", amp_epsilon=9.0, amp_inner_lr=0.1, flood_level=level).model
    assert_same_weights(ours, reference(amp))
    assert signs == {True, False}


def test_mixed_batches_are_a_function_of_seed_epoch_and_indices() -> None:
    before = torch.get_rng_state()
    data, again = mixed_images(), mixed_images()
    data.set_epoch(1)
    data.__getitems__([5, 6])  # what was asked for before makes no difference
    first = data.__getitems__(range(4))
    assert torch.equal(torch.get_rng_state(), before)
    again.set_epoch(1)
    np.random.seed(9)
    loaded = DataLoader(again, batch_size=4, collate_fn=lambda batch: batch, num_workers=1)
    for name, value in next(iter(loaded)).items():
        assert torch.equal(value, first[name])
    data.set_epoch(2)
    assert not torch.equal(data.__getitems__(range(4))["labels"], first["labels"])
    data.set_epoch(1)
    assert not torch.equal(data.__getitems__([0, 1, 2, 5])["labels"][1:3], first["labels"][1:3])
    other = MixedBatches(data.split, SETTINGS, seed=4, alpha=0.8, classes=CLASSES)
    other.set_epoch(1)
    assert not torch.equal(other.__getitems__(range(4))["labels"], first["labels"])
    assert first["labels"].sum(dim=1) == pytest.approx(np.ones(4))


@pytest.mark.parametrize(
    "chosen",
    [
        {"mixup_alpha": 0.8, "optim": "amp"},
        {"optim": "rmp"},
        {"adversarial_epsilon": 0.1, "flood_level": 1.3, "optim": "asam"},
    ],
    ids=["mixup", "rmp", "others"],
)
def test_a_resumed_run_ends_at_the_same_weights(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """The run resumes in the middle of the second epoch, with dropout."""
    data = mixed_images if "mixup_alpha" in chosen else images
    kwargs = {**chosen, "save_strategy": "steps", "save_steps": 7}
    whole = trained(tmp_path, Net(dropout=0.5), data(), **kwargs).model
    checkpoint = str(tmp_path / "checkpoint-7")
    resumed = trained(tmp_path, Net(dropout=0.5), data(), **kwargs, resume_from_checkpoint=checkpoint).model
    assert_same_weights(resumed, whole, rtol=0.0, atol=0.0)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The flood level is for the processes' common loss, and their noise is equal."""
    run_processes(2, "method_processes.py", tmp_path)
    two = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert two.keys() == IN_PROCESSES.keys()
    for method, (weights, replicas_equal) in two.items():
        assert replicas_equal, method
        one: Any = trained(tmp_path, **IN_PROCESSES[method]).model
        expected = nn.utils.parameters_to_vector(one.parameters()).detach()
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11, msg=lambda m, name=method: f"{name}: {m}")


# --- options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim rmp --amp_inner_iter 2", "--amp_inner_iter is for AMP, but --optim is rmp, which perturbs all"),
        ("--optim sam --rmp_epsilon 0.1", "--rmp_epsilon is for --optim rmp, but --optim is sam"),
        ("--optim sgd --sam_rho 0.1", "--sam_rho is for --optim sam or asam, but --optim is sgd"),
        ("--optim sam_adamw_torch", "optim 'sam_adamw_torch' is unknown: rmp, sam, asam are around SGD only"),
        ("--optim samm", "optim 'samm' is unknown, did you mean 'sam'"),
        ("--flood_level -1", "--flood_level must be at least 0 and finite, got -1.0; leave it out"),
        ("--mixup_alpha 0", "--mixup_alpha must be above 0 and finite, got 0.0; leave it out"),
        ("--mixup_alpha nan", "--mixup_alpha must be above 0 and finite, got nan"),
        ("--adversarial_epsilon 1", "--adversarial_epsilon must be above 0 and below 1, got 1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        options.parse(words.split())
    assert "\n" not in str(caught.value)


def test_what_is_recorded_and_where_the_results_go() -> None:
    data, model, training = options.parse(["--optim", "asam", "--mixup_alpha", "1", "--use_cpu"])
    settings = settings_of(data, model, training)
    assert (settings["optim"], settings["sam_rho"], settings["mixup_alpha"]) == ("asam", 0.5, 1.0)
    assert not {"rmp_epsilon", "flood_level", "adversarial_epsilon"} & settings.keys()
    assert training.output_dir == "runs/cifar10_sample-preactresnet18-asam-mixup-seed42"
    assert not training.uses_amp
    assert training.optim_args == "momentum=0.9,nesterov=True", "as AMP and SGD have it"
    assert replace(training, seed=1).sam_rho == 0.5


def test_dropout_is_an_argument_of_the_model() -> None:
    rates = '{"width": 4, "layers": [1, 1, 1, 1], "drop_rate": 0.1, "conv_drop_rate": 0.2}'
    model = make_task(*options.parse(["--model_kwargs", rates, "--use_cpu"])).model
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1, 0.2}


def test_runs_with_another_loss_are_told_apart() -> None:
    erm = {"optim": "sgd", "seed": 1}
    assert differences({**erm, "flood_level": 0.02}, {"optim": "amp", "seed": 1}) == {"flood_level": (0.02, None)}
    assert differences({**erm, "sam_rho": 0.05, "optim": "sam"}, {"optim": "amp", "seed": 1}) == {}
    assert optimizer_in_words({**erm, "flood_level": 0.02}) == "SGD, without AMP, with flooding"
    assert optimizer_in_words({**erm, "optim": "rmp", "rmp_epsilon": 0.1}) == "RMP around SGD, without AMP"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("words", "shown"),
    {
        "--optim sam": "sam (without AMP), SAM: rho 0.05, one ball for all parameters; on cpu",
        "--optim sgd --mixup_alpha 1 --label_smoothing_factor 0.2": "sgd (without AMP), label smoothing: 0.2, mixup:"
        " proportions from Beta(1, 1); on cpu",
    }.items(),
)
def test_the_main_job_says_what_it_trains_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, shown: str
) -> None:
    job.main([*QUICK, *words.split(), "--num_train_epochs", "1", "--output_dir", str(tmp_path)])
    first = capsys.readouterr().out.splitlines()[0]
    assert shown in first
    assert "AMP" not in first.replace("without AMP", "")
    card = (tmp_path / "README.md").read_text()
    assert "without AMP" in card
    assert "Adversarial Model Perturbation" not in card
    record = json.loads((tmp_path / "run.json").read_text())
    assert not any("amp_loss" in name for name in record["metrics"])
