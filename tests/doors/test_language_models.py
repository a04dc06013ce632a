"""`AMPTrainer` on language models equals a plain float64 loop which knows nothing of transformers' losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from language_problems import (
    BALL,
    InOrder,
    bert,
    documents,
    gpt2,
    in_windows,
    llama,
    masked_bert,
    one_by_one,
    padded,
    reference,
    t5,
    trained,
)
from language_reference import Objective
from problems import assert_same_parameters, max_relative_difference, parameters_of
from reference import Step, l2
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, GPT2LMHeadModel, Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

DOCUMENTS = 25  # 13 micro-batches of two; with 3 to a window, an epoch's last window is a single document
FP32, FP64 = (torch.float32, 1e-6), (torch.float64, 1e-10)


def packed(docs: Sequence[dict[str, Tensor]]) -> Any:
    """One row of all documents' tokens, where the positions start again with each."""
    return DataCollatorWithFlattening()([{key: value.tolist() for key, value in d.items()} for d in docs])


def token_mean(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A loss function of the user's."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (
        num_items_in_batch
    )


def of_logits(model: nn.Module, labels: Tensor, num_items: Any = None, **inputs: Any) -> CausalLMOutput:
    """What a custom model returns: its loss divided by `num_items`, or its mean loss."""
    logits = GPT2LMHeadModel.forward(model, **inputs).logits  # type: ignore[arg-type]
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)
    return CausalLMOutput(loss=loss if num_items is None else loss / num_items, logits=logits)


class NamesIt(GPT2LMHeadModel):
    accepts_loss_kwargs = True

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None, num_items_in_batch: Any = None) -> Any:
        return of_logits(self, labels, num_items_in_batch, input_ids=input_ids, attention_mask=attention_mask)


class DeclinesIt(GPT2LMHeadModel):
    accepts_loss_kwargs = False

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        assert "num_items_in_batch" not in kwargs
        return of_logits(self, labels, input_ids=input_ids, attention_mask=attention_mask)


class DropsIt(GPT2LMHeadModel):
    accepts_loss_kwargs = True

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return of_logits(self, labels, input_ids=input_ids, attention_mask=attention_mask)


@dataclass(frozen=True)
class Case:
    model: Callable[[], Any]
    objective: Objective
    precision: tuple[torch.dtype, float] = FP64
    collator: Callable[[Any], Any] = padded
    trainer: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


by_token, by_micro_batch = Objective(), Objective(mean_over="micro-batch")
unshifted = Objective(shift=False, mean_over="micro-batch")
CASES = {
    "GPT-2": Case(gpt2, by_token, FP32),
    "Llama": Case(llama, by_token, FP32),
    "BERT, masked": Case(masked_bert, unshifted),
    "BERT, classes": Case(bert, unshifted),
    "T5": Case(t5, unshifted),
    "label smoothing": Case(gpt2, Objective(smoothing=0.1), FP32, arguments={"label_smoothing_factor": 0.1}),
    "label smoothing, no num_items_in_batch": Case(
        masked_bert, Objective(shift=False, smoothing=0.1), FP32, arguments={"label_smoothing_factor": 0.1}
    ),
    "packed, sdpa": Case(gpt2, by_token, FP32, packed),
    "packed, eager": Case(lambda: gpt2(attention="eager"), by_token, FP32, packed),
    "user's loss": Case(gpt2, by_token, trainer={"compute_loss_func": token_mean}),
    "names num_items_in_batch": Case(lambda: gpt2(kind=NamesIt), by_token),
    "declines num_items_in_batch": Case(lambda: gpt2(kind=DeclinesIt), by_micro_batch),
    "drops num_items_in_batch": Case(lambda: gpt2(kind=DropsIt), by_micro_batch),
}


def assert_follows(trainer: InOrder, steps: list[Step], tolerance: float) -> None:
    """Weights, and what was logged at every step (losses are added up in float32)."""
    assert max_relative_difference(parameters_of(trainer.model), steps[-1].params) < tolerance
    logs = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["loss"] for r in logs] == pytest.approx([s.loss for s in steps], rel=1e-6)
    assert [r["amp_loss"] for r in logs] == pytest.approx([s.amp_loss for s in steps], rel=1e-6)
    assert [r["perturbation_norm"] for r in logs] == pytest.approx([l2(s.delta.values()) for s in steps], rel=1e-5)
    held_back = [[math.isclose(n, BALL["epsilon"]) for n in s.delta_norms.values()] for s in steps]
    assert [r["clipped"] for r in logs] == pytest.approx([sum(h) / len(h) for h in held_back])
    assert any(map(any, held_back)), "the ball is tried"
    assert not all(map(all, held_back)), "and so is what is inside"


