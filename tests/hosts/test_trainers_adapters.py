"""PEFT's adapters, before and after AMP is there: which door takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_texts import BALL, DESCENT, Recorder, distance, judged
from language_problems import documents, gpt2, one_by_one
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="trains LoRA adapters: pip install peft")

from amp_plugin import AMP, ExtraPasses, attach  # noqa: E402

DOCUMENTS = documents(4)
WINDOWS = [[i] for i in range(len(DOCUMENTS))]


def with_adapters(model: nn.Module) -> Any:
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:  # made as zeros, which would leave the first step's lora_A without a gradient
                p.normal_(std=0.1)
    return adapted


def loss(model: nn.Module, window: list[int]) -> Tensor:
    batch = one_by_one(DOCUMENTS)[window[0]]
    return model(**batch).loss


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def fresh(model: nn.Module) -> tuple[AMP, nn.Module]:
    adapted = with_adapters(model)
    optimizer = AMP(adapters(adapted), **DESCENT, **BALL)
    attach(optimizer, adapted)
    return optimizer, adapted


def later(model: nn.Module) -> tuple[AMP, nn.Module]:
    """The optimizer was made, and the model attached, before the adapters came."""
    optimizer = AMP(model.parameters(), **DESCENT, **BALL)
    attach(optimizer, model)
    adapted = with_adapters(model)
    optimizer.add_param_group({"params": adapters(adapted)})
    return optimizer, adapted


def later_without_attach(model: nn.Module) -> tuple[AMP, nn.Module]:
    optimizer = AMP(model.parameters(), **DESCENT, **BALL)
    adapted = with_adapters(model)
    optimizer.add_param_group({"params": adapters(adapted)})
    return optimizer, adapted


@pytest.mark.parametrize("made", [fresh, later, later_without_attach])
def test_adapters_are_perturbed_wherever_they_came(made: Any) -> None:
    optimizer, model = made(gpt2().train())
    model.train()
    recorder = Recorder()
    passes = ExtraPasses(model)
    for window in WINDOWS:

        def backward(window: list[int] = window) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, window)
            value.backward()
            return value

        if optimizer.attached:
            backward()
            nn.utils.clip_grad_norm_(adapters(model), 0.5)
            optimizer.step()
        else:
            for _ in optimizer.ascent_passes(passes=passes):
                backward()
            with passes.nth(1):
                loss(model, window).backward()
            nn.utils.clip_grad_norm_(adapters(model), 0.5)
            optimizer.step()
        recorder.on_step_end(None, None, None, model=model)
    expected = judged(with_adapters(gpt2()).train(), loss, WINDOWS)
    plain = judged(with_adapters(gpt2()).train(), loss, WINDOWS, epsilon=0.0)
    assert distance(plain, expected) > 1e-2, "the perturbation matters"
    assert distance(recorder.steps, expected) < 2e-5


def test_adapters_that_the_optimizer_was_not_told_of_are_told_of() -> None:
    model = gpt2().train()
    optimizer = AMP(model.parameters(), **DESCENT, **BALL)
    adapted = with_adapters(model)
    attach(optimizer, adapted)
    with pytest.warns(RuntimeWarning, match="a pass left no gradient to ascend along"):
        loss(adapted, WINDOWS[0])
