"""Trains a small net in two processes with FSDP2 as accelerate prepares it, for test_fsdp.py; started as torchrun does.

`accelerate_fsdp.py <folder> <cpu or cuda>` trains all cases; every process writes `<folder>/<rank>.pt`: by case what it
has after each step. accelerate leaves FSDP out on a CPU. There its state is told of GPUs, and all else is its own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from leaving import leave
from problems import small_batches
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, amp_backward, attach

WORLD, SIZE, STEPS, HALF = 2, 8, 6, 3
CUDA = sys.argv[2:3] == ["cuda"]
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
BALL: dict[str, Any] = {"epsilon": 0.1, "inner_lr": 0.5}
CLIP = 0.5
Batch = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """One training."""

    door: str = "AMPTrainer"
    ascent: str = "full"
    parameters: str | None = None
    micro_batches: int = 1
    precision: str = "fp64"
    clip: float = 0.0
    keeps: bool = False  # whether FSDP keeps the weights after every backward pass but the last
    each: bool = False  # whether gradients are synchronised in every micro-batch
    checkpoint: str = ""  # type of the state dict in which the training is interrupted
    reshard: bool = True  # after a forward pass
    epsilon: float = BALL["epsilon"]
    fails_in: int = -1  # call of the net in the second step

    def __str__(self) -> str:
        others = [f"{k}={v}" for k, v in self._asdict().items() if k != "door" and v != self._field_defaults[k]]
        return " ".join([self.door, *others])

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32


BOTH = ("AMPTrainer", "amp_backward")
CASES = [
    *(Case(door, reshard=door == "attach") for door in (*BOTH, "attach")),
    *(Case(door, micro_batches=2, clip=CLIP) for door in BOTH),
    *(Case(door, micro_batches=2, each=True) for door in (*BOTH, "attach")),
    *(Case(door, part, micro_batches=k) for door in BOTH for part in ("subset(0.5)", "split(0.25)") for k in (1, 2)),
    Case("attach", micro_batches=2, each=True, keeps=True),
    *(Case(door, "stale") for door in (*BOTH, "attach")),
    *(Case(door, parameters="^norm", micro_batches=1 + (door in BOTH)) for door in (*BOTH, "attach")),
    Case("AMPTrainer", micro_batches=2, precision="fp32"),
    *(Case(door, micro_batches=1 + (door in BOTH), precision="bf16") for door in (*BOTH, "attach")),
    Case("amp_backward", micro_batches=2, precision="fp16"),
    *(Case(door, micro_batches=2, precision="bf16", epsilon=0.0) for door in ("amp_backward", "plain")),
    *(Case(door, micro_batches=2, checkpoint=kind) for door in BOTH for kind in ("FULL", "SHARDED")),
    *(Case("amp_backward", micro_batches=2, fails_in=call) for call in range(4)),
    *(Case("AMPTrainer", micro_batches=2, fails_in=call) for call in (1, 3)),
]


class Net(nn.Module):
    """Has layers that FSDP shards by themselves, a rest that the root holds, and parts of uneven sizes."""

    main_input_name = "pixel_values"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(192, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 4)
        self.scale = nn.Parameter(torch.ones(3))
        self.calls, self.fails_in = 0, -1
        self.to(dtype)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        self.calls += 1
        if self.calls - 1 == self.fails_in:
            raise KeyboardInterrupt
        hidden = F.silu(self.norm(self.first(pixel_values.flatten(1))))
        logits = self.second(hidden) * self.scale.prod()
        return logits if labels is None else {"loss": F.cross_entropy(logits.to(self.scale), labels), "logits": logits}

    def get_input_embeddings(self) -> None:
        """For accelerate."""

    def num_parameters(self, **kwargs: Any) -> int:
        """For the Trainer's count of operations."""
        return 1


def batches(case: Case) -> list[list[list[Batch]]]:
    """By step, micro-batch and process, in the order in which the Trainer's loader deals them out."""
    every = iter(small_batches(STEPS * case.micro_batches * WORLD, SIZE, case.dtype))
    return [[[next(every) for _ in range(WORLD)] for _ in range(case.micro_batches)] for _ in range(STEPS)]


