"""What people train language models with: adapters, gradient checkpointing, bf16, compilation, several processes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from language_problems import (
    InOrder,
    bert,
    documents,
    gpt2,
    in_windows,
    masked_bert,
    one_by_one,
    reference,
    trained,
)
from language_reference import Objective
from launch import run_processes
from problems import assert_same_parameters, max_relative_difference, parameters_of
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

# --- adapters


def with_lora(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft", reason="trains LoRA adapters: pip install peft")
    torch.manual_seed(0)
    adapters = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_lora_trains_the_adapters_alone(tmp_path: Path, checkpointing: bool | None) -> None:
    docs, model = documents(25), with_lora(gpt2())
    start = copy.deepcopy(model)
    windows = [[one_by_one(m) for m in w] for w in in_windows(docs, 3, 2)]
    steps = reference(start, windows, Objective())
    plain = reference(start, windows, Objective(), inner_iter=0)
    assert max_relative_difference(plain[-1].params, steps[-1].params) > 1e-2, "the perturbation matters"
    assert set(steps[0].params) == {n for n, p in model.named_parameters() if "lora" in n}
    more: dict[str, Any] = {}
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    trainer = trained(model, docs, tmp_path, gradient_accumulation_steps=3, save_strategy="steps", save_steps=6, **more)
    ours = {n: p for n, p in parameters_of(model).items() if "lora" in n}
    assert max_relative_difference(ours, steps[-1].params) < 1e-6
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q) == ("lora" not in name), name
    trainer.save_model(str(tmp_path / "saved"))
    for folder, step in (("checkpoint-6", 6), ("saved", 10)):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        clean = {n.replace(".default", ""): p for n, p in steps[step - 1].params.items()}
        assert max_relative_difference(saved, clean) < 1e-6


# --- memory and precision


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("rng", ["same", "fresh"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, use_reentrant: bool, rng: str) -> None:
    """Dropout included: what is computed again has the masks of its own pass."""
    docs, plain, checkpointed = documents(25), gpt2(dropout=0.3), gpt2(dropout=0.3)
    calls: dict[str, list[None]] = {"plain": [], "checkpointed": []}
    for model, count in zip((plain, checkpointed), calls.values(), strict=True):
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_, count=count: count.append(None))
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "amp_rng": rng}
    trained(plain, docs, tmp_path, **settings)
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trained(checkpointed, docs, tmp_path, **settings, **more)
    assert max_relative_difference(parameters_of(checkpointed), parameters_of(plain)) < 1e-6
    passes = 2 * 13 * 2  # epochs, micro-batches, ascent and descent
    assert len(calls["checkpointed"]) - len(calls["plain"]) == passes, "each forward was made again in backward"


def test_bf16_autocast_stays_close_to_float32(tmp_path: Path) -> None:
    """Ten steps: the error is far below the update, and below what the perturbation changes."""
    docs, start = documents(20), gpt2()
    ends = {}
    for name, changes in {
        "float32": {},
        "bf16": {"bf16": True},
        "bf16 alone": {"bf16": True, "amp_epsilon": 0.0},
    }.items():
        model = copy.deepcopy(start)
        trained(model, docs, tmp_path, num_train_epochs=1, **changes)  # type: ignore[arg-type]
        assert all(p.dtype == torch.float32 for p in model.parameters())
        ends[name] = nn.utils.parameters_to_vector(model.parameters()).detach()
    update = (ends["float32"] - nn.utils.parameters_to_vector(start.parameters())).norm()
    assert (ends["bf16"] - ends["float32"]).norm() < 2e-2 * update
    assert (ends["bf16 alone"] - ends["float32"]).norm() > 0.1 * update


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_torch_compile_changes_nothing(tmp_path: Path, mode: str) -> None:
    docs, eager, compiled = documents(25), gpt2(), gpt2()
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "optim": "amp_adamw_torch"}
    trained(eager, docs, tmp_path, **settings)
    trained(compiled, docs, tmp_path, torch_compile=True, torch_compile_backend=mode, **settings)
    assert max_relative_difference(parameters_of(compiled), parameters_of(eager)) < 1e-5


# --- several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What language_processes.py found in two processes, DDP over gloo."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(2, "language_processes.py", folder)
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "GPT-2, compiled", "BERT, masked"])
def test_two_processes_are_one(tmp_path: Path, two_processes: dict[str, Any], name: str) -> None:
    """Unequal numbers of tokens in the processes; windows of 4 and, at an epoch's end, 2 micro-batches in each."""
    docs, result = documents(24), two_processes[name]
    is_bert = name == "BERT, masked"
    model = masked_bert() if is_bert else gpt2()
    windows = [[one_by_one(m) for m in w] for w in in_windows(docs, 2 * 4, 5)]
    objective = Objective(shift=False, mean_over="micro-batch") if is_bert else Objective()
    steps = reference(model, windows, objective)
    assert result["replicas are equal"]
    assert max_relative_difference(result["weights"], steps[-1].params) < 1e-6
    torch.testing.assert_close(
        torch.tensor(result["losses"]), torch.tensor([(s.loss, s.amp_loss) for s in steps]), rtol=1e-5, atol=0.0
    )
    if not is_bert:  # there, joining two micro-batches of unequal length changes the mean of the means
        trained(model, docs, tmp_path, gradient_accumulation_steps=4, num_train_epochs=5, per_device_train_batch_size=4)
        assert max_relative_difference(result["weights"], parameters_of(model)) < 1e-6


