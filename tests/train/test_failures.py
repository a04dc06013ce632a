"""Test that training that is killed with SIGKILL, again and again, ends with the bits of training that is not.

The slow tests keep a record when AMP_PLUGIN_RECORD_FAILURES is set: failure_runs.jsonl, and FAILURES.md made of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failure_record import REPORT, record, render
from launch import run_processes
from repository import HELPERS, ROOT
from torch import Tensor

from amp_plugin.train import job as train
from amp_plugin.trainer.checkpoints import SaveError

PROGRAM = HELPERS / "failing_train.py"
MODEL = {"width": 4, "layers": [1, 1, 1, 1], "drop_rate": 0.3, "drop_path_rate": 0.2}
JOB = [
    *("--use_cpu", "true", "--cpu_threads", "1", "--model_kwargs", json.dumps(MODEL), "--augment", "cutout"),
    *("--per_device_train_batch_size", "10", "--eval_strategy", "no", "--save_strategy", "steps"),
    *("--resume_from_checkpoint", "last"),
]


def processes(count: int, restarts: int = 3) -> list[str]:
    options = ["--standalone", "--nproc_per_node", str(count), "--max_restarts", str(restarts)]
    return ["-m", "torch.distributed.run", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


class Job:
    """Run a job in a folder of its own, which gets out/ with what the job saves, and a diary."""

    def __init__(self, folder: Path, *arguments: str, launcher: Sequence[str] = (), plan: Sequence[Any] = ()) -> None:
        folder.mkdir()
        self.folder, self.diary = folder, folder / "diary"
        (folder / "diary.plan").write_text(json.dumps(plan))
        self.arguments = [*launcher, str(PROGRAM), "diary", *JOB, "--output_dir", "out", *arguments]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, which is the same every time."""
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, *self.arguments], cwd=self.folder, env=environment(), stdout=log, stderr=log
            )

    def run(self) -> int:
        process = self.start()
        try:
            return process.wait(timeout=600)
        finally:
            process.terminate()  # torchrun ends its processes then
            process.wait()

    def run_alone(self) -> None:
        """Run once in two processes, without a launcher that would start others after a failure."""
        program, *arguments = self.arguments[self.arguments.index(str(PROGRAM)) :]
        run_processes(2, program, *arguments, folder=self.folder, variables=environment())

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def entries(self, what: str) -> list[dict[str, Any]]:
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["what"] == what]

    def bits(self) -> dict[str, str]:
        """Hash the model, and the last checkpoint's weights, optimizer, schedule and random numbers."""
        last = max((self.folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        files = [*sorted(last.glob("*.pt")), *sorted(last.glob("*.pth"))]
        bits = {f"{last.name}/{file.name}": digest(torch.load(file, weights_only=False)) for file in files}
        for file in (last / "model.safetensors", self.folder / "out" / "model.safetensors"):
            bits[str(file.relative_to(self.folder / "out"))] = hashlib.sha256(file.read_bytes()).hexdigest()
        return bits

    def check(self, alone: Job, kills: Sequence[dict[str, Any]], **facts: Any) -> None:
        """Check that the job ended as the one that was left alone; record it if that was asked for."""
        steps = [entry["step"] for entry in self.entries("step")]
        if os.environ.get("AMP_PLUGIN_RECORD_FAILURES"):
            record(
                command=shlex.join(["python", *self.arguments]).replace(f"{ROOT}/", ""),
                kills=kills,
                restarts=len(self.entries("start")) - 1,
                steps=len(set(steps)),
                steps_repeated=len(steps) - len(set(steps)),
                bits=self.bits(),
                bits_left_alone=alone.bits(),
                **facts,
            )
        assert self.bits() == alone.bits()
        assert not (self.folder / "out" / "_incomplete").exists()


def digest(value: Any) -> str:
    """Hash all that nested dicts and lists hold, to the bit."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), list(value.shape), value.reshape(-1).view(torch.uint8).tolist()]
        if isinstance(value, np.ndarray):
            return [str(value.dtype), value.tolist()]
        if isinstance(value, dict):
            return [[str(name), plain(v)] for name, v in value.items()]
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)

    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()


def test_two_processes_of_which_one_is_killed_continue_by_themselves(tmp_path: Path) -> None:
    """One process dies in the middle of a step and of an epoch; the last checkpoint is one step behind."""
    command = ["--train_images", "60", "--num_train_epochs", "2", "--save_steps", "2"]
    plan = [{"rank": 1, "step": 3, "where": "descent"}]
    alone = Job(tmp_path / "alone", *command)
    killed = Job(tmp_path / "killed", *command, launcher=processes(2), plan=plan)
    alone.run_alone()
    assert killed.run() == 0, killed.log()
    assert [entry["step"] for entry in killed.entries("start")] == [0, 2]
    killed.check(alone, killed.entries("kill"), job="amp", processes=2)


def test_the_report_is_that_of_the_record() -> None:
    assert REPORT.read_text() == render()
    assert "different" not in REPORT.read_text()


def test_an_unwritable_output_folder_is_found_before_the_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"cannot write to '.*file/out': Not a directory; choose another output_dir"):
        train.main(["--output_dir", str(tmp_path / "file" / "out"), "--dataset", "unknown", "--use_cpu", "true"])


# --- many kills

STEP = ("ascent", "descent")
JOBS = {
    "amp": ("--optim", "amp"),
    "amp, 2 accumulation steps, 2 ascents": ("--gradient_accumulation_steps", "2", "--amp_inner_iter", "2"),
    "amp_adamw_torch, 2 data workers": (
        *("--optim", "amp_adamw_torch", "--learning_rate", "0.01", "--dataloader_num_workers", "2"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_kill_9_at_random_moments(tmp_path: Path, job: str) -> None:
    command = [*JOBS[job], "--train_images", "100", "--num_train_epochs", "8", "--save_steps", "1"]
    alone, killed = (Job(tmp_path / name, *command) for name in ("alone", "killed"))
    assert alone.run() == 0, alone.log()
    seconds = alone.entries("step")[-1]["time"] - alone.entries("start")[0]["time"]
    moments, kills = random.Random(job), []
    while len(kills) < 7:
        process = killed.start()
        while len(killed.entries("start")) <= len(kills) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, seconds / 5))
        assert process.poll() is None, f"it ended after {len(kills)} kills: {killed.log()}"
        process.kill()
        process.wait()
        in_save = (killed.folder / "out" / "_incomplete").exists()
        kills.append({"where": "save" if in_save else "elsewhere"})
    assert killed.run() == 0, killed.log()
    killed.check(alone, kills, job=job, processes=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_an_elastic_job_killed_at_random_points(tmp_path: Path, count: int, seed: int) -> None:
    """Processes die in the middle of a step, in the middle of a save, and again in the middle of a step."""
    command = ["--train_images", "120", "--num_train_epochs", "4", "--save_steps", "2"]
    command = [*command, "--gradient_accumulation_steps", "2"]
    chosen = random.Random(seed)
    plan = [
        {"rank": chosen.randrange(count), "step": chosen.randrange(1, 4), "where": "descent"},
        {"rank": 0, "step": 4, "where": "save", "event": chosen.randrange(25)},
        {"rank": chosen.randrange(count), "step": chosen.randrange(4, 8), "where": chosen.choice(STEP)},
    ]
    alone = Job(tmp_path / "alone", *command, launcher=processes(count))
    killed = Job(tmp_path / "killed", *command, launcher=processes(count), plan=plan)
    assert alone.run() == 0, alone.log()
    assert killed.run() == 0, killed.log()
    assert len(killed.entries("kill")) == len(plan)
    killed.check(alone, killed.entries("kill"), job="amp, 2 accumulation steps", processes=count)


# --- full disks


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_that_cannot_write_ends_all_with_one_error(tmp_path: Path, rank: int) -> None:
    command = ["--train_images", "60", "--num_train_epochs", "2", "--save_steps", "2"]
    alone = Job(tmp_path / "alone", *command, launcher=processes(2, 0))
    full = Job(tmp_path / "full", *command, launcher=processes(2, 0), plan=[{"rank": rank, "step": 4, "where": "full"}])
    assert alone.run() == 0, alone.log()
    assert full.run() == 1
    errors = [line for line in full.log().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: could not save checkpoint-4 in 'out': File too large (")
    assert "The last complete checkpoint is 'out/checkpoint-2'" in errors[0]
    assert "checkpoints.py" not in full.log(), "no traceback"
    (full.folder / "diary.plan").write_text("[]")
    assert full.run() == 0, full.log()
    assert [entry["step"] for entry in full.entries("start")] == [0, 2]
    assert full.bits() == alone.bits()


@pytest.mark.slow
def test_a_full_file_system(tmp_path: Path) -> None:
    """Mount one in a namespace of its own, with room for some of the checkpoints; then make it larger."""
    command = ["--train_images", "60", "--num_train_epochs", "2", "--save_steps", "1", "--save_total_limit", "99"]
    alone, full = (Job(tmp_path / name, *command) for name in ("alone", "full"))
    mount = ["unshare", "--mount", "sh", "-c", 'mkdir -p out && mount -t tmpfs -o size=1200k tmpfs out && "$@"', "sh"]
    if subprocess.run([*mount, "true"], cwd=full.folder, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    run = shlex.join([sys.executable, *full.arguments])
    larger = "mount -o remount,size=20m out"
    script = f"{run}; echo status $?; ls -A out; {larger} && {run} && cp -r out kept && umount out && mv kept/* out"
    done = subprocess.run(
        [*mount, "sh", "-c", script], cwd=full.folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    message = r"error: could not save checkpoint-(\d+) in 'out': No space left on device \([01] MiB free\)\. The last"
    step = int(re.match(message, errors[0])[1])  # type: ignore[index]
    assert f"complete checkpoint is 'out/checkpoint-{step - 1}'; mend this" in errors[0]
    left = done.stdout.partition("status 1\n")[2].splitlines()[: step - 1]
    assert sorted(left) == sorted(f"checkpoint-{n}" for n in range(1, step))
    assert [entry["step"] for entry in full.entries("start")] == [0, step - 1]
    assert alone.run() == 0, alone.log()
    assert full.bits() == alone.bits()
