"""sentence-transformers' Trainer with AMP, by the mixin and by attaching its loss; and what SetFit leaves to do."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, bert_checkpoint
from host_texts import ACCUMULATION, BALL, DESCENT, MICRO_BATCH, ROWS, SETTINGS, WITH_AMP, Recorder, distance, judged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, SequentialSampler

pytest.importorskip("sentence_transformers", reason="trains embeddings: pip install sentence-transformers")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses, modules
from transformers import AutoTokenizer, DistilBertModel

from amp_plugin import AMP, AMPArguments, AMPMixin, attach

WINDOW = MICRO_BATCH * ACCUMULATION
WINDOWS = [range(k, k + WINDOW) for k in range(0, ROWS, WINDOW)]
SCALE = 3.0


class InOrder(SentenceTransformerTrainer):  # type: ignore[misc]
    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> Any:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


@dataclass
class MyArguments(SentenceTransformerTrainingArguments, AMPArguments):  # type: ignore[misc]
    """Theirs with AMP."""


class MyTrainer(AMPMixin, InOrder):
    """Theirs with AMP."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_checkpoint(tmp_path_factory.mktemp("bert"))


def embedder(checkpoint: Path) -> Any:
    transformer = modules.Transformer(str(checkpoint), config_kwargs={"dropout": 0.0, "attention_dropout": 0.0})
    pooling = modules.Pooling(transformer.get_embedding_dimension())
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # a bias of 0 would have no relative error
    return model


def pairs() -> Dataset:
    draw = random.Random(0)
    texts = [[" ".join(draw.choices(VOCABULARY[4:], k=k)) for k in (3, 4)] for _ in range(ROWS)]
    return Dataset.from_list([{"anchor": a, "positive": b} for a, b in texts])


def in_batch_negatives(checkpoint: Path, micro_batch: int = MICRO_BATCH) -> Any:
    """Each anchor has to find its positive among those of the micro-batch; texts are embedded one by one."""
    words, rows = AutoTokenizer.from_pretrained(checkpoint), pairs()

    def loss(model: nn.Module, window: list[int]) -> Tensor:
        bert = next(m for m in model.modules() if isinstance(m, DistilBertModel))

        def embedding(text: str) -> Tensor:
            return F.normalize(bert(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0), dim=0)

        means = []
        for k in range(0, len(window), micro_batch):
            batch = [rows[i] for i in window[k : k + micro_batch]]
            anchors, positives = (torch.stack([embedding(r[c]) for r in batch]) for c in ("anchor", "positive"))
            means.append(F.cross_entropy(SCALE * anchors @ positives.T, torch.arange(len(batch))))
        return torch.stack(means).mean()

    return loss


def trained(kind: Any, arguments: Any, folder: Path, model: Any, loss: Any, optimizer: Any = None, **more: Any) -> Any:
    recorder = Recorder()
    trainer = kind(
        model=model,
        args=arguments(str(folder), **{**SETTINGS, **more}),
        train_dataset=pairs(),
        loss=loss,
        optimizers=(optimizer, None),
        callbacks=[recorder],
    )
    trainer.train()
    trainer.steps = recorder.steps
    return trainer


@pytest.mark.parametrize("kind", ["plain", "cached"])
def test_the_mixin_is_amp_over_the_window(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    model, start = embedder(checkpoint), embedder(checkpoint)
    loss: Any = (
        losses.MultipleNegativesRankingLoss(model, scale=SCALE)
        if kind == "plain"
        else losses.CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=1)
    )
    trainer = trained(MyTrainer, MyArguments, tmp_path, model, loss, decay_all_parameters=True, **WITH_AMP)
    expected = judged(start, in_batch_negatives(checkpoint), WINDOWS)
    plain = judged(start, in_batch_negatives(checkpoint), WINDOWS, epsilon=0.0)
    assert distance(plain, expected) > 1e-3, "the perturbation matters"
    assert distance(trainer.steps, expected) < 1e-4
    assert trainer.amp.passes == 2


def test_without_a_ball_it_is_their_trainer_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    steps = []
    for kind, arguments, more in (
        (InOrder, SentenceTransformerTrainingArguments, {"optim": "sgd"}),
        (MyTrainer, MyArguments, {**WITH_AMP, "amp_epsilon": 0.0}),
    ):
        model = embedder(checkpoint)
        loss = losses.MultipleNegativesRankingLoss(model, scale=SCALE)
        steps.append(trained(kind, arguments, tmp_path, model, loss, **more).steps)
    assert distance(*steps) == 0.0