def pretend() -> None:
    """Let accelerate find GPUs; the device stays the CPU."""
    if not CUDA:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(net: nn.Module) -> dict[str, Tensor]:
    """The weights, of which each process has a part."""
    for part in net.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    assert all(isinstance(p, DTensor) for p in net.parameters())
    return {name: p.full_tensor().detach().clone().cpu() for name, p in net.named_parameters()}  # type: ignore[operator]


@torch.no_grad()
def look(net: nn.Module, batch: Batch) -> Tensor:
    """The logits at the weights that the net computes with; the root keeps what it gathers here."""
    net.eval()
    logits: Tensor = net(batch[0].to(next(net.parameters()).device))
    net.train()
    return logits.float().cpu()


# --- loops of one's own


def accelerator_for(case: Case) -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    PartialState(cpu=not CUDA)
    pretend()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=case.reshard,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        state_dict_type=f"{case.checkpoint or 'FULL'}_STATE_DICT",
        mixed_precision_policy="fp16" if case.precision == "fp16" else None,
    )
    accumulation = GradientAccumulationPlugin(num_steps=case.micro_batches, sync_each_batch=case.each)
    accelerator = Accelerator(
        mixed_precision="bf16" if case.precision == "bf16" else "no",
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=accumulation,
    )
    assert accelerator.is_fsdp2
    return accelerator


class Loop:
    """A loop with accelerate."""

    def __init__(self, case: Case, saved: str | None = None) -> None:
        self.case, self.accelerator = case, accelerator_for(case)
        if case.precision == "fp16":  # which accelerate has no scaler for on a CPU
            self.accelerator.scaler = torch.amp.GradScaler(self.accelerator.device.type, init_scale=2.0**10)
        net = Net(case.dtype)
        options = {**SGD, **BALL, "epsilon": case.epsilon}
        self.amp = AMP(net.parameters(), **options, ascent=case.ascent, parameters=case.parameters)
        if case.door == "plain":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), **SGD)
        else:
            optimizer = self.amp
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        if saved:
            self.accelerator.load_state(saved)
        look(self.net, batches(case)[0][0][0])
        if case.door == "attach":
            attach(self.optimizer, self.net)

    def step(self, window: Sequence[Batch]) -> None:
        window = [(x.to(self.accelerator.device), y.to(self.accelerator.device)) for x, y in window]
        if self.case.door == "amp_backward":
            amp_backward(self.accelerator, self.net, self.optimizer, lambda batch: self.net(*batch)["loss"], window)
            self.update()
        else:
            for k, batch in enumerate(window, 1):
                self.net.set_reshard_after_backward(not self.case.keeps or k == len(window))
                with self.accelerator.accumulate(self.net):
                    self.accelerator.backward(self.net(*batch)["loss"])
                    if k == len(window):
                        self.update()

    def update(self) -> None:
        if self.case.clip:
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def by_loop(case: Case, folder: Path) -> dict[str, Any]:
    loop, rank = Loop(case), dist.get_rank()
    seen: dict[str, Any] = {"weights": [], "passes": []}
    for k, step in enumerate(batches(case)):
        if case.checkpoint and k == HALF:
            saved = str(folder / "loop" / case.checkpoint)
            loop.accelerator.save_state(saved)
            loop = Loop(case, saved)
        window = [of_ranks[rank] for of_ranks in step]
        if case.fails_in >= 0 and k == 1:
            before, at_theta = whole(loop.net), look(loop.net, window[0])
            loop.net.calls, loop.net.fails_in = 0, case.fails_in
            try:
                loop.step(window)
            except KeyboardInterrupt:
                loop.net.fails_in = -1
                seen["clean"] = torch.equal(look(loop.net, window[0]), at_theta)
                seen["clean"] &= all(torch.equal(before[name], p) for name, p in whole(loop.net).items())
                continue
        loop.step(window)
        seen["weights"].append(whole(loop.net))
        seen["passes"].append(loop.amp.passes)
        look(loop.net, window[0])
    return seen


# --- the Trainer


