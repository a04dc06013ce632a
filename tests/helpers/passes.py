"""What every ascent policy makes through every door: passes in 20 steps, counted by the samples that go through.

``python tests/helpers/passes.py`` writes the table to PASSES.md; test_ascent_policies.py checks that it is what is
counted.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from ascent_doors import DOORS, Seen, train
from ascent_reference import RULES, STEPS, Batch
from problems import small_batches
from repository import RECORDS

PAGE = RECORDS / "PASSES.md"
POLICIES = list(RULES)
OWNS_BATCH = ("closure", "ascend")  # doors that cannot be told a part of the batch


def takes_part(ascent: str) -> bool:
    """Whether a policy ascends on a part of the batch."""
    return "subset" in ascent or "split" in ascent


def windows_of(micro_batches: int, size: int = 8) -> list[list[Batch]]:
    """The micro-batches of every step."""
    every = iter(small_batches(STEPS * micro_batches, size, torch.float64))
    return [[next(every) for _ in range(micro_batches)] for _ in range(STEPS)]


@cache
def seen_of(door: str, policy: tuple[str, str | None], micro_batches: int) -> Seen:
    """A training with a policy through a door; of one where both are given again, what was seen the first time."""
    return train(door, *policy, windows_of(micro_batches))


def table() -> str:
    """The table, with what it shows."""
    heads = ["`ascent=`", *DOORS]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for policy in POLICIES:
        ascent, parameters = policy
        cells = [f'`"{ascent}"`' + (f' with `parameters="{parameters}"`' if parameters else "")]
        for door in DOORS:
            if takes_part(ascent) and door in OWNS_BATCH:
                cells.append("refused")
            else:
                seen = seen_of(door, policy, 1)
                cells.append(f"{sum(seen.forwards):g} + {sum(seen.backwards):g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([_HEAD, *lines])


_HEAD = f"""\
# The passes of every ascent policy

Made by `python tests/helpers/passes.py`; do not edit. Forward + backward passes over the batch in {STEPS} steps with
`inner_iter=1`, counted by hooks in the model from the samples that go through it; the base optimizer alone makes
{STEPS} + {STEPS}. `test_ascent_policies.py` compares each step's with what the policy promises and with
`optimizer.passes`, and the weights after it with a float64 reference.

"closure" is `step(closure)`; "ascend" a loop with `backward(); ascend(); backward(); step()` in it, which makes its
pass whether the policy wants it or not; "passes" one over `ascent_passes()`. timm's tasks and a stock `Trainer` are
attached.
"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # "ascend" is told of passes in vain
    PAGE.write_text(table() + "\n")
