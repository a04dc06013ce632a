"""Lightning: automatic and manual optimization, and Fabric."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import host_problem as problem
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from amp_plugin import LossModule, attach

lightning = pytest.importorskip("lightning", reason="needs Lightning")


class Plain(lightning.LightningModule):
    """The module that everybody has: model and criterion apart, the closure of Lightning makes the passes."""

    def __init__(self, optimizer: Any = problem.amp, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.model, self.make_optimizer = problem.net(dtype), optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Attached(Plain):
    """The module of the page: it returns the loss of a LossModule, which is attached."""

    attachment: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step = LossModule(self.model, nn.CrossEntropyLoss())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(*batch)["loss"]
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.attachment is not None:  # of an earlier fit
            self.attachment.detach()
        self.attachment = attach(optimizer, self.step)
        return optimizer


class Manual(Attached):
    """The loop in the module's own hands."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.step(*batch)["loss"])
        optimizer.step()


class ManualAlone(Manual):
    """The same, with nothing attached."""

    configure_optimizers = Plain.configure_optimizers


class ManualPasses(ManualAlone):
    """With both passes written out."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in optimizer.ascent_passes():
            self.manual_backward(self.step(*batch)["loss"])
        self.manual_backward(self.step(*batch)["loss"])
        optimizer.step()


def fit(
    module: Any, *, steps: int = problem.STEPS, ckpt_path: Any = None, loader: Any = problem.batches, **options: Any
) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1, "max_steps": steps, **options}
    trainer = lightning.Trainer(**quiet, **options)
    dtype = next(module.parameters()).dtype
    data = None if loader is None else torch.utils.data.DataLoader(loader(dtype), batch_size=None)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("kind", [Plain, Attached, Manual, ManualPasses])
def test_it_arrives_where_the_reference_does(kind: Any) -> None:
    module = kind()
    fit(module)
    problem.assert_arrived(problem.weights(module, "model."), problem.reference()[-1])


@pytest.mark.parametrize("kind", [Plain, Attached, Manual])
def test_without_epsilon_it_is_the_base_optimizer(kind: Any) -> None:
    module, plain = (
        kind(lambda params: problem.amp(params, epsilon=0.0)),
        Plain(lambda params: SGD(params, **problem.SGD_ARGS)),
    )
    fit(module)
    fit(plain)
    problem.assert_same_bits(problem.weights(module), problem.weights(plain))


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"clip_norm": 0.5}, {"accumulate": 3, "clip_norm": 0.5}], ids=str
)
def test_attached_it_accumulates_and_clips(options: dict[str, Any]) -> None:
    module = Attached()
    expected = problem.reference(**options)
    fit(
        module,
        steps=len(expected),
        accumulate_grad_batches=options.get("accumulate", 1),
        gradient_clip_val=options.get("clip_norm"),
    )
    problem.assert_arrived(problem.weights(module), expected[-1])


def test_attached_in_bf16() -> None:
    module = Attached(dtype=torch.float32)
    fit(module, precision="bf16-mixed")
    problem.assert_arrived(problem.weights(module), problem.in_bf16(), within=1e-6)


def test_attached_it_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, half, rest = Attached(), Attached(), Attached()
    fit(whole, max_epochs=2, steps=-1)
    trainer = fit(half, enable_checkpointing=True, default_root_dir=tmp_path, steps=-1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, max_epochs=2, steps=-1, ckpt_path=tmp_path / "half.ckpt")
    problem.assert_same_bits(problem.weights(rest), problem.weights(whole))


def test_attached_it_fits_twice_and_logs_the_loss_at_the_weights() -> None:
    module = Attached()
    fit(module, steps=2)
    module.model.load_state_dict(problem.net().state_dict())
    trainer = fit(module, steps=1)
    x, y = problem.batches()[0]
    expected = F.cross_entropy(problem.net()(x), y).detach()
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], expected, check_dtype=False)


def test_attached_with_an_average_of_the_weights() -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module, averaging = Attached(), EMAWeightAveraging(decay=0.9)
    fit(module, callbacks=[averaging])
    expected = problem.moving_average(problem.reference(), 0.9)
    problem.assert_arrived(problem.weights(module), expected)


class Halves(Attached):
    """Each of two processes trains on its half of every batch."""

    def train_dataloader(self) -> Any:
        half = slice(4 * self.global_rank, 4 * self.global_rank + 4)
        return torch.utils.data.DataLoader([(x[half], y[half]) for x, y in problem.batches()], batch_size=None)


@pytest.mark.slow
def test_attached_in_two_processes_it_equals_one() -> None:
    """The processes have statistics of their halves, as micro-batches have."""
    module = Halves()
    fit(module, loader=None, strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    halves = [[(x[:4], y[:4]), (x[4:], y[4:])] for x, y in problem.batches()]
    problem.assert_arrived(problem.weights(module), problem.reference(windows=halves, each=False)[-1])


def test_the_closure_is_refused_where_it_sees_the_last_micro_batch_alone() -> None:
    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches=2 .* amp_plugin\.LossModule"):
        fit(Plain(), accumulate_grad_batches=2)
    fit(Plain(lambda params: problem.amp(params, epsilon=0.0)), accumulate_grad_batches=2)


def test_manual_optimization_does_not_train_without_amp() -> None:
    with pytest.raises(RuntimeError, match=r"without a closure needs 1 ascent step\(s\) before it, got 0"):
        fit(ManualAlone())


def test_an_attached_module_takes_lightnings_wrapper_for_the_optimizer() -> None:
    class AttachesLate(Attached):
        configure_optimizers = Plain.configure_optimizers

        def on_train_start(self) -> None:
            self.attachment = attach(self.optimizers(), self.step)

    module = AttachesLate()
    fit(module)
    problem.assert_arrived(problem.weights(module), problem.reference()[-1])


def train_with_fabric(
    epsilon: float = problem.BALL["epsilon"],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Any = "64-true",
    attached: str = "after",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    module: Any = LossModule(problem.net(dtype), nn.CrossEntropyLoss())
    optimizer: Any = problem.amp(module.parameters(), epsilon=epsilon)
    if attached == "before":
        attach(optimizer, module)
    module, optimizer = fabric.setup(module, optimizer)
    if attached == "after":
        attach(optimizer, module)
    for i, (x, y) in enumerate(problem.batches(dtype), 1):
        last = i % accumulate == 0
        with fabric.no_backward_sync(module, enabled=not last):
            fabric.backward(module(x, y)["loss"] / accumulate)
        if last:
            if clip:
                fabric.clip_gradients(module, optimizer, max_norm=clip)
            optimizer.step()
            optimizer.zero_grad()
    return problem.weights(module)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_fabric(attached: str) -> None:
    problem.assert_arrived(train_with_fabric(attached=attached), problem.reference()[-1])
    problem.assert_same_bits(train_with_fabric(0.0, attached=attached), problem.plainly())


def test_fabric_accumulates_clips_and_knows_bf16() -> None:
    found = train_with_fabric(accumulate=3, clip=0.5)
    problem.assert_arrived(found, problem.reference(accumulate=3, clip_norm=0.5)[-1])
    found = train_with_fabric(precision="bf16-mixed", dtype=torch.float32)
    problem.assert_arrived(found, problem.in_bf16(), within=1e-6)
