"""`train.py` as it is, with its Trainer, data, log and checkpoints, against the bare passes of the same model."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers.trainer
from torch.nn import functional as F
from transformers import TrainerCallback

from amp_plugin import AMP, ExtraPasses
from amp_plugin.train.fast import fast_settings
from benchmarks.rows import Row, timed
from benchmarks.step import SGD_ARGS, problem
from benchmarks.turns import Contestant, Turn, take_turns

SIZES = ("0.3M", "11.2M")
BATCH_SIZE = 50
STEPS = 10  # of a turn, with one log and one checkpoint; the published settings have 1,000 steps between those


def bare_loop(turn: Turn, model_args: dict[str, Any], arithmetic: dict[str, Any]) -> None:
    """The two passes, the ascent and the base optimizer's step, on a batch that is always there."""
    model, (images, labels) = problem(model_args, BATCH_SIZE)
    if arithmetic.get("channels_last"):
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if arithmetic.get("torch_compile"):
        model.compile()
    optimizer, passes = AMP(model.parameters(), **SGD_ARGS), ExtraPasses(model)

    def forward_and_backward() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bool(arithmetic.get("bf16"))):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    while True:
        turn()
        for _ in range(STEPS):
            with passes.clean():
                forward_and_backward()
            optimizer.ascend()
            with passes.extra():
                forward_and_backward()
            optimizer.step()
            optimizer.zero_grad()


def recipe_loop(turn: Turn, options: list[str]) -> None:
    """`train.py` with these options."""
    from amp_plugin.train import job

    class OnSteps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % STEPS == 0:
                turn()

    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(OnSteps)
    job.main(options)


def cell(size: str, model_args: dict[str, Any], threads: int, seconds: float, output_dir: str) -> list[Row]:
    """Images a second of one model, as it is and with --fast; which also is compared with compiling on top of it."""
    fast = fast_settings(use_cpu=not torch.accelerator.is_available())
    options = [
        "--optim",
        "amp",
        "--model_kwargs",
        json.dumps(model_args),
        "--augment",
        "plain",
        "--disable_tqdm",
        "true",
    ]
    options += ["--max_steps", "1000000", "--eval_strategy", "no", "--cpu_threads", str(threads)]
    for what in ("logging", "save"):
        options += [f"--{what}_strategy", "steps", f"--{what}_steps", str(STEPS)]

    def bare(arithmetic: dict[str, Any]) -> Contestant:
        return Contestant(bare_loop, {"model_args": model_args, "arithmetic": arithmetic})

    def recipe(name: str, *more: str) -> Contestant:
        return Contestant(recipe_loop, {"options": [*options, "--output_dir", f"{output_dir}/{name}", *more]})

    contestants = {
        "bare passes": bare({}),
        "bare passes, fast": bare(fast),
        "bare passes, fast and compiled": bare({**fast, "torch_compile": True}),
        "train.py": recipe("recipe"),
        "train.py --fast": recipe("recipe-fast", "--fast"),
    }
    results = take_turns(contestants, seconds=seconds, min_rounds=5, max_rounds=20, warm_up=1, threads=threads)
    rates = {name: [STEPS * BATCH_SIZE / t for t in r.seconds] for name, r in results.items()}
    pairs = [
        ("train.py", "bare passes"),
        ("train.py --fast", "bare passes, fast"),
        ("bare passes, fast", "bare passes"),
        ("bare passes, fast and compiled", "bare passes"),
    ]
    case = f"{size} parameters, batch {BATCH_SIZE}"
    return [timed("Recipe", case, name, base, rates[name], rates[base], "images/s") for name, base in pairs]
