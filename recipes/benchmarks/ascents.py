"""What a step of every cheaper mode of AMP takes, against one of the base optimizer alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from reproduction.methods import methods
from reproduction.trade_off import SECTION
from torch.nn import functional as F

from amp_plugin import AMP, LossModule, attach
from benchmarks.rows import Row, timed
from benchmarks.step import SGD_ARGS, Problem, architecture, plain_loop, problem
from benchmarks.turns import Turn, take_turns

BASELINE = "SGD"
STEPS = 4  # of a turn, which is a whole training to the policies: each makes all that it ever does
# Those of the sweep, and the ball of the normalisation layers.
MODES: dict[str, dict[str, Any]] = {
    **{m.ascent: {"ascent": m.ascent} for m in methods().values() if m.ascent is not None},
    'parameters="norm"': {"parameters": "norm"},
}


def attached_loop(turn: Turn, make: Problem, **settings: Any) -> None:
    """``loss.backward(); optimizer.step()`` with AMP attached, from the policy's first step on in every turn."""
    model, batch = make()
    module = LossModule(architecture(model), F.cross_entropy)
    optimizer = AMP(module.named_parameters(), **SGD_ARGS, **settings)
    optimizer.total_steps = STEPS
    attach(optimizer, module)
    while True:
        turn()
        for group in optimizer.param_groups:
            if "ascent_step" in group:
                group["ascent_step"] = 0
        for _ in range(STEPS):
            module(*batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()


def sgd_loop(turn: Turn, make: Problem) -> None:
    """As many steps of SGD."""
    steps = 0

    def every_fourth() -> None:
        nonlocal steps
        if steps % STEPS == 0:
            turn()
        steps += 1

    plain_loop(every_fourth, make)


def times(size: str, model_args: dict[str, Any], batch_size: int, seconds: float) -> list[Row]:
    """The time of a step of one model and batch size, in every mode; all train the same model on the same batch."""
    same = problem(model_args, batch_size)
    loops = {BASELINE: partial(sgd_loop, make=lambda: same)}
    loops |= {name: partial(attached_loop, make=lambda: same, **mode) for name, mode in MODES.items()}
    results = take_turns(loops, seconds=seconds, min_rounds=4, max_rounds=60, warm_up=1)
    milliseconds = {name: [1e3 * t / STEPS for t in some] for name, some in results.items()}
    case = f"{size} parameters, batch {batch_size}"
    return [timed(SECTION, case, name, BASELINE, milliseconds[name], milliseconds[BASELINE], "ms") for name in MODES]
