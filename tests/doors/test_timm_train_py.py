"""timm's own train.py, unedited and in a process of its own: the weights are the reference's for the batches it made.

The wheel of timm has no train.py, so these tests need the path of one from its repository (of a version that trains
tasks) in AMP_PLUGIN_TIMM_TRAIN.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from reference import Tensors
from repository import HELPERS, ROOT
from timm_reference import assert_trajectory, averages, clipped_and_decayed, smoothed_cross_entropy
from windows import window_trajectory

SCRIPT = os.environ.get("AMP_PLUGIN_TIMM_TRAIN", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT, reason="needs timm's train.py: set AMP_PLUGIN_TIMM_TRAIN to its path"),
]

CLASSES, BATCH, EPOCHS, WEIGHT_DECAY, EMA_DECAY = 4, 8, 2, 1e-2, 0.5
BATCHES = 9  # of an epoch, so several micro-batches to a step leave a shorter last step
BALL: dict[str, Any] = {"epsilon": 0.03, "inner_lr": 0.1}
SGD_ARGS: dict[str, Any] = {"lr": 0.2, "momentum": 0.9, "nesterov": True}
SIZE = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
VIT = "vit_tiny_patch16_224 --model-kwargs " + " ".join(f"{name}={size}" for name, size in SIZE.items())
ARGUMENTS = f"""--img-size 8 --input-size 3 8 8 --num-classes {CLASSES} -b {BATCH} --device cpu --workers 0
 --lr {SGD_ARGS["lr"]} --sched step --warmup-epochs 0 --weight-decay {WEIGHT_DECAY} --device-modules amp_plugin
 train_py_recorder --opt-kwargs epsilon={BALL["epsilon"]} inner_lr={BALL["inner_lr"]} --experiment run"""
ATTACHED = "Adversarial Model Perturbation is attached to "


class Run(NamedTuple):
    checkpoint: dict[str, Any]  # the last one
    ranks: list[dict[str, Any]]  # what train_py_recorder.py saw in each process


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", BATCH * BATCHES), ("validation", BATCH)):
        for i in range(count):
            path = folder / split / str(i % CLASSES) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def run_script(
    images: Path,
    folder: Path,
    options: str = "",
    *,
    opt: str = "amp",
    model: str = VIT,
    epochs: int = EPOCHS,
    processes: int = 1,
) -> Run:
    folder.mkdir()
    paths = [ROOT, HELPERS, os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))), "AMP_PLUGIN_RECORD": str(folder)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = (
        f"--data-dir {images} --output {folder} --opt {opt} --model {model} --epochs {epochs} {ARGUMENTS} {options}"
    )
    ran = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, *arguments.split()],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert ATTACHED in ran.stdout
    checkpoint = torch.load(folder / "run" / "last.pth.tar", weights_only=False)
    return Run(checkpoint, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)])


def assert_perturbed(run: Run) -> None:
    """Every batch was passed twice, the second time at other weights; what is kept are the clean ones."""
    for facts in run.ranks:
        assert facts["calls"] == 2 * len(facts["batches"]) > 0
        assert min(facts["moved"]) > 0
        assert all(torch.equal(facts["end"][name], p) for name, p in run.ranks[0]["end"].items())
    for name, p in run.ranks[0]["end"].items():
        if not name.startswith("projection."):  # feature distillation's own, which the script keeps elsewhere
            assert torch.equal(run.checkpoint["state_dict"][name.removeprefix("student.")], p), name


def expected(ranks: list[dict[str, Any]], accumulation: int, clip: str, limit: float) -> list[Tensors]:
    """The reference's weights after each step."""
    groups = list(zip(*(facts["batches"] for facts in ranks), strict=True))  # those that share a perturbation
    epochs = [groups[i : i + BATCHES // len(ranks)] for i in range(0, len(groups), BATCHES // len(ranks))]
    assert len(epochs) == EPOCHS
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **SIZE)
    model.load_state_dict(ranks[0]["start"])
    return window_trajectory(
        model,
        smoothed_cross_entropy,
        [epoch[i : i + accumulation] for epoch in epochs for i in range(0, len(epoch), accumulation)],
        clip_norm=limit if clip == "norm" else None,
        transform=clipped_and_decayed(clip, limit, WEIGHT_DECAY),
        **BALL,
        **SGD_ARGS,
    )


class Setting(NamedTuple):
    options: str = ""
    accumulation: int = 1
    clip: str = ""
    limit: float = 0.0
    processes: int = 1
    tolerance: float = 1e-6


SETTINGS = {
    "plain": Setting(),
    "accumulation of 2": Setting(accumulation=2),
    "accumulation of 4": Setting(accumulation=4),
    "clip norm": Setting(clip="norm", limit=0.3, tolerance=1e-5),  # clipped, the way is short against the weights
    "clip value": Setting(clip="value", limit=0.02, tolerance=1e-5),
    "clip agc": Setting(clip="agc", limit=0.05, accumulation=2, tolerance=1e-5),
    "mixup and cutmix": Setting("--mixup 0.8 --cutmix 1"),
    "channels last": Setting("--channels-last"),
    "gradient checkpointing": Setting("--grad-checkpointing"),
    "compiled": Setting("--torchcompile aot_eager", accumulation=2),
    "compiled by inductor": Setting("--torchcompile"),
    "bf16": Setting("--amp --amp-dtype bfloat16", tolerance=2e-2),
    "fp16": Setting("--amp", tolerance=2e-2),  # without a gradient scaler, which the script has on CUDA only
    "two processes": Setting(processes=2),
    "two processes, accumulation": Setting(processes=2, accumulation=3, clip="norm", limit=0.3, tolerance=1e-5),
    "two processes, compiled": Setting("--torchcompile aot_eager", processes=2),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_weights_and_their_average_are_the_references(name: str, images: Path, tmp_path: Path) -> None:
    options, k, clip, limit, processes, tolerance = SETTINGS[name]
    options += f" --grad-accum-steps {k} --model-ema --model-ema-decay {EMA_DECAY}"
    if clip:
        options += f" --clip-grad {limit} --clip-mode {clip}"
    run = run_script(images, tmp_path / "run", options, processes=processes)
    assert_perturbed(run)
    start, want = run.ranks[0]["start"], expected(run.ranks, k, clip, limit)
    assert_trajectory([run.ranks[0]["end"]], want[-1:], start, tolerance)
    average = averages(want[0], want, EMA_DECAY)[-1]  # the script's begins at the first step
    seen = {name: run.checkpoint["state_dict_ema"][name] for name in average}
    assert_trajectory([seen], [average], start, tolerance)


@pytest.mark.parametrize(
    ("opt", "options"),
    [
        ("amp", "--drop 0.1 --drop-path 0.2 --mixup 0.8"),
        ("ampadamw", "--amp --amp-dtype bfloat16 --drop 0.1"),
        ("lookahead_amp", "--grad-accum-steps 2 --clip-grad 1"),
        ("amp", "--torchcompile aot_eager --drop-path 0.2"),
        ("amp", "--kd-model-name recorded_teacher --grad-accum-steps 2"),
        ("amp", "--kd-model-name recorded_teacher --kd-distill-type feature"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    opt: str, options: str, images: Path, tmp_path: Path
) -> None:
    options += " --model-ema --model-ema-decay 0.5"
    whole = run_script(images, tmp_path / "whole", options, opt=opt, epochs=4)
    run_script(images, tmp_path / "half", options, opt=opt, epochs=2)
    options += f" --resume {tmp_path / 'half' / 'run' / 'last.pth.tar'}"
    resumed = run_script(images, tmp_path / "resumed", options, opt=opt, epochs=4)
    for run in (whole, resumed):
        assert_perturbed(run)
    assert len(resumed.ranks[0]["batches"]) == len(whole.ranks[0]["batches"]) / 2
    for key in ("state_dict", "state_dict_ema"):
        for name, tensor in whole.checkpoint[key].items():
            assert torch.equal(resumed.checkpoint[key][name], tensor), name


NAFLEX = "naflexvit_base_patch16_gap --model-kwargs patch_size=4 embed_dim=16 depth=1 num_heads=2"
DEIT = "deit_tiny_distilled_patch16_224 --model-kwargs img_size=8 patch_size=4 embed_dim=16 depth=2 num_heads=2"


@pytest.mark.parametrize(
    ("opt", "model", "options"),
    [
        ("amplamb", VIT, ""),
        ("amp", VIT, "--layer-decay 0.7"),
        ("amp", VIT, "--sched cosine --sched-on-updates --recovery-interval 2 --bce-loss"),
        ("amp", "resnet10t --model-kwargs stem_width=8", "--drop-path 0.2 --channels-last"),
        ("amp", "preactresnet18 --model-kwargs width=4", "--drop-path 0.2 --model-dtype bfloat16"),
        ("amp", DEIT, "--kd-model-name recorded_teacher --kd-distill-type token"),
        ("amp", NAFLEX, "--naflex-loader --naflex-patch-sizes 4 --naflex-train-seq-lens 4 --naflex-max-seq-len 4"),
    ],
)
def test_every_batch_is_perturbed(opt: str, model: str, options: str, images: Path, tmp_path: Path) -> None:
    assert_perturbed(run_script(images, tmp_path / "run", options, opt=opt, model=model))
