"""Test jobs of several processes of which one fails after the training: the launcher ends, the rest is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from main_job import QUICK
from repository import HELPERS, ROOT

FIGURES = {"run.json", "ledger.jsonl"}
ALL = {"model.safetensors", "trainer_state.json", "all_results.json", "README.md", *FIGURES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "step", "error", "left", "told"),
    [
        (
            0,
            "the final test",
            "MemoryError",
            ALL - FIGURES,
            "error: the final test failed: MemoryError: of this process; ",
        ),
        (
            0,
            "the test on corrupted images",
            "MemoryError",
            ALL - FIGURES,
            "error: the test on corrupted images failed: MemoryError: of this process; ",
        ),
        (0, "README.md", "OSError", ALL - {"README.md"}, "error: could not save README.md in "),
        (0, "model.safetensors", "OSError", ALL - {"model.safetensors"}, "error: could not save model.safetensors in "),
        (1, "the final test", "MemoryError", {"model.safetensors"}, "error: the final test failed: MemoryError: of th"),
        (1, "the final test", "SIGKILL", {"model.safetensors"}, ""),
        (1, "the test on corrupted images", "SIGKILL", {"model.safetensors", "trainer_state.json"}, ""),
    ],
)
def test_one_process_that_fails_after_the_training_ends_all(
    rank: int, step: str, error: str, left: set[str], told: str, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    failing = [str(HELPERS / "failing_stage.py"), str(rank), step, error]
    job = [*QUICK, "--num_train_epochs", "1", "--output_dir", str(tmp_path), "--ledger", str(tmp_path / "ledger.jsonl")]
    job += ["--corrupted_test_images", "20"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, *failing, *job]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1, done.stderr
    assert left <= {path.name for path in tmp_path.iterdir()}
    assert not (ALL - left - {"trainer_state.json", "all_results.json", "README.md"}) & {
        p.name for p in tmp_path.iterdir()
    }
    assert told in done.stderr
    assert "results.py" not in done.stderr, "no traceback"
