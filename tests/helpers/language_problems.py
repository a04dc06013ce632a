"""Tiny language models and documents of uneven length, and `AMPTrainer` on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from language_reference import Batch, Objective, adamw, language_trajectory, nesterov
from reference import Step
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from amp_plugin import AMPTrainer, AMPTrainingArguments

VOCABULARY, LONGEST, CLASSES = 37, 12, 3
Document = dict[str, Tensor]

_LAYERS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def built(model: Callable[..., Any], config: Any, **kwargs: Any) -> Any:
    """The model with every weight drawn at random: a bias of 0 would have no relative error."""
    torch.manual_seed(0)
    built = model(config, **kwargs)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return built


def gpt2(dropout: float = 0.0, attention: str = "sdpa", kind: Any = GPT2LMHeadModel) -> Any:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)
    return built(kind._from_config, config, attn_implementation=attention)


def llama() -> Any:
    return built(LlamaForCausalLM, LlamaConfig(**_LAYERS, num_key_value_heads=1))


def bert(dropout: float = 0.0, kind: Any = BertForSequenceClassification) -> Any:
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return built(kind, BertConfig(**_LAYERS, **drops, num_labels=CLASSES))


def masked_bert(dropout: float = 0.0) -> Any:
    return bert(dropout, BertForMaskedLM)


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return built(T5ForConditionalGeneration, config)


def documents(count: int, *, classes: bool = False) -> list[Document]:
    """Random tokens, 4 to 12 a document. Each has a class, or the next tokens but for a prompt of one to three."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    made = []
    for _ in range(count):
        tokens = draw(1, VOCABULARY, int(draw(4, LONGEST + 1)))
        labels = tokens.clone()
        labels[: int(draw(1, 4))] = -100
        made.append({"input_ids": tokens, "labels": draw(0, CLASSES) if classes else labels})
    return made


def padded(docs: Sequence[Document]) -> Batch:
    """A micro-batch, the labels padded with -100."""

    def pad(x: Tensor, value: int) -> Tensor:
        return nn.functional.pad(x, (0, LONGEST - len(x)), value=value) if x.ndim else x

    batch = {key: torch.stack([pad(d[key], -100 if key == "labels" else 0) for d in docs]) for key in docs[0]}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def one_by_one(docs: Sequence[Document]) -> list[Batch]:
    """The micro-batch as batches of a single document, so without any padding."""
    return [{key: value[None] for key, value in d.items()} for d in docs]


def in_windows(docs: Sequence[Document], accumulation: int, epochs: int, micro_batch: int = 2) -> Any:
    """The Trainer's order, without shuffling: windows of micro-batches; an epoch's last window has what is left."""
    batches = [docs[i : i + micro_batch] for i in range(0, len(docs), micro_batch)]
    return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)] * epochs


class InOrder(AMPTrainer):
    """Without shuffling, so that the batches are known."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


BALL: dict[str, float] = {"epsilon": 0.1, "inner_lr": 0.3}
DECAY = 1e-2
LEARNING_RATE = {"amp": 0.05, "amp_adamw_torch": 2e-3}
ADAM_EPSILON = 1e-3  # large: the keys' biases have no gradient but rounding errors, which Adam would blow up


def trained(
    model: nn.Module,
    docs: Sequence[Document],
    folder: Path | str,
    collator: Callable[[Any], Any] = padded,
    trainer: dict[str, Any] | None = None,
    kind: type[InOrder] = InOrder,
    **kwargs: Any,
) -> InOrder:
    """A Trainer of this kind, made with the arguments `trainer` and the training arguments `kwargs`, after training."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "optim": "amp",
        **({} if kwargs.get("optim") == "sgd" else {f"amp_{name}": value for name, value in BALL.items()}),
        "learning_rate": LEARNING_RATE.get(kwargs.get("optim", "amp")),
        "weight_decay": DECAY,
        "adam_epsilon": ADAM_EPSILON,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    args = AMPTrainingArguments(**{**defaults, **kwargs})
    it = kind(model=model, args=args, train_dataset=docs, data_collator=collator, **(trainer or {}))  # type: ignore[arg-type]
    it.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return it


def reference(start: nn.Module, windows: Any, objective: Objective, optim: str = "amp", **changes: Any) -> list[Step]:
    """The trajectory that :func:`trained` should follow; `changes` are arguments of `language_trajectory`."""
    lr = LEARNING_RATE[optim]
    update = nesterov(lr) if optim == "amp" else adamw(lr, ADAM_EPSILON)
    settings: dict[str, Any] = {**BALL, "weight_decay": DECAY, **changes}
    return language_trajectory(start, windows, objective, update, **settings)
