"""Engines and trainers of one loop each: skorch, ignite, MONAI, mmengine, torchtnt, pytorch-accelerated, Composer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_problem as problem
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from amp_plugin import AMP, LossModule, attach
from amp_plugin.core.find import find_amp

Weights = dict[str, Tensor]
Optimizer = Callable[[Any], torch.optim.Optimizer]


def loader(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    return DataLoader(problem.batches(dtype), batch_size=None)


def samples(dtype: torch.dtype = torch.float64) -> TensorDataset:
    images, labels = zip(*problem.batches(dtype), strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def step_for(optimizer: Optimizer, dtype: torch.dtype = torch.float64) -> tuple[LossModule, torch.optim.Optimizer]:
    """The module that every host is given, attached if the optimizer is AMP."""
    step = LossModule(problem.net(dtype), nn.CrossEntropyLoss())
    made = optimizer(step.parameters())
    if find_amp(made) is not None:
        attach(made, step)
    return step, made


def skorch(optimizer: Optimizer) -> Weights:
    """The closure that skorch gives to any optimizer makes the passes."""
    from skorch import NeuralNetClassifier

    net = skorch_net(NeuralNetClassifier, optimizer)
    images, labels = samples().tensors
    net.fit(images, labels)
    return problem.weights(net.module_)


def skorch_net(kind: Any, optimizer: Optimizer, **changes: Any) -> Any:
    options = {"train_split": None, "max_epochs": 1, "batch_size": 8, "verbose": 0, "classes": range(4), **changes}
    return kind(problem.net(), criterion=nn.CrossEntropyLoss, optimizer=lambda params, lr: optimizer(params), **options)


def ignite(optimizer: Optimizer, *, accumulate: int = 1, decay: float | None = None) -> Weights:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import EMAHandler

    step, made = step_for(optimizer)
    trainer = create_supervised_trainer(
        step,
        made,
        lambda output, _: output["loss"],
        prepare_batch=lambda batch, device, non_blocking: (batch, None),
        model_fn=lambda step, batch: step(*batch),
        gradient_accumulation_steps=accumulate,
    )
    average = EMAHandler(step, momentum=1 - decay) if decay else None
    if average is not None:
        average.attach(trainer, event=Events.ITERATION_COMPLETED)
    trainer.run(loader(), max_epochs=1)
    return problem.weights(step if average is None else average.ema_model)


def monai(optimizer: Optimizer, *, accumulate: int = 1) -> Weights:
    from monai.engines import SupervisedTrainer

    step, made = step_for(optimizer)
    options = {} if accumulate == 1 else {"accumulation_steps": accumulate}
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=loader(),
        network=step,
        optimizer=made,
        loss_function=lambda output, _: output["loss"],
        prepare_batch=lambda batch, device, non_blocking, **kwargs: (batch[0], batch[1], (batch[1],), {}),
        decollate=False,
        **options,
    )
    trainer.run()
    return problem.weights(step)


def mmengine(
    optimizer: Optimizer, *, accumulate: int = 1, clip: float | None = None, folder: Path | None = None
) -> Weights:
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem.net()

        def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
            outputs = self.net(images)
            return {"loss": nn.functional.cross_entropy(outputs, labels)} if mode == "loss" else outputs

    class AttachHook(Hook):
        def before_train(self, runner: Any) -> None:
            if find_amp(runner.optim_wrapper.optimizer) is not None:
                attach(runner.optim_wrapper.optimizer, runner.model)

    model = Model()
    runner = Runner(
        model,
        work_dir=str(folder),
        train_dataloader=loader(),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper=OptimWrapper(
            optimizer(model.parameters()),
            accumulative_counts=accumulate,
            clip_grad={"max_norm": clip} if clip else None,
        ),
        custom_hooks=[AttachHook()],
        default_hooks={"checkpoint": None, "logger": None, "sampler_seed": None},
        log_level="ERROR",
        experiment_name=f"run{id(model)}",
    )
    runner.train()
    return problem.weights(model)


def torchtnt(optimizer: Optimizer, *, accumulate: int = 1, clip: float | None = None, bf16: bool = False) -> Weights:
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train

    class Unit(AutoUnit[Any]):
        def compute_loss(self, state: Any, data: Any) -> Any:
            result = self.module(*data)
            return result["loss"], result["output"]

        def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> Any:
            made = optimizer(module.parameters())
            if find_amp(made) is not None:
                attach(made, module)
            return made, None

    dtype = torch.float32 if bf16 else torch.float64
    step = LossModule(problem.net(dtype), nn.CrossEntropyLoss())
    unit = Unit(
        module=step,
        device=torch.device("cpu"),
        gradient_accumulation_steps=accumulate,
        clip_grad_norm=clip,
        precision="bf16" if bf16 else None,
    )
    train(unit, loader(dtype), max_epochs=1)
    return problem.weights(step)


def pytorch_accelerated(optimizer: Optimizer, *, accumulate: int = 1) -> Weights:
    from pytorch_accelerated import Trainer

    AcceleratorState._reset_state(reset_partial_state=True)

    class AttachedTrainer(Trainer):
        def training_run_start(self) -> None:
            if find_amp(self.optimizer) is not None:
                attach(self.optimizer, self.model)

        def calculate_train_batch_loss(self, batch: Any) -> Any:
            result = self.model(*batch)
            return {"loss": result["loss"], "model_outputs": result["output"], "batch_size": len(batch[1])}

    step = LossModule(problem.net(), nn.CrossEntropyLoss())
    trainer = AttachedTrainer(step, loss_func=None, optimizer=optimizer(step.parameters()), callbacks=())
    trainer.train(
        samples(),
        num_epochs=1,
        per_device_batch_size=8,
        gradient_accumulation_steps=accumulate,
        train_dataloader_kwargs={"shuffle": False, "num_workers": 0},
    )
    return problem.weights(step)


def composer(optimizer: Optimizer, *, accumulate: int = 1) -> Weights:
    from composer import Trainer
    from composer.models import ComposerModel

    class Model(ComposerModel):
        def __init__(self, step: nn.Module) -> None:
            super().__init__()
            self.step = step

        def forward(self, batch: Any) -> Any:
            return self.step(*batch)

        def loss(self, outputs: Any, batch: Any) -> Any:
            return outputs["loss"]

    step, made = step_for(optimizer)
    Trainer(
        model=Model(step),
        train_dataloader=DataLoader(samples(), batch_size=8 * accumulate),
        optimizers=made,
        max_duration="1ep",
        device="cpu",
        device_train_microbatch_size=8,
        progress_bar=False,
    ).fit()
    return problem.weights(step)


HOSTS = {
    "skorch": skorch,
    "ignite": ignite,
    "monai": monai,
    "mmengine": mmengine,
    "torchtnt": torchtnt,
    "pytorch_accelerated": pytorch_accelerated,
    "composer": composer,
}
ACCUMULATES = ["ignite", "monai", "mmengine", "torchtnt", "pytorch_accelerated", "composer"]


def run(name: str, optimizer: Optimizer, folder: Path, **options: Any) -> Weights:
    pytest.importorskip(name, reason=f"needs {name}")
    logging.getLogger(name).setLevel(logging.ERROR)
    if name == "mmengine":
        options["folder"] = folder
    return HOSTS[name](optimizer, **options)


@pytest.mark.parametrize("name", HOSTS)
def test_it_arrives_where_the_reference_does(name: str, tmp_path: Path) -> None:
    problem.assert_arrived(run(name, problem.amp, tmp_path), problem.reference()[-1])


@pytest.mark.parametrize("name", HOSTS)
def test_without_epsilon_it_is_the_base_optimizer(name: str, tmp_path: Path) -> None:
    found = run(name, lambda params: problem.amp(params, epsilon=0.0), tmp_path)
    problem.assert_same_bits(found, run(name, lambda params: SGD(params, **problem.SGD_ARGS), tmp_path))


@pytest.mark.parametrize("name", ACCUMULATES)
def test_it_accumulates(name: str, tmp_path: Path) -> None:
    found = run(name, problem.amp, tmp_path, accumulate=3)
    rounding = 1e-6 if name == "composer" else 1e-9  # its third of a loss is a float32
    problem.assert_arrived(found, problem.reference(accumulate=3)[-1], within=rounding)


def test_composers_closure_makes_the_passes_over_all_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "attach", lambda *args: None)
    found = run("composer", problem.amp, tmp_path, accumulate=3)
    problem.assert_arrived(found, problem.reference(accumulate=3, each=False)[-1], within=1e-6)


@pytest.mark.parametrize("name", ["mmengine", "torchtnt"])
def test_it_clips(name: str, tmp_path: Path) -> None:
    found = run(name, problem.amp, tmp_path, accumulate=3, clip=0.5)
    problem.assert_arrived(found, problem.reference(accumulate=3, clip_norm=0.5)[-1])


def test_torchtnt_knows_bf16(tmp_path: Path) -> None:
    problem.assert_arrived(run("torchtnt", problem.amp, tmp_path, bf16=True), problem.in_bf16(), within=1e-6)


def test_ignite_averages_the_weights(tmp_path: Path) -> None:
    points = [problem.parameters_of(problem.net()), *problem.reference()]
    found = run("ignite", problem.amp, tmp_path, decay=0.9)
    problem.assert_arrived(found, problem.moving_average(points, 0.9))


def test_skorch_resumes_to_the_bit_and_shows_the_loss_at_the_weights(tmp_path: Path) -> None:
    kind = pytest.importorskip("skorch", reason="needs skorch").NeuralNetClassifier
    images, labels = samples().tensors
    whole, half, rest = (skorch_net(kind, problem.amp) for _ in range(3))
    whole.partial_fit(images, labels).partial_fit(images, labels)
    half.partial_fit(images, labels)
    half.save_params(f_params=tmp_path / "net", f_optimizer=tmp_path / "optimizer")
    rest.initialize().load_params(f_params=tmp_path / "net", f_optimizer=tmp_path / "optimizer")
    rest.partial_fit(images, labels)
    problem.assert_same_bits(problem.weights(rest.module_), problem.weights(whole.module_))
    first = skorch_net(kind, problem.amp)
    first.partial_fit(images[:8], labels[:8])
    expected = nn.functional.cross_entropy(problem.net()(images[:8]), labels[:8]).item()
    assert first.history[-1, "train_loss"] == pytest.approx(expected)
    assert isinstance(first.optimizer_, AMP)


@pytest.mark.parametrize("name", [name for name in HOSTS if name not in ("skorch", "composer")])
def test_an_optimizer_that_nobody_attached_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "attach", lambda *args: None)
    with pytest.raises(RuntimeError, match="without a closure needs 1 ascent"):
        run(name, problem.amp, tmp_path)
