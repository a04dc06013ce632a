"""The record of runs that were killed on purpose: failure_runs.jsonl, and FAILURES.md, which is made of it.

python tests/helpers/failure_record.py    # makes FAILURES.md again
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from repository import RECORDS

RECORD = RECORDS / "failure_runs.jsonl"
REPORT = RECORDS / "FAILURES.md"

_HEAD = """# Training that was killed on purpose

Made by `tests/helpers/failure_record.py` from `failure_runs.jsonl`; do not edit. Each row is a job of
`recipes/train.py`, on the CPU with dropout and drop-path, which was killed with SIGKILL and
continued with `--resume_from_checkpoint last`.
*Equal* means: at its end the SHA-256 of the weights, the optimizer's state, the schedule and every process's random
number generators were those of the same job left alone. To run the jobs again and add to the record:

    AMP_PLUGIN_RECORD_FAILURES=1 python -m pytest tests/train/test_failures.py -m ""

"""
_COLUMNS = ("date", "commit", "job", "kills", "in a save", "in a step", "restarts", "steps", "repeated", "end")


def record(**run: Any) -> None:
    """Append one job to the record, and make the report again."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(describe, cwd=RECORD.parent, capture_output=True, text=True, check=False).stdout.strip()
    entry = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **run,
    }
    with RECORD.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    REPORT.write_text(render())


def render() -> str:
    """FAILURES.md as it should be."""
    runs = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    table: list[Sequence[object]] = [_COLUMNS, ["---"] * len(_COLUMNS)]
    for run in runs:
        where = [kill["where"] for kill in run["kills"]]
        in_save, in_step = sum("save" in w for w in where), sum(w in ("ascent", "descent") for w in where)
        end = "equal" if run["bits"] == run["bits_left_alone"] else "**different**"
        job = f"{run['job']}, {run['processes']} process{'es' if run['processes'] > 1 else ''}"
        figures = (len(where), in_save, in_step, run["restarts"], run["steps"], run["steps_repeated"])
        table.append((run["date"][:10], f"`{run['commit']}`", job, *figures, end))
    kills = sum(len(run["kills"]) for run in runs)
    equal = sum(run["bits"] == run["bits_left_alone"] for run in runs)
    summary = f"{len(runs)} jobs, {kills} kills; {equal} of {len(runs)} ended equal.\n\n"
    return _HEAD + summary + "\n".join(f"| {' | '.join(map(str, row))} |" for row in table) + "\n"


if __name__ == "__main__":
    REPORT.write_text(render())
