"""Test that a run does what `--dry_run` announces, and the costs against closed forms."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from main_job import QUICK
from problems import SGD_ARGS
from torch import nn

from amp_plugin import AMP
from amp_plugin.train import costs, job, options, plan


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "more",
    [
        ["--optim", "amp", "--amp_inner_iter", "2", "--gradient_accumulation_steps", "2"],
        ["--optim", "sgd", "--gradient_accumulation_steps", "2", "--max_steps", "3"],
        ["--optim", "amp", "--amp_epsilon", "0", "--num_train_epochs", "1.5"],
        ["--optim", "amp", "--amp_ascent", "window(0.0, 0.5), every(2)", "--amp_parameters", "norm"],
    ],
    ids=["accumulation with an uneven last window", "max_steps without AMP", "nothing perturbed", "an ascent policy"],
)
def test_the_run_makes_the_steps_and_passes_that_were_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*QUICK, *more, "--output_dir", "out"]
    job.main([*command, "--dry_run"])
    announced = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"
    passes = 0
    backward = accelerate.Accelerator.backward

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal passes
        passes += 1
        backward(*args, **kwargs)

    monkeypatch.setattr(accelerate.Accelerator, "backward", counted)
    job.main(command)
    steps = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"]
    assert figure("steps", announced) == steps
    assert figure("passes", announced) == passes
    assert "60 images to train, 500 to test" in announced


def figure(name: str, text: str) -> int:
    found = re.search(rf"^{name} +([\d,]+)", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1].replace(",", ""))


def test_processes_share_the_batches() -> None:
    length = {"gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 3}
    args: Any = SimpleNamespace(train_batch_size=20, dataloader_drop_last=False, world_size=2, **length)
    params = [nn.Parameter(torch.ones(1))]
    assert costs.counts(args, 100, AMP(params)) == costs.Counts(
        steps=9, steps_per_epoch=3, passes_per_batch=2, passes=18, images=600
    )
    args.dataloader_drop_last = True
    sgd = torch.optim.SGD(params)
    assert costs.counts(args, 100, sgd).passes == 6
    with pytest.raises(ValueError, match="30 images do not make one batch of 20 for every process"):
        costs.counts(args, 30, sgd)


@pytest.mark.parametrize(
    ("ascent", "passes"),
    [
        ("full", 3),
        ("subset(0.5)", 2),
        ("split(0.25)", 1.25),
        ("split(0.25), every(2)", 1 + 50 / 100 * 0.25),
        ("every(4)", 1 + 2 * 25 / 100),
        ("every(3)", 1 + 2 * 34 / 100),
        ("window(0.5, 0.75)", 1 + 2 * 25 / 100),
        ("window(0, 40), subset(0.25)", 1 + 2 * 40 / 100 * 0.25),
        ("adaptive", 3),
    ],
)
def test_passes_of_the_ascent_policies(ascent: str, passes: float) -> None:
    amp = AMP([nn.Parameter(torch.ones(1))], inner_iter=2, ascent=ascent)
    assert costs.mean_passes(amp, 100) == pytest.approx(passes)
    assert costs.mean_passes(AMP([nn.Parameter(torch.ones(1))], ascent="stale"), 100) == 1


class Quadratic(nn.Module):
    """Compute as loss a sum of squares of five linear functions of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.linear(pixel_values.flatten(1)).pow(2).sum())


@pytest.mark.parametrize("epsilon", [0.5, 0.0])
def test_costs_of_a_model_worked_out_by_hand(epsilon: float) -> None:
    _, _, args = options.parse(["--use_cpu", "--per_device_train_batch_size", "7"])
    model = Quadratic()
    before = [p.clone() for p in model.parameters()]
    batch = {"pixel_values": torch.zeros(7, 3, 2, 2), "labels": torch.zeros(7, dtype=torch.int64)}
    cost = costs.costs(model, lambda params: AMP(params, **{**SGD_ARGS, "epsilon": epsilon}), args, batch)
    products, float32, parameters = 12 * 5, 4, 12 * 5 + 5
    assert cost.forward_flops == 2 * products
    assert cost.training_flops == 2 * cost.forward_flops, "the pixels need no gradient, only the weights"
    assert cost.weights == cost.gradients == cost.optimizer_state == float32 * parameters
    assert cost.perturbation == (float32 * parameters if epsilon else 0)
    assert cost.activations == 7 * (12 + 5) * float32, "what the product and the square keep"
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_setting_that_could_not_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--amp_epsilon must be at least 0 and finite, got -1\.0"):
        job.main([*QUICK, "--amp_epsilon", "-1", "--dry_run"])


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on a host", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output_dir", "file"], "cannot write to 'file': .*file is a file; choose another output_dir"),
        (["--output_dir", "file/below/it"], "cannot write to 'file/below/it': .*file is a file"),
        (["--output_dir", "checkpoints"], "'checkpoints' holds checkpoint-3 of an earlier run"),
        (["--output_dir", "closed/new"], "cannot write to 'closed/new': Permission denied"),
        (["--output_dir", "held"], r"another job \(process 7 on a host\s*\) is writing to 'held'"),
        (["--ledger", "empty"], "ledger 'empty' is a folder"),
        (["--ledger", "file/ledger.jsonl"], "cannot write to 'file': .* choose another ledger"),
        (["--ledger", "text"], "text, line 1, is not a run of train.py"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("checkpoints/checkpoint-3", "closed", "empty", "held"):
        Path(folder).mkdir(parents=True)
    Path("checkpoints/checkpoint-3/trainer_state.json").write_text("{}")
    Path("file").write_text("")
    Path("text").write_text("no JSON")
    monkeypatch.setattr("os.access", lambda path, mode: "closed" not in str(path))  # an administrator may write there
    monkeypatch.setattr(job, "make_task", lambda *_: pytest.fail("the data is read"))
    with contextlib.ExitStack() as stack:
        if "held" in arguments:
            pytest.importorskip("fcntl", reason="locks of POSIX")
            command = [sys.executable, "-c", HOLD, "held/_lock"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            other = stack.enter_context(subprocess.Popen(command, **pipes))  # type: ignore[call-overload]
            other.stdout.readline()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=said):
            job.main([*QUICK, *arguments, "--dry_run"])
        assert sorted(tmp_path.rglob("*")) == before, "and nothing is written"


@pytest.mark.parametrize(
    ("files", "arguments", "said"),
    [
        (None, [], "out; checkpoints: no"),
        ([], [], "out, which exists: what is in it stays; checkpoints: no"),
        (["mine.txt", "_lock"], [], "out, which exists: what is in it stays; checkpoints: no"),
        (
            ["run.json", "mine.txt"],
            [],
            "has the results of an earlier run: they are replaced, and all else in it stays",
        ),
        (["curves.png"], [], "has the results of an earlier run"),
        (["run.json", "checkpoint-3/trainer_state.json"], ["--resume_from_checkpoint", "last"], "of this run so far"),
    ],
)
def test_a_dry_run_tells_what_becomes_of_the_folder(
    files: list[str] | None, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in files or ():
        path = Path("out", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    if files == []:
        Path("out").mkdir()
    _, _, args = options.parse([*QUICK, "--output_dir", "out", "--dry_run", *arguments])
    assert said in plan._results(args)
