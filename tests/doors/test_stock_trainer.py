"""The stock `transformers.Trainer` with an AMP optimizer: it trains with AMP, and says so, or it is an error."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import amp_plugin
from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, attach, detach
from amp_plugin.doors.attach_callback import AttachCallback

SAMPLES, BATCH = 40, 4
AMP_ARGS: dict[str, Any] = {"lr": 0.05, "epsilon": 0.1, "inner_lr": 0.5, "momentum": 0.9}


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(4, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 4)).double()
        self.training_passes = 0
        self.config = SimpleNamespace()  # the Trainer looks at it when labels are smoothed

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.training_passes += self.training
        logits = self.body(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class TokenNet(Net):
    """Divides by the number of items, as language models do."""

    def forward(self, pixel_values: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        self.training_passes += self.training
        total = F.cross_entropy(self.body(pixel_values), labels, reduction="sum")
        items = kwargs.get("num_items_in_batch")
        return {"loss": total / (len(labels) if items is None else items)}


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 1.0,
    }
    return TrainingArguments(**{**defaults, **kwargs})


def hand_written(model: Net, accumulation: int, max_norm: float = 1.0) -> list[float]:
    """The perturbation and the gradient of each micro-batch spelt out, in float64; returns the clean losses."""
    data, params, losses = Images(), list(model.parameters()), []
    velocity = [torch.zeros_like(p) for p in params]
    micro = list(zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True))
    for _ in range(2):
        for start in range(0, len(micro), accumulation):
            window, total = micro[start : start + accumulation], [torch.zeros_like(p) for p in params]
            losses.append(0.0)
            for x, y in window:
                loss = F.cross_entropy(model.body(x), y)
                losses[-1] += loss.item() / len(window)
                deltas = [0.5 * g for g in torch.autograd.grad(loss, params)]
                deltas = [d * min(1.0, 0.1 / d.norm().item()) for d in deltas]
                theta = [p.detach().clone() for p in params]
                with torch.no_grad():
                    torch._foreach_add_(params, deltas)
                grads = torch.autograd.grad(F.cross_entropy(model.body(x), y), params)
                with torch.no_grad():
                    torch._foreach_copy_(params, theta)
                total = [t + g / len(window) for t, g in zip(total, grads, strict=True)]
            norm = torch.cat([t.flatten() for t in total]).norm().item()
            with torch.no_grad():
                for p, v, t in zip(params, velocity, total, strict=True):
                    v.mul_(0.9).add_(t * min(1.0, max_norm / (norm + 1e-6)))
                    p.sub_(0.05 * v)
    return losses


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("given", ["instance", "class"])
def test_it_trains_with_amp_and_says_so(
    tmp_path: Path, accumulation: int, given: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("amp_plugin.doors.attach_callback"), "propagate", True)
    net, reference = Net(), Net()
    optimizer: dict[str, Any] = (
        {"optimizers": (AMP(net.parameters(), **AMP_ARGS), None)}
        if given == "instance"
        else {"optimizer_cls_and_kwargs": (AMP, AMP_ARGS)}
    )
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = InOrder(model=net, args=args, train_dataset=Images(), **optimizer)
    trainer.train()
    assert "Training with Adversarial Model Perturbation, attached to Net" in caplog.text
    losses = hand_written(reference, accumulation)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert net.training_passes == 2 * 2 * SAMPLES // BATCH
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-4), "the logged loss is the clean one"
    assert not net._forward_pre_hooks, "the model is given back"


def test_it_can_train_again(tmp_path: Path) -> None:
    net = Net()
    trainer = InOrder(
        model=net, args=arguments(tmp_path), train_dataset=Images(), optimizer_cls_and_kwargs=(AMP, AMP_ARGS)
    )
    trainer.train()
    trainer.train()
    assert net.training_passes == 2 * 2 * 2 * SAMPLES // BATCH


class FailOnce(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_it_can_train_again_after_a_failure(tmp_path: Path) -> None:
    net = Net()
    optimizer = AMP(net.parameters(), **AMP_ARGS)
    first = InOrder(
        model=net,
        args=arguments(tmp_path),
        train_dataset=Images(),
        optimizers=(optimizer, None),
        callbacks=[FailOnce()],
    )
    with pytest.raises(KeyboardInterrupt):
        first.train()
    passes = net.training_passes
    second = InOrder(model=net, args=arguments(tmp_path), train_dataset=Images(), optimizers=(optimizer, None))
    second.train()
    assert net.training_passes - passes == 2 * 2 * SAMPLES // BATCH


def interrupted(folder: Path, accumulation: int = 1) -> Net:
    """A model that a Trainer with AMP has attached, and could not give back."""
    net = Net()
    trainer = InOrder(
        model=net,
        args=arguments(folder, gradient_accumulation_steps=accumulation),
        train_dataset=Images(),
        optimizers=(AMP(net.parameters(), **AMP_ARGS), None),
        callbacks=[FailOnce()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    net.training_passes = 0
    return net


@pytest.mark.parametrize("then", ["SGD", "another AMP", "AMPTrainer"])
def test_what_an_interrupted_training_left_attached_does_not_reach_the_next_one(tmp_path: Path, then: str) -> None:
    net = interrupted(tmp_path, accumulation=2)
    reference = copy.deepcopy(net)
    for model in (net, reference):
        if then == "AMPTrainer":
            args: Any = AMPTrainingArguments(
                **{f: getattr(arguments(tmp_path), f) for f in ("output_dir", "num_train_epochs", "disable_tqdm")},
                **{"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2, "optim": "amp"},
                **{"report_to": [], "use_cpu": True, "save_strategy": "no"},
            )
            AMPTrainer(model=model, args=args, train_dataset=Images()).train()
        else:
            kwargs: Any = {"optimizer_cls_and_kwargs": (AMP, AMP_ARGS)} if then == "another AMP" else {}
            InOrder(model=model, args=arguments(tmp_path, optim="sgd"), train_dataset=Images(), **kwargs).train()
    assert net.training_passes == reference.training_passes == (1 if then == "SGD" else 2) * 2 * SAMPLES // BATCH
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), reference.parameters(), strict=True))


def test_a_model_that_is_attached_to_another_optimizer_is_refused(tmp_path: Path) -> None:
    net = Net()
    attach(AMP(net.parameters(), **AMP_ARGS), net)
    trainer = InOrder(model=net, args=arguments(tmp_path, optim="sgd"), train_dataset=Images())
    with pytest.raises(ValueError, match=r"attached to an AMP optimizer, .* amp_plugin\.detach\(model\)"):
        trainer.train()
    detach(net)
    trainer.train()


@pytest.mark.parametrize(
    "settings", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": True}], ids=["label smoothing", "own loss"]
)
def test_a_loss_outside_the_model_is_an_error_not_plain_sgd(tmp_path: Path, settings: dict[str, Any]) -> None:
    own = {"compute_loss_func": lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels)}
    kwargs = own if settings.pop("compute_loss_func", False) else {}
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    trainer = InOrder(
        model=net,
        args=arguments(tmp_path, **settings),
        train_dataset=Images(),
        optimizer_cls_and_kwargs=(AMP, AMP_ARGS),
        **kwargs,
    )
    with pytest.raises(TypeError, match=r"dict with no loss.*AMPTrainer"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_loss_over_the_whole_window_is_an_error_that_names_amp_trainer(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = InOrder(model=TokenNet(), args=args, train_dataset=Images(), optimizer_cls_and_kwargs=(AMP, AMP_ARGS))
    with pytest.raises(ValueError, match=r"too short\. Use amp_plugin\.AMPTrainer"):
        trainer.train()


def test_a_loss_over_the_batch_is_exact(tmp_path: Path) -> None:
    net, reference = TokenNet(), TokenNet()
    InOrder(
        model=net, args=arguments(tmp_path), train_dataset=Images(), optimizer_cls_and_kwargs=(AMP, AMP_ARGS)
    ).train()
    hand_written(reference, 1)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    net = Net()
    InOrder(model=net, args=arguments(tmp_path, optim="sgd"), train_dataset=Images()).train()
    assert net.training_passes == 2 * SAMPLES // BATCH


def test_amp_trainer_keeps_its_own_way(tmp_path: Path) -> None:
    args = AMPTrainingArguments(str(tmp_path), optim="amp", report_to=[], use_cpu=True)
    trainer = AMPTrainer(model=Net(), args=args, train_dataset=Images())
    assert not any(isinstance(c, AttachCallback) for c in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("first", ["amp_plugin", "transformers"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    second = {"amp_plugin": "transformers", "transformers": "amp_plugin"}[first]
    program = (
        f"import {first}\n"
        + ("from transformers import Trainer\n" if first == "transformers" else "")
        + f"import {second}\n"
        + "from transformers import Trainer\nfrom transformers.trainer import DEFAULT_CALLBACKS\n"
        + "assert [c.__name__ for c in DEFAULT_CALLBACKS].count('AttachCallback') == 1, DEFAULT_CALLBACKS"
    )
    root = Path(amp_plugin.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)