def test_parts_of_a_loss_are_logged_as_they_are_at_theta(checkpoint: Path, tmp_path: Path) -> None:
    class Parts(losses.MultipleNegativesRankingLoss):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            loss = super().forward(*args)
            return {"first": 0.25 * loss, "rest": 0.75 * loss}

    model = embedder(checkpoint)
    trainer = trained(MyTrainer, MyArguments, tmp_path, model, Parts(model, scale=SCALE), **WITH_AMP)
    logs = [r for r in trainer.state.log_history if "first" in r]
    assert len(logs) == len(WINDOWS)
    for record in logs:
        assert record["first"] + record["rest"] == pytest.approx(record["loss"], rel=1e-3)
        assert record["amp_loss"] != pytest.approx(record["loss"], rel=1e-3)


def test_weights_of_the_loss_are_perturbed_too(checkpoint: Path, tmp_path: Path) -> None:
    model = embedder(checkpoint)
    loss = losses.SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=2)
    seen: list[Tensor] = []
    loss.classifier.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach().clone()))
    rows = pairs()
    labelled = rows.add_column("label", [i % 2 for i in range(len(rows))])
    trainer = MyTrainer(
        model=model, args=MyArguments(str(tmp_path), **SETTINGS, **WITH_AMP), train_dataset=labelled, loss=loss
    )
    trainer.train()
    for theta, again, moved, too in zip(*(seen[k::4] for k in range(4)), strict=True):  # two passes over two batches
        assert torch.equal(theta, again)
        assert torch.equal(moved, too)
        assert not torch.equal(theta, moved)
    assert len(seen) == 4 * len(WINDOWS)


def test_attaching_the_loss_is_amp(checkpoint: Path, tmp_path: Path) -> None:
    model, start = embedder(checkpoint), embedder(checkpoint)
    loss = losses.MultipleNegativesRankingLoss(model, scale=SCALE)
    optimizer = AMP(model.parameters(), **DESCENT, **BALL)
    attach(optimizer, loss)
    arguments = SentenceTransformerTrainingArguments
    one = {"per_device_train_batch_size": WINDOW, "gradient_accumulation_steps": 1}
    trainer = trained(InOrder, arguments, tmp_path, model, loss, optimizer, **one)
    assert optimizer.passes == 2
    assert distance(trainer.steps, judged(start, in_batch_negatives(checkpoint, WINDOW), WINDOWS)) < 1e-4


def test_the_stock_route_is_an_error_that_names_the_mixin(checkpoint: Path, tmp_path: Path) -> None:
    model = embedder(checkpoint)
    optimizer = AMP(model.parameters(), **DESCENT, **BALL)
    with pytest.raises(TypeError, match=r"class MyTrainer\(amp_plugin\.AMPMixin, TheirTrainer\)"):
        trained(
            InOrder,
            SentenceTransformerTrainingArguments,
            tmp_path,
            model,
            losses.MultipleNegativesRankingLoss(model),
            optimizer,
        )


def test_setfit_takes_no_optimizer_but_a_body_that_amp_has_trained(checkpoint: Path, tmp_path: Path) -> None:
    setfit = pytest.importorskip("setfit", reason="classifies embeddings: pip install setfit")
    for takes in (setfit.Trainer.__init__, setfit.TrainingArguments.__init__):
        assert not {"optimizers", "optimizer_cls_and_kwargs", "optim"} & set(inspect.signature(takes).parameters)
    body = embedder(checkpoint)
    loss = losses.MultipleNegativesRankingLoss(body, scale=SCALE)
    assert trained(MyTrainer, MyArguments, tmp_path, body, loss, **WITH_AMP).amp.passes == 2
    weights = {name: p.clone() for name, p in body.state_dict().items()}
    texts = [row["anchor"] for row in pairs()]
    model = setfit.SetFitModel(model_body=body, model_head=_head())
    trainer = setfit.Trainer(model=model, args=setfit.TrainingArguments(str(tmp_path)))
    trainer.train_classifier(texts, [i % 2 for i in range(len(texts))])
    assert len(model.predict(texts[:3])) == 3
    assert all(torch.equal(p, weights[name]) for name, p in body.state_dict().items()), "the head alone was fitted"


def _head() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression()