# --- resuming


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


@pytest.mark.parametrize("stop", [3, 7])  # in the middle and at the end of the first epoch
@pytest.mark.parametrize("make", [gpt2, masked_bert])
def test_resuming_is_bit_exact(tmp_path: Path, stop: int, make: Callable[..., Any]) -> None:
    docs = documents(25)
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "optim": "amp_adamw_torch"}
    whole, first, second = (make(dropout=0.3) for _ in range(3))
    trained(whole, docs, tmp_path / "whole", **settings)
    stops = {"callbacks": [StopAt(stop)]}
    trained(first, docs, tmp_path / "parts", trainer=stops, save_strategy="steps", save_steps=stop, **settings)
    checkpoint = str(tmp_path / "parts" / f"checkpoint-{stop}")
    trained(second, docs, tmp_path / "parts", resume_from_checkpoint=checkpoint, **settings)
    assert max_relative_difference(parameters_of(first), parameters_of(whole)) > 1e-3
    assert_same_parameters(second, whole)


# --- what is refused


@pytest.mark.parametrize(
    "optim", ["lomo", "adalomo", "galore_adamw_layerwise", "galore_adafactor_layerwise", "apollo_adamw_layerwise"]
)
def test_optimizers_that_step_in_backward_are_refused(
    tmp_path: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before their packages are asked for, and before any parameter is hooked."""
    galore = ModuleType("galore_torch")
    vars(galore).update(dict.fromkeys(("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"), torch.optim.SGD))
    monkeypatch.setitem(sys.modules, "galore_torch", galore)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    model = bert()
    with pytest.raises(ValueError, match=rf"--optim amp_{optim}: .* backward pass.*use e.g. amp \(SGD\), amp_adamw_"):
        trained(
            model, documents(4), tmp_path, optim=f"amp_{optim}", optim_target_modules="all-linear", learning_rate=0.1
        )
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_optimizer_that_steps_in_backward_by_hooks_is_noticed(tmp_path: Path) -> None:
    """As of PyTorch's tutorial on it: nothing is left to ascend along."""
    model = gpt2()

    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.1 * p.grad)  # type: ignore[operator]
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with pytest.raises(RuntimeError, match="found no gradient"):
        trained(model, documents(4), tmp_path)


@pytest.mark.parametrize(
    ("sign", "instead"),
    [
        ("is_deepspeed_enabled", r"DeepSpeed \(it steps inside backward\); use DDP or FSDP2"),
        ("is_fsdp_enabled", r"FSDP1; use FSDP2 \(fsdp_version: 2\) or DDP"),
        ("is_fsdp_xla_enabled", "XLA; use CUDA or CPU"),
    ],
)
def test_a_refusal_names_what_to_use_instead(tmp_path: Path, sign: str, instead: str) -> None:
    class Elsewhere(InOrder):
        """On that host, as far as the stock Trainer's own sign tells."""

        def _check_host(self) -> None:
            setattr(self, sign, True)
            super()._check_host()

    with pytest.raises(ValueError, match=f"--optim amp does not work exactly with {instead}"):
        trained(gpt2(), documents(4), tmp_path, kind=Elsewhere)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit", "paged_lion_8bit"])
def test_optimizers_that_the_trainer_treats_by_their_class_are_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(ValueError, match=rf"--optim amp_{optim}: with bitsandbytes .* amp_adamw_torch_8bit"):
        trained(bert(), documents(4), tmp_path, optim=f"amp_{optim}", learning_rate=0.1)
