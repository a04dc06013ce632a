"""Trains a small net with an ascent policy through every door, and sees what each step has done."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from ascent_reference import Batch
from exactness_problem import Net
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments, ExtraPasses, amp_backward, attach

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
BALL: dict[str, Any] = {"epsilon": 0.05, "inner_lr": 0.5}


class CountingNet(Net):
    """Counts the samples that go forward and come back."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.forwards = self.backwards = 0
        self.calls, self.fails_in = 0, -1

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        self.calls += 1
        if self.calls - 1 == self.fails_in:
            raise KeyboardInterrupt
        output = super().forward(pixel_values, labels)
        self.forwards += len(pixel_values)
        output["logits"].register_hook(self._count)
        return output

    def num_parameters(self, **kwargs: Any) -> int:
        """For the Trainer's count of operations: six for each number of the input, for each parameter, in each pass."""
        return 1

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass
class Seen:
    """What there was after each step."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)  # passes over the window, in samples that went through
    backwards: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)  # as the optimizer counts them
    logs: list[dict[str, float]] = field(default_factory=list)
    flos: float = 0.0  # as the Trainer counts them

    def add(self, net: CountingNet, amp: AMP, samples: int) -> None:
        assert not amp.perturbed
        assert all(p.requires_grad for p in net.parameters())
        self.weights.append({name: p.detach().clone() for name, p in net.named_parameters()})
        self.forwards.append(net.forwards / samples)
        self.backwards.append(net.backwards / samples)
        self.passes.append(amp.passes)
        net.forwards = net.backwards = 0


Window = Sequence[Batch]
Step = Callable[[Window], object]


def by_closure(net: nn.Module, amp: AMP) -> Step:
    passes = ExtraPasses(net)

    def step(window: Window) -> None:
        def closure() -> Tensor:
            amp.zero_grad()
            losses = [net(*batch)["loss"] / len(window) for batch in window]
            for loss in losses:
                loss.backward()
            return torch.stack(losses).sum()

        amp.step(closure, passes=passes)

    return step


def by_ascend(net: nn.Module, amp: AMP) -> Step:
    """A loop that was written before there were policies."""

    def step(window: Window) -> None:
        for i in range(2):
            for batch in window:
                (net(*batch)["loss"] / len(window)).backward()
            if i == 0:
                amp.ascend()
        amp.step()
        amp.zero_grad()

    return step


def by_passes(net: nn.Module, amp: AMP) -> Step:
    def step(window: Window) -> None:
        for part in amp.ascent_passes(window):
            for batch in part:
                (net(*batch)["loss"] / len(part)).backward()
        rest = amp.descent_batches(window)
        for batch in rest:
            (net(*batch)["loss"] / len(rest)).backward()
        amp.step()
        amp.zero_grad()

    return step


def by_attach(net: nn.Module, amp: AMP) -> Step:
    attach(amp, net)

    def step(window: Window) -> None:
        for batch in window:
            (net(*batch)["loss"] / len(window)).backward()
        amp.step()
        amp.zero_grad()

    return step


def by_amp_backward(net: nn.Module, amp: AMP) -> Step:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, amp)

    def step(window: Window) -> None:
        amp_backward(accelerator, model, optimizer, lambda batch: model(*batch)["loss"], window)
        optimizer.step()
        optimizer.zero_grad()

    return step


LOOPS: dict[str, Callable[[nn.Module, AMP], Step]] = {
    "closure": by_closure,
    "ascend": by_ascend,
    "passes": by_passes,
    "attach": by_attach,
    "amp_backward": by_amp_backward,
}
DOORS = [*LOOPS, "AMPTrainer"]


def make(
    ascent: str, parameters: str | None, prepare: Callable[[nn.Module], object] = lambda net: None, **kwargs: Any
) -> tuple[CountingNet, AMP]:
    net = CountingNet()
    prepare(net)
    amp = AMP(net.named_parameters(), **{**BALL, **SGD, **kwargs}, ascent=ascent, parameters=parameters)
    return net, amp


def samples_of(windows: Sequence[Window]) -> int:
    """In a window."""
    return sum(len(x) for x, _ in windows[0])


def train(door: str, ascent: str, parameters: str | None, windows: Sequence[Window]) -> Seen:
    """Train in this process, with a policy."""
    if door == "AMPTrainer":
        return train_with_trainer(ascent, parameters, windows)
    net, amp = make(ascent, parameters)
    seen, step = Seen(), LOOPS[door](net, amp)
    for window in windows:
        step(window)
        seen.add(net, amp, samples_of(windows))
    return seen


class InOrder(AMPTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self.seen.logs.append(logs)


class _See(TrainerCallback):
    def __init__(self, net: CountingNet, seen: Seen, samples: int) -> None:
        self.net, self.seen, self.samples = net, seen, samples

    def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.add(self.net, optimizer.optimizer, self.samples)


def train_with_trainer(
    ascent: str, parameters: str | None, windows: Sequence[Window], resume: str | None = None, **kwargs: Any
) -> Seen:
    """Train with `AMPTrainer`; of several processes each is given the batches of all."""
    net = CountingNet()
    batches = [batch for window in windows for batch in window]
    data = [{"pixel_values": x, "labels": y} for batch in batches for x, y in zip(*batch, strict=True)]
    settings: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),  # nothing is written, unless a test asks for it
        "learning_rate": SGD["lr"],
        "weight_decay": SGD["weight_decay"],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": len(batches[0][0]),
        "gradient_accumulation_steps": len(windows[0]),
        "max_steps": len(windows),
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "amp",
        "decay_all_parameters": True,
        **{f"amp_{name}": value for name, value in BALL.items()},
    }
    args = AMPTrainingArguments(**{**settings, **kwargs}, amp_ascent=ascent, amp_parameters=parameters)
    seen = Seen()
    trainer = InOrder(model=net, args=args, train_dataset=data, callbacks=[_See(net, seen, samples_of(windows))])
    trainer.seen = seen
    trainer.train(resume_from_checkpoint=resume)
    seen.flos = trainer.state.total_flos
    return seen
