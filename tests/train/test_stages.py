"""Test what is there when the main job is killed or cannot write, at each of its stages; STAGES.md is the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import run_scripts
from repository import HELPERS
from stages import FULL_ON, INTERRUPTED, KILLED, PAGE, STAGES, table

ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]  # after the heads
SOME = ["model.safetensors: killed", "all_results.json: disk full from here on", "ledger.jsonl: killed"]
SOME += ["loading the best checkpoint: fails"]


def test_some_stages_are_as_the_table_says(tmp_path: Path) -> None:
    (done,) = run_scripts(HELPERS / "stages.py", SOME, tmp_path, [{}])
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert len(rows) == len(SOME)
    assert set(rows) <= set(ROWS), done.stdout


@pytest.mark.slow
def test_all_stages_are_as_the_table_says() -> None:
    assert PAGE.read_text() == table() + "\n"


def test_the_table_promises_that_nothing_is_lost() -> None:
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in ROWS]
    assert [(stage, failure) for stage, failure, *_ in cells] == [(s, f) for s, fs in STAGES.items() for f in fs]
    for stage, failure, code, said, left, then in cells:
        assert then == "equal", stage
        assert "in part" not in left or stage == "a line of metrics.jsonl", "which the next run writes anew"
        assert "Traceback" not in said
        if failure == INTERRUPTED:
            assert code == "130"
        elif failure == KILLED:
            assert code.startswith("SIG")
        elif failure == FULL_ON:
            assert code == "1"
        if list(STAGES).index(stage) > list(STAGES).index("model.safetensors"):
            assert left.startswith(("all", "model.safetensors")), "the weights come first"
