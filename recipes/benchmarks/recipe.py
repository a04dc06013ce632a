"""`train.py` with its Trainer, data, logs, tests and checkpoints, against the bare passes of its model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers.trainer
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from amp_plugin import AMP, ExtraPasses
from amp_plugin.train import job
from amp_plugin.train.defaults import fast_settings
from benchmarks.rows import Row
from benchmarks.step import SGD_ARGS, architecture, case, problem
from benchmarks.turns import Loop, Turn, Ways, compare

# Steps of a turn, which has one log, one test and one checkpoint; the published settings have one in 1,000 steps.
SIZES = {"0.3M": 50, "11.2M": 10}
BATCH_SIZE, TEST_IMAGES = 50, 500
BARE = "bare passes"
Arithmetic = dict[str, Any]


def bare_loop(
    turn: Turn, model_of: Callable[[], nn.Module], steps: int, arithmetic: Arithmetic, tests: bool = False
) -> None:
    """Make the passes, the ascent and the base optimizer's step on one batch, and, if asked for, a test's passes."""
    model = model_of()
    device = next(model.parameters()).device
    layout = torch.channels_last if arithmetic.get("channels_last") else torch.contiguous_format
    images, test_images = (
        torch.randn(n, 3, 32, 32, device=device).to(memory_format=layout) for n in (BATCH_SIZE, TEST_IMAGES)
    )
    labels = torch.randint(10, (BATCH_SIZE,), device=device)
    optimizer, passes = AMP(model.parameters(), **SGD_ARGS), ExtraPasses(model)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bool(arithmetic.get("bf16")))

    def forward_and_backward() -> None:
        with autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    while True:
        turn()
        model.train()
        for _ in range(steps):
            with passes.clean():
                forward_and_backward()
            optimizer.ascend()
            with passes.perturbed():
                forward_and_backward()
            optimizer.step()
            optimizer.zero_grad()
        if tests:
            model.eval()
            with torch.no_grad(), autocast():
                model(test_images)


def recipe_loop(turn: Turn, options: list[str], steps: int, models: list[nn.Module]) -> None:
    """Run `train.py` with these options; its model is appended to `models` before the first turn."""

    class OnSteps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                models.append(architecture(kwargs["model"]))
            if state.global_step % steps == 0:
                turn()

    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(OnSteps)
    try:
        job.main(options)
    finally:
        callbacks.remove(OnSteps)


def overhead(
    size: str, model_args: dict[str, Any], threads: int, seconds: float, output_dir: str
) -> Iterator[list[Row]]:
    """Compare the images a second of train.py and of the bare passes, without and with --fast."""
    steps = SIZES[size]
    told = "--optim amp --augment plain --disable_tqdm true --max_steps 1000000"
    told += f" --per_device_train_batch_size {BATCH_SIZE} --per_device_eval_batch_size {TEST_IMAGES}"
    told += "".join(f" --{what}_strategy steps --{what}_steps {steps}" for what in ("logging", "eval", "save"))
    options = [*told.split(), "--cpu_threads", str(threads), "--model_kwargs", json.dumps(model_args)]
    if not torch.accelerator.is_available():
        options += ["--use_cpu", "true"]
    for more, arithmetic in (([], {}), (["--fast"], _fast())):
        models: list[nn.Module] = []
        where = ["--output_dir", f"{output_dir}/recipe{''.join(more)}"]
        recipe = partial(recipe_loop, options=[*options, *more, *where], steps=steps, models=models)
        bare = partial(bare_loop, model_of=models.pop, steps=steps, arithmetic=arithmetic, tests=True)
        yield _compare(size, {" ".join(["train.py", *more]): (recipe, BARE), BARE: (bare, None)}, steps, seconds)


def arithmetic(size: str, model_args: dict[str, Any], seconds: float) -> list[Row]:
    """Compare the images a second of the bare passes: what --fast gains, and what compiling on top of it would."""
    fast = _fast()

    def model_of(choice: Arithmetic) -> nn.Module:
        model = architecture(problem(model_args, 1)[0])
        if choice.get("channels_last"):
            model.to(memory_format=torch.channels_last)
        if choice.get("torch_compile"):
            model.compile()
        return model

    def loop(choice: Arithmetic) -> Loop:
        return partial(bare_loop, model_of=partial(model_of, choice), steps=1, arithmetic=choice)

    ways: Ways = {
        BARE: (loop({}), None),
        f"{BARE}, fast": (loop(fast), BARE),
        f"{BARE}, fast and compiled": (loop({**fast, "torch_compile": True}), BARE),
    }
    return _compare(size, ways, 1, seconds)


def _fast() -> Arithmetic:
    return fast_settings(use_cpu=not torch.accelerator.is_available())


def _compare(size: str, ways: Ways, steps: int, seconds: float) -> list[Row]:
    where, images = case(size, BATCH_SIZE), steps * BATCH_SIZE
    return compare("Recipe", where, ways, "images/s", images, seconds=seconds, rounds=(3, 20))
