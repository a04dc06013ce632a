"""What the Trainers of other libraries do beside their loss: they count, generate, and choose their parameters.

The Trainers here are small ones in the manner of TRL's and sentence-transformers'; tests/hosts has the real ones.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from their_trainer import SETTINGS, Net, TheirAMPConfig, TheirTrainer, dataset
from torch import Tensor, nn

from amp_plugin import AMPMixin


class Counting(TheirTrainer):
    """Counts examples, and keeps a metric of each micro-batch, as TRL's Trainers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: Any = {"train": defaultdict(list)}
        self._total_train_tokens = 0
        self.accum_loss_components = {"train": {"steps": torch.tensor(0)}}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        self._total_train_tokens += len(inputs["labels"])
        self.accum_loss_components["train"]["steps"] += 1
        self._metrics["train"]["theirs"].append(loss.item())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        theirs = {name: sum(values) / len(values) for name, values in self._metrics["train"].items()}
        counts = {"tokens": self._total_train_tokens, "parts": int(self.accum_loss_components["train"]["steps"])}
        self._metrics["train"].clear()
        super().log({**logs, **counts, **theirs}, *args, **kwargs)


class CountingWithAMP(AMPMixin, Counting):
    """It with AMP."""


def trained(kind: Any, folder: Path, model: nn.Module | None = None, **settings: Any) -> Any:
    args = TheirAMPConfig(str(folder), **{**SETTINGS, "average_tokens_across_devices": False, **settings})
    trainer = kind(model=model or Net(), args=args, train_dataset=dataset())
    trainer.train()
    return trainer


@pytest.mark.parametrize("inner_iter", [1, 2])
@pytest.mark.parametrize("ascent", ["full", "subset(0.5)", "split(0.5)", "momentum", "every(2)"])
def test_each_micro_batch_is_counted_once(ascent: str, inner_iter: int, tmp_path: Path) -> None:
    if ascent == "momentum" and inner_iter > 1:
        pytest.skip("has one direction")
    trainer = trained(CountingWithAMP, tmp_path, amp_ascent=ascent, amp_inner_iter=inner_iter)
    logs = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["tokens"] for r in logs] == [8, 16, 22, 30, 38, 44]
    assert [r["parts"] for r in logs] == [4, 8, 11, 15, 19, 22]
    if ascent == "full":
        assert [r["theirs"] for r in logs] == pytest.approx([r["loss"] for r in logs], rel=1e-4), "those at theta"


def test_what_to_count_once_can_be_named(tmp_path: Path) -> None:
    class Named(CountingWithAMP):
        amp_counters = ("steps",)

    trainer = trained(Named, tmp_path)
    assert trainer.steps == 22
    assert trainer._total_train_tokens > 44, "not named"


class Generative(Net):
    """Makes inputs, as language models make texts."""

    made = 0

    def generate(self, x: Tensor) -> Tensor:
        self.made += 1
        return x + self.body[0].bias.sum().detach()


class GeneratesInStep(TheirTrainer):
    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(model, {**inputs, "x": self.model.generate(inputs["x"])}, *args, **kwargs)


class GeneratesBefore(TheirTrainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs({**inputs, "x": self.model.generate(inputs["x"])})


class StepWithAMP(AMPMixin, GeneratesInStep):
    """It with AMP."""


class BeforeWithAMP(AMPMixin, GeneratesBefore):
    """It with AMP."""


def test_what_is_generated_in_a_pass_is_refused(tmp_path: Path) -> None:
    model = Generative()
    with pytest.raises(RuntimeError, match=r"StepWithAMP generates in its training_step .* in _prepare_inputs"):
        trained(StepWithAMP, tmp_path, model)
    assert "generate" not in vars(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Generative().parameters(), strict=True))


def test_what_is_generated_before_the_passes_is_generated_once(tmp_path: Path) -> None:
    model = Generative()
    trained(BeforeWithAMP, tmp_path, model)
    assert model.made == 22
    for ascent in ("subset(0.5)", "momentum"):
        trainer = BeforeWithAMP(
            model=model,
            args=TheirAMPConfig(str(tmp_path), **SETTINGS, amp_ascent=ascent),
            train_dataset=dataset(),
        )
        with pytest.raises(ValueError, match=r"would see perturbed weights .* use amp_ascent='full'"):
            trainer.train()
        assert not trainer.amp.perturbed


class ChoosesParameters(TheirTrainer):
    """Has parameters beside the model's and names all of them in a method, as sentence-transformers does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(()))

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.scale

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        optimizer, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        groups = [{"params": list(self.model.parameters())}, {"params": [self.scale], "weight_decay": 0.0}]
        return optimizer, {**kwargs, "optimizer_dict": groups}


class ChoosesWithAMP(AMPMixin, ChoosesParameters):
    """It with AMP."""


def test_a_trainer_that_names_its_parameters_is_heard(tmp_path: Path) -> None:
    trainer = trained(ChoosesWithAMP, tmp_path)
    assert [len(group["params"]) for group in trainer.amp.param_groups] == [4, 1]
    assert trainer.scale.item() != 1.0
    assert trainer.amp.passes == 2