@pytest.mark.parametrize(
    ("name", "accumulation", "optim"),
    [
        *((name, 3, "amp") for name in CASES),
        *((name, 3, "amp_adamw_torch") for name in ("GPT-2", "Llama", "BERT, masked", "label smoothing")),
        *((name, 1, optim) for name in ("GPT-2", "BERT, masked") for optim in ("amp", "amp_adamw_torch")),
    ],
)
def test_a_window_of_uneven_micro_batches_is_one_batch(
    tmp_path: Path, name: str, accumulation: int, optim: str
) -> None:
    """The reference runs each document alone: no padding, no packing, no micro-batches."""
    case, epochs = CASES[name], 1 if accumulation == 1 else 2
    docs = documents(DOCUMENTS, classes=name == "BERT, classes")
    model = case.model().to(case.precision[0])
    windows = [[one_by_one(m) for m in w] for w in in_windows(docs, accumulation, epochs)]
    steps = reference(model, windows, case.objective, optim)
    (plain,) = reference(model, windows[:1], case.objective, optim, inner_iter=0)
    assert len(steps) >= 10
    assert max_relative_difference(plain.params, steps[0].params) > 1e-3, "the perturbation matters from the start"
    arguments = {"gradient_accumulation_steps": accumulation, "num_train_epochs": epochs, **case.arguments}
    trainer = trained(model, docs, tmp_path, case.collator, case.trainer, optim=optim, **arguments)
    assert_follows(trainer, steps, case.precision[1])


def test_two_ascent_steps(tmp_path: Path) -> None:
    docs, model = documents(DOCUMENTS), masked_bert().double()
    windows = [[one_by_one(m) for m in w] for w in in_windows(docs, 3, 2)]
    steps = reference(model, windows, unshifted, inner_iter=2)
    trainer = trained(model, docs, tmp_path, gradient_accumulation_steps=3, amp_inner_iter=2)
    assert_follows(trainer, steps, 1e-10)


def test_a_loss_of_the_trainers_own_that_ignores_num_items_in_batch(tmp_path: Path) -> None:
    class OwnLoss(InOrder):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            return token_mean(model(**inputs), labels, (labels[:, 1:] != -100).sum())

    docs, model = documents(DOCUMENTS), gpt2().double()
    windows = [[one_by_one(m) for m in w] for w in in_windows(docs, 3, 2)]
    steps = reference(model, windows, by_micro_batch)
    trainer = trained(model, docs, tmp_path, kind=OwnLoss, gradient_accumulation_steps=3)
    assert_follows(trainer, steps, 1e-10)


def test_a_first_micro_batch_without_targets(tmp_path: Path) -> None:
    """It cannot tell whether the model uses num_items_in_batch, so the next window is asked."""
    docs, model = documents(DOCUMENTS), gpt2()
    for d in docs[:2]:
        d["labels"] = torch.full_like(d["labels"], -100)
    windows = [[one_by_one(m) for m in w] for w in in_windows(docs, 3, 2)]
    steps = reference(model, windows, by_token)
    assert_follows(trained(model, docs, tmp_path, gradient_accumulation_steps=3), steps, 1e-6)


class SeedEveryStep(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(state.global_step)


@pytest.mark.parametrize("masks", ["same", "fresh"])
def test_dropout_masks_of_the_two_passes(tmp_path: Path, masks: Any) -> None:
    docs, model = documents(DOCUMENTS, classes=True), bert(dropout=0.3).double()
    windows = [[[padded(m)] for m in w] for w in in_windows(docs, 3, 2)]
    steps = {m: reference(model, windows, unshifted, masks=m) for m in ("same", "fresh")}  # type: ignore[arg-type]
    assert max_relative_difference(steps["same"][-1].params, steps["fresh"][-1].params) > 0.02
    callbacks = {"callbacks": [SeedEveryStep()]}
    trainer = trained(model, docs, tmp_path, trainer=callbacks, gradient_accumulation_steps=3, amp_rng=masks)
    assert_follows(trainer, steps[masks], 1e-10)


def test_tied_embeddings_are_one_weight(tmp_path: Path) -> None:
    docs, model = documents(4), gpt2()
    start, seen = copy.deepcopy(model), []
    model.register_forward_pre_hook(lambda *_: seen.append(model.lm_head.weight.detach().clone()))
    trainer = trained(model, docs, tmp_path, max_steps=2)
    (delta, *_) = (s.delta for s in reference(start, [[one_by_one(docs[:2])]], by_token))
    torch.testing.assert_close(seen[1] - seen[0], delta["transformer.wte.weight"].float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[0], start.lm_head.weight)
    assert model.lm_head.weight is model.transformer.wte.weight
    listed = [p for group in trainer.amp.param_groups for p in group["params"]]  # type: ignore[union-attr]
    assert sum(p is model.lm_head.weight for p in listed) == 1


@pytest.mark.parametrize("model", [lambda: gpt2(dropout=0.3), lambda: bert(dropout=0.3)])
def test_asking_for_the_scale_of_the_loss_leaves_no_trace(tmp_path: Path, model: Callable[[], Any]) -> None:
    """Without AMP, dropout included, it is the stock Trainer bit for bit, told by hand where BERT needs it."""

    class Stock(Trainer):
        _get_train_sampler = InOrder._get_train_sampler

    a, b = model(), model()
    docs = documents(DOCUMENTS, classes=a.config.model_type == "bert")
    it = trained(a, docs, tmp_path, optim="sgd", learning_rate=0.05, gradient_accumulation_steps=3)
    stock = Stock(model=b, args=it.args.base_arguments(), train_dataset=docs, data_collator=padded)  # type: ignore[arg-type]
    stock.model_accepts_loss_kwargs = b.config.model_type == "gpt2"
    stock.train()
    assert_same_parameters(a, b)
