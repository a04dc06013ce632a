"""The doors of AMP on a CUDA device that know a library, or only a module; against float64 on the CPU.

`AMP_PLUGIN_TEST_DEVICE=cpu pytest -m cuda` tries the tests themselves on a CPU, see `device_trainings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from device_trainings import (
    DEVICE,
    MARKS,
    PRECISIONS,
    SGD,
    STEPS,
    Training,
    allow_tf32,
    assert_a_nan_changes_nothing,
    assert_ends_as_the_reference,
    assert_overflows_lower_the_scale,
    autocast,
    batches,
    by_attach,
    distance,
    own_settings,
)
from exactness_problem import BALL, Net
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, amp_backward

pytestmark = MARKS
IN_FLOAT32 = [name for name in PRECISIONS if name != "fp64"]
MIXED = {"bf16": "bf16", "fp16": "fp16"}
CAPTURED = pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    with own_settings():
        yield
        for state in (AcceleratorState, PartialState):
            state._shared_state.clear()


@pytest.fixture(autouse=True)
def _captures_succeed(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """A step that could not be captured would be trained as it is, and rightly so."""
    yield
    assert not [str(w.message) for w in recwarn if "cannot be captured" in str(w.message)]


# --- attach


@CAPTURED
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_attached_net_ends_where_the_reference_does(precision: str, captured: bool) -> None:
    training = Training(precision, captured=captured)
    assert_ends_as_the_reference(training, training.run(by_attach(training)))


@pytest.mark.parametrize(("precision", "captured"), [("fp32", False), ("bf16", True)])
def test_an_attached_compiled_net_ends_where_the_reference_does(precision: str, captured: bool) -> None:
    training = Training(precision, captured=captured, compiled="default")
    assert_ends_as_the_reference(training, training.run(by_attach(training), warm_up=3))


def test_an_attached_net_compiled_with_graphs_of_its_own_ends_where_the_reference_does() -> None:
    """On other devices than CUDA there are no such graphs."""
    training = Training("fp32", compiled="reduce-overhead")
    assert_ends_as_the_reference(training, training.run(by_attach(training)))


@CAPTURED
def test_a_step_with_a_nan_changes_nothing_and_is_counted(captured: bool) -> None:
    training = Training("fp32", captured=captured)
    assert_a_nan_changes_nothing(training, by_attach(training), captured)


@CAPTURED
def test_a_gradient_scaler_skips_what_overflows_and_lowers_its_scale(captured: bool) -> None:
    """The first ascent knows nothing of the scale, so it is the descent that overflows; then the ascents do."""
    training = Training("fp16", captured=captured)
    training.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
    assert_overflows_lower_the_scale(training, by_attach(training), captured)


# --- libraries


def on_device() -> list[tuple[Tensor, Tensor]]:
    return [(x.float().to(DEVICE), y.to(DEVICE)) for x, y in batches()]


def assert_near(net: nn.Module, precision: str) -> None:
    assert distance(net) < PRECISIONS[precision].bound


def with_fp16_on_cpu(accelerator: Accelerator, precision: str) -> None:
    """On a CPU accelerate has neither autocast nor a scaler for fp16: it would be float32."""
    if DEVICE.type == "cpu" and precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")


@pytest.mark.parametrize("precision", IN_FLOAT32)
def test_amp_backward_ends_where_the_reference_does(precision: str) -> None:
    allow_tf32(precision == "tf32")
    accelerator = Accelerator(cpu=DEVICE.type == "cpu", mixed_precision=MIXED.get(precision, "no"))
    with_fp16_on_cpu(accelerator, precision)
    net = Net().to(DEVICE)
    model, optimizer = accelerator.prepare(net, AMP(net.parameters(), **SGD, **BALL))
    for batch in on_device():
        amp_backward(accelerator, model, optimizer, lambda batch: model(*batch)["loss"], [batch])
        optimizer.step()
        optimizer.zero_grad()
    assert_near(net, precision)


@pytest.mark.parametrize("precision", IN_FLOAT32)
def test_a_timm_task_ends_where_the_reference_does(precision: str) -> None:
    """The loop of timm's train.py: of AMP it knows the optimizer's name."""
    allow_tf32(precision == "tf32")
    net = Net().to(DEVICE)
    task = ClassificationTask(net, F.cross_entropy, verbose=False).train()
    sgd = {name: value for name, value in SGD.items() if name != "nesterov"}  # timm's SGD has it
    optimizer = create_optimizer_v2(net, "amp", filter_bias_and_bn=False, **BALL, **sgd)
    scaler = NativeScaler(DEVICE.type) if precision == "fp16" else None
    if scaler is not None:
        scaler._scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    for batch in on_device():
        optimizer.zero_grad()
        with autocast(PRECISIONS[precision]):
            loss = task(*batch)["loss"]
        if scaler is not None:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
    assert_near(net, precision)


def trainer_arguments(precision: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "learning_rate": SGD["lr"],
        "optim_args": f"momentum={SGD['momentum']},nesterov={SGD['nesterov']}",
        "weight_decay": SGD["weight_decay"],
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,  # a row of the data set is a batch
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": DEVICE.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def train(
    trainer_class: type[Trainer], args: TrainingArguments, precision: str, net: nn.Module, **more: Any
) -> nn.Module:
    allow_tf32(precision == "tf32")
    data = [{"pixel_values": x.float(), "labels": y} for x, y in batches()]
    trainer = trainer_class(net, args, train_dataset=data, data_collator=itemgetter(0), **more)
    with_fp16_on_cpu(trainer.accelerator, precision)
    trainer.train()
    return net


def train_amp(precision: str, folder: Path, net: nn.Module | None = None, **more: Any) -> nn.Module:
    ball = {f"amp_{name}": value for name, value in BALL.items()}
    options = trainer_arguments(precision, folder, optim="amp", decay_all_parameters=True, **ball, **more)
    return train(AMPTrainer, AMPTrainingArguments(**options), precision, Net() if net is None else net)


@CAPTURED
@pytest.mark.parametrize("precision", IN_FLOAT32)
def test_the_trainer_ends_where_the_reference_does(precision: str, captured: bool, tmp_path: Path) -> None:
    if captured and precision == "fp16":
        with pytest.raises(ValueError, match="amp_capture: fp16"):
            train_amp(precision, tmp_path, amp_capture=True)
        return
    net, calls = Net(), list[int]()
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_near(train_amp(precision, tmp_path, net, amp_capture=captured), precision)
    by_python = len(calls) / STEPS / (BALL["inner_iter"] + 1)
    assert by_python < 0.6 if captured and DEVICE.type == "cuda" else by_python == 1.0


@pytest.mark.parametrize(("mode", "captured"), [("default", True), ("reduce-overhead", False)])
def test_the_trainer_with_a_compiled_net_ends_where_the_reference_does(
    mode: str, captured: bool, tmp_path: Path
) -> None:
    net = train_amp("bf16", tmp_path, torch_compile=True, torch_compile_mode=mode, amp_capture=captured)
    assert_near(net, "bf16")


def test_the_stock_trainer_ends_where_the_reference_does(tmp_path: Path) -> None:
    """The callback that transformers finds in AMP's package attaches the optimizer that the Trainer is given."""
    net = Net().to(DEVICE)
    options = trainer_arguments("fp32", tmp_path)
    del options["optim_args"]
    optimizers = (AMP(net.parameters(), **SGD, **BALL), None)
    assert_near(train(Trainer, TrainingArguments(**options), "fp32", net, optimizers=optimizers), "fp32")