class Watch(TrainerCallback):
    def __init__(self, case: Case, seen: dict[str, Any]) -> None:
        self.case, self.seen = case, seen

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        look(model, batches(self.case)[0][0][0])

    def on_step_end(self, *args: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        amp = optimizer.optimizer
        self.seen["weights"].append(whole(model))
        self.seen["passes"].append(amp.passes)
        assert not amp.perturbed
        look(model, batches(self.case)[0][0][0])


class InOrder(AMPTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


@contextmanager
def stopped_after(steps: int) -> Iterator[TrainerCallback]:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == steps

    yield Stop()


def trainer_for(case: Case, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> AMPTrainer:
    data = [
        {"pixel_values": x, "labels": y}
        for step in batches(case)
        for micro in step
        for batch in micro
        for x, y in zip(*batch, strict=True)
    ]
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trainer" / (case.checkpoint or "none")),
        "optim": "amp",
        "learning_rate": SGD["lr"],
        "weight_decay": SGD["weight_decay"],
        "decay_all_parameters": True,
        "amp_epsilon": case.epsilon,
        "amp_inner_lr": BALL["inner_lr"],
        "amp_ascent": case.ascent,
        "amp_parameters": case.parameters,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": case.micro_batches,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": case.each}},
        "max_steps": STEPS,
        "max_grad_norm": case.clip,
        "bf16": case.precision == "bf16",
        "use_cpu": not CUDA,
        "ddp_backend": None if CUDA else "gloo",
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": case.reshard,
            "transformer_layer_cls_to_wrap": ["Linear"],
            "state_dict_type": f"{case.checkpoint or 'FULL'}_STATE_DICT",
        },
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    args = AMPTrainingArguments(**{**settings, **options})
    pretend()
    return InOrder(model=Net(case.dtype), args=args, train_dataset=data, callbacks=callbacks)


def by_trainer(case: Case, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {"weights": [], "passes": []}
    resume = None
    if case.checkpoint:
        with stopped_after(HALF) as stop:
            first = trainer_for(case, folder, [Watch(case, seen), stop], save_strategy="steps", save_steps=HALF)
            first.train()
            resume = f"{first.args.output_dir}/checkpoint-{HALF}"
    trainer = trainer_for(case, folder, [Watch(case, seen)])
    assert trainer.accelerator.is_fsdp2
    if case.fails_in >= 0:
        net: Any = trainer.model
        theta = {name: p.detach().clone() for name, p in net.named_parameters()}
        net.calls, net.fails_in = -1, case.fails_in  # one look comes before
        try:
            trainer.train()
        except KeyboardInterrupt:
            net.fails_in = -1
            seen["clean"] = torch.equal(
                look(net, batches(case)[0][0][0]), look(Net(case.dtype), batches(case)[0][0][0])
            )
            seen["clean"] &= all(torch.equal(theta[name], p) for name, p in whole(net).items())
        return seen
    trainer.train(resume_from_checkpoint=resume)
    return seen


RUNS: dict[str, Callable[[Case, Path], dict[str, Any]]] = {"AMPTrainer": by_trainer}


# --- what is refused


def refusals(folder: Path) -> dict[str, str]:
    """The messages."""
    said: dict[str, str] = {}
    for name, options in {
        "FSDP1": {"fsdp_config": {"version": 1, "sync_module_states": False}},
        "offload": {"fsdp_config": {"version": 2, "cpu_offload": True}},
        "amp_sync_ascent": {"amp_sync_ascent": False},
        "amp_capture": {"amp_capture": True},
    }.items():
        try:
            trainer_for(Case(), folder, [], **options)
        except ValueError as error:
            said[f"AMPTrainer, {name}"] = str(error)
    loop = Loop(Case("amp_backward"))
    window = [of_ranks[dist.get_rank()] for of_ranks in batches(Case())[0]]
    plugin = loop.accelerator.state.fsdp_plugin
    for name, options in {"sync_ascent": {"sync_ascent": False}, "offload": {}, "FSDP1": {}}.items():
        plugin.cpu_offload = CPUOffloadPolicy() if name == "offload" else OffloadPolicy()
        plugin.fsdp_version = 1 if name == "FSDP1" else 2
        try:
            amp_backward(loop.accelerator, loop.net, loop.optimizer, lambda b: loop.net(*b)["loss"], window, **options)
        except ValueError as error:
            said[f"amp_backward, {name}"] = str(error)
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    if not CUDA:
        dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    results: dict[Any, Any] = {}
    for case in CASES:
        results[str(case)] = RUNS.get(case.door, by_loop)(case, root)
    results["refusals"] = refusals(root)
    torch.save(results, root / f"{dist.get_rank()}.pt")
    leave()
