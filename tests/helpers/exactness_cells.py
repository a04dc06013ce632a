"""Trains the problem of the exactness table in every host, for test_exactness.py, in two processes as torchrun does.

python -m torch.distributed.run --nproc_per_node 2 tests/helpers/exactness_cells.py FOLDER no|inductor

Each process writes `<folder>/<compiler> <rank>.pt`: the results by cell, as tuples.
The cells with one process are shared out between the two, which know nothing of each other then.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from exactness_problem import BALL, HOSTS, SGD, SIZE, STEPS, Batch, Cell, Net, Result, batches_of, cells_of
from leaving import leave
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, ExtraPasses, amp_backward, attach

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def windows_of(cell: Cell) -> list[list[Batch]]:
    """This process's micro-batches of each step."""
    rank = RANK if cell.processes > 1 else 0
    return [[batches[rank] for batches in step] for step in batches_of(cell)]


def autocast(cell: Cell) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", cell.dtype, enabled=cell.dtype is not None)


def scaler(cell: Cell) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=256.0, enabled=cell.dtype == torch.float16)


# --- loops that drive torch themselves


class Loop:
    """The passes over a window, with DDP, autocast and gradient scaler, and the optimizer's step."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.net, self.scaler = cell, Net(), scaler(cell)
        model: Any = self.net if cell.compile == "no" else torch.compile(self.net, backend=cell.compile)
        self.model: nn.Module = DistributedDataParallel(model) if cell.processes > 1 else model
        self.optimizer = AMP(self.net.parameters(), **cell.ball, **SGD)

    def backward(self, window: list[Batch]) -> None:
        for i, batch in enumerate(window, 1):
            waits = isinstance(self.model, DistributedDataParallel) and i < len(window)
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with autocast(self.cell):
                    loss = self.model(*batch)["loss"]
                self.scaler.scale(loss / len(window)).backward()

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def closure(cell: Cell) -> nn.Module:
    loop = Loop(cell)
    passes = ExtraPasses(loop.model)
    for window in windows_of(cell):

        def evaluate(window: list[Batch] = window) -> Tensor:
            loop.optimizer.zero_grad()
            loop.backward(window)
            return torch.zeros(())

        if loop.scaler.is_enabled():
            loop.backward(window)
            loop.scaler.step(loop.optimizer, evaluate)
        loop.optimizer.step(evaluate, passes=passes)
    return loop.net


def ascend(cell: Cell) -> nn.Module:
    loop = Loop(cell)
    passes = ExtraPasses(loop.model)
    for window in windows_of(cell):
        for i in range(BALL["inner_iter"] + 1):
            with passes.perturbed() if i else passes.clean():
                loop.backward(window)
            if i < BALL["inner_iter"]:
                loop.optimizer.ascend(grad_scale=loop.scaler.get_scale())
        loop.step()
    return loop.net


def attached(cell: Cell) -> nn.Module:
    loop = Loop(cell)
    attach(loop.optimizer, loop.model)
    for window in windows_of(cell):
        loop.backward(window)
        loop.step()
    return loop.net


def timm_task(cell: Cell) -> nn.Module:
    """The loop of timm's train.py: of AMP it knows the optimizer's name."""
    net = Net()
    task = ClassificationTask(net, F.cross_entropy, verbose=False)
    if cell.compile != "no":
        task.compile(backend=cell.compile)
    if cell.processes > 1:
        task.prepare_distributed()
    sgd = {name: value for name, value in SGD.items() if name != "nesterov"}  # timm's SGD has it
    optimizer = create_optimizer_v2(net, "amp", filter_bias_and_bn=False, **cell.ball, **sgd)
    loss_scaler = NativeScaler("cpu") if cell.dtype == torch.float16 else None
    if loss_scaler is not None:
        loss_scaler._scaler = scaler(cell)
    task.train()
    for window in windows_of(cell):
        for i, batch in enumerate(window, 1):
            need_update = i == len(window)
            with nullcontext() if need_update else task.no_sync():
                with autocast(cell):
                    loss = task(*batch)["loss"] / len(window)
                if loss_scaler is not None:
                    loss_scaler(loss, optimizer, need_update=need_update)
                else:
                    loss.backward()
            if need_update:
                if loss_scaler is None:
                    optimizer.step()
                optimizer.zero_grad()
    return net


# --- accelerate and transformers


def with_fp16_on_cpu(accelerator: Accelerator, cell: Cell) -> Accelerator:
    """On the CPU accelerate has neither autocast nor a scaler for fp16: it would be float32."""
    if cell.dtype == torch.float16:
        accelerator.native_amp, accelerator.scaler = True, scaler(cell)
    return accelerator


def prepared(cell: Cell) -> tuple[nn.Module, Accelerator, nn.Module, Any]:
    """The net, the accelerator, and what that makes of net and optimizer."""
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=cell.precision,
        gradient_accumulation_steps=cell.micro_batches,
        dynamo_backend=cell.compile,
    )
    net = Net()
    model, optimizer = with_fp16_on_cpu(accelerator, cell).prepare(net, AMP(net.parameters(), **cell.ball, **SGD))
    return net, accelerator, model, optimizer


def accelerate_attached(cell: Cell) -> nn.Module:
    net, accelerator, model, optimizer = prepared(cell)
    attach(optimizer, model)
    for window in windows_of(cell):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(model(*batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
    return net


def accelerate_window(cell: Cell) -> nn.Module:
    net, accelerator, model, optimizer = prepared(cell)
    for window in windows_of(cell):
        amp_backward(accelerator, model, optimizer, lambda batch: model(*batch)["loss"], window)
        optimizer.step()
        optimizer.zero_grad()
    return net


def trained(trainer_class: type[Trainer], args: TrainingArguments, cell: Cell, optimizer: bool) -> nn.Module:
    class InOrder(trainer_class):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    net = Net()
    every = [batch for step in batches_of(cell) for batches in step for batch in batches]
    data = [{"pixel_values": x, "labels": y} for batch in every for x, y in zip(*batch, strict=True)]
    given = (AMP(net.parameters(), **cell.ball, **SGD), None) if optimizer else (None, None)
    trainer = InOrder(model=net, args=args, train_dataset=data, optimizers=given)
    with_fp16_on_cpu(trainer.accelerator, cell)
    trainer.train()
    return net


def arguments_for(cell: Cell) -> dict[str, Any]:
    return {
        "output_dir": tempfile.gettempdir(),  # nothing is written
        "learning_rate": SGD["lr"],
        "weight_decay": SGD["weight_decay"],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": cell.micro_batches,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "bf16": cell.precision == "bf16",
        "fp16": cell.precision == "fp16",
        "torch_compile_backend": None if cell.compile == "no" else cell.compile,
        "use_cpu": True,
        "ddp_backend": "gloo" if cell.processes > 1 else None,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def stock_trainer(cell: Cell) -> nn.Module:
    return trained(Trainer, TrainingArguments(**arguments_for(cell)), cell, optimizer=True)


def amp_trainer(cell: Cell) -> nn.Module:
    ball = {f"amp_{name}": value for name, value in cell.ball.items()}
    args = AMPTrainingArguments(**arguments_for(cell), **ball, optim="amp", decay_all_parameters=True)
    return trained(AMPTrainer, args, cell, optimizer=False)


TRAINERS: dict[str, Callable[[Cell], nn.Module]] = {
    "closure": closure,
    "ascend and step": ascend,
    "attach": attached,
    "timm task": timm_task,
    "stock Trainer": stock_trainer,
    "AMPTrainer": amp_trainer,
    "accelerate, attach": accelerate_attached,
    "accelerate, amp_backward": accelerate_window,
}
assert TRAINERS.keys() == HOSTS.keys()


@contextmanager
def own_environment() -> Iterator[None]:
    """transformers leaves settings there for accelerate."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)


def run(cell: Cell) -> Result:
    torch._dynamo.reset()
    counters.clear()
    with own_environment():
        try:
            weights = {name: p.detach().clone() for name, p in TRAINERS[cell.host](cell).named_parameters()}
            return Result(weights, counters["stats"]["unique_graphs"])
        except (RuntimeError, ValueError) as refusal:
            return Result({}, 0, str(refusal))
        finally:
            AcceleratorState._reset_state()
            GradientState._reset_state()


def main(folder: str, compiler: str) -> None:
    torch.set_num_threads(1)
    cells = cells_of(compiler)
    alone = [cell for cell in cells if cell.processes == 1][RANK::WORLD]
    with own_environment():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        results = {tuple(cell): tuple(run(cell)) for cell in alone}
    AcceleratorState._reset_state(reset_partial_state=True)
    dist.init_process_group("gloo")
    results |= {tuple(cell): tuple(run(cell)) for cell in cells if cell.processes == WORLD}
    torch.save(results, Path(folder) / f"{compiler} {RANK}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
