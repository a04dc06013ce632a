"""Test what `--fast` chooses, that an explicit option wins, and that it trains as the slow way does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from main_job import QUICK, metrics_of, train
from problems import SGD_ARGS
from safetensors.torch import load_file
from torch.nn import functional as F

from amp_plugin import AMP, LossModule, attach
from amp_plugin.train import defaults, options
from amp_plugin.train.settings import settings_of


@pytest.fixture(params=[True, False], ids=["bf16", "no bf16"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(defaults, "cpu_computes_in_bf16", lambda: request.param)
    return bool(request.param)


def parsed(*argv: str) -> options.RecipeArguments:
    return options.parse([*argv, "--use_cpu", "true"])[2]


def test_on_a_cpu_it_is_channels_last_and_bf16_where_that_is_native(native: bool) -> None:
    args = parsed("--fast")
    assert (args.channels_last, args.bf16, args.torch_compile) == (True, native, False)
    assert args.arithmetic() == ("channels-last, bf16" if native else "channels-last, fp32")
    slow = parsed()
    assert (slow.channels_last, slow.bf16, slow.torch_compile, slow.arithmetic()) == (False, False, False, "")


def test_an_explicit_option_wins_on_the_command_line_and_in_a_recipe(native: bool, tmp_path: Path) -> None:
    args = parsed("--fast", "--channels_last", "false", "--bf16", str(not native))
    assert (args.channels_last, args.bf16) == (False, not native)
    assert not parsed("--fast", "--fp16", "true").bf16
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fast: true\nchannels_last: false\n")
    args = parsed(str(recipe))
    assert (args.channels_last, args.bf16) == (False, native)
    assert not parsed(str(recipe), "--fast", "false").bf16
    assert parsed(str(recipe), "--channels_last", "true").channels_last


def test_on_cuda_it_compiles_and_captures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    on_cuda = {"channels_last": True, "torch_compile": True, "bf16": True, "capture": True}
    assert defaults.fast_settings(use_cpu=False) == on_cuda
    assert not {"torch_compile", "capture"} & defaults.fast_settings(use_cpu=True).keys()


@pytest.mark.parametrize(
    ("given", "captures"),
    [
        ([], True),
        (["--optim", "sgd"], True),
        (["--optim", "amp_adamw_torch"], True),
        (["--capture", "false"], False),
        (["--optim", "rmp"], False),
        (["--optim", "amp_adafactor"], False),
        (["--amp_ascent", "every(2)"], False),
        (["--pretrained", "there", "--text_column", "text"], False),
    ],
)
def test_it_captures_where_that_can_work(
    given: list[str], captures: bool, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(options, "fast_settings", lambda use_cpu: {"channels_last": True, "capture": True})
    args = options.parse(["--fast", "--use_cpu", "true", *given])[2]
    assert (args.capture, args.amp_capture) == (captures, captures)
    assert ("capture" in settings_of(*options.parse(["--use_cpu", "true", *given]))) is False


def test_the_ledger_holds_what_it_chose(native: bool) -> None:
    settings = settings_of(*options.parse(["--fast", "--use_cpu", "true"]))
    assert (settings["channels_last"], settings["bf16"]) == (True, native)


def test_channels_last_is_the_same_trajectory() -> None:
    def end(memory_format: torch.memory_format) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model("preactresnet18", width=4, layers=[1, 1, 1, 1], num_classes=10).double()
        model = model.to(memory_format=memory_format)
        module = LossModule(model, F.cross_entropy)
        optimizer = AMP(model.parameters(), **SGD_ARGS)
        attach(optimizer, module)
        for _ in range(10):
            images = torch.randn(8, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=memory_format)
            module(images, torch.randint(10, (8,)))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    first, last = end(torch.contiguous_format), end(torch.channels_last)
    assert any(p.stride() != q.stride() for p, q in zip(first, last, strict=True))
    for p, q in zip(first, last, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_a_fast_run_resumes_to_the_same_bits_and_saves_an_ordinary_model(tmp_path: Path) -> None:
    # The rate is constant, for the steps of the schedule depend on the length of the run.
    common = [*QUICK, "--fast", "--save_strategy", "epoch", "--bf16", "true", "--lr_scheduler_type", "constant"]

    def trained(folder: str, *more: str) -> dict[str, Any]:
        done = train(tmp_path, *common, "--output_dir", folder, *more)
        assert done.returncode == 0, done.stderr
        assert "cpu, 1 thread(s), channels-last, bf16; results in" in done.stdout
        return metrics_of(tmp_path / folder)

    whole = trained("whole")
    trained("parts", "--max_steps", "3")
    parts = trained("parts", "--resume_from_checkpoint", "last")
    names = ("eval_loss", "eval_nll", "loss", "amp_loss")
    assert [parts[n] for n in names] == [whole[n] for n in names]
    weights, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(weights[n], resumed[n]) and weights[n].is_contiguous() for n in weights)
