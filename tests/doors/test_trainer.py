"""`AMPMixin` before the Trainer of another library."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import InOneSlot
from their_trainer import (
    EPOCHS,
    EXAMPLES,
    MICRO_BATCH,
    SETTINGS,
    Net,
    Shared,
    TheirAMPConfig,
    TheirConfig,
    TheirTrainer,
    dataset,
)
from transformers import TrainingArguments

from amp_plugin import AMPMixin, AMPTrainer, AMPTrainingArguments
from amp_plugin.trainer.checkpoints import CheckpointMixin
from amp_plugin.trainer.publishing import PublishingMixin


class TheirAMPTrainer(AMPMixin, TheirTrainer):
    """Their Trainer with AMP."""


@dataclass
class OurConfig(AMPTrainingArguments):
    """The same options for AMPTrainer."""

    temperature: float = field(default=2.0)


class OurTrainer(Shared, AMPTrainer):
    """AMPTrainer with the same loss."""


def trained(kind: Any, model: Net, args: TrainingArguments) -> Any:
    trainer = kind(model=model, args=args, train_dataset=dataset())
    trainer.train()
    return trainer


def test_a_trainer_of_another_library_trains_as_amptrainer_does(tmp_path: Path) -> None:
    a, b = Net(), Net()
    theirs = trained(TheirAMPTrainer, a, TheirAMPConfig(str(tmp_path), **SETTINGS))
    ours = trained(OurTrainer, b, OurConfig(str(tmp_path), adam_beta1=0.8, adam_beta2=0.9, **SETTINGS))
    assert not torch.equal(a.body[0].weight, Net().body[0].weight)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    logged, expected = ([r for r in t.state.log_history if "amp_loss" in r] for t in (theirs, ours))
    for key in ("loss", "amp_loss", "sharpness", "clipped", "perturbation_norm"):
        assert [r[key] for r in logged] == [r[key] for r in expected], key
    # Their overrides are called in the ascent's passes, too.
    assert theirs.steps == logged[-1]["steps"] == 2 * EPOCHS * EXAMPLES // MICRO_BATCH


def test_their_choice_of_the_base_optimizer_is_honoured(tmp_path: Path) -> None:
    args = TheirAMPConfig(str(tmp_path), **SETTINGS)
    trainer = TheirAMPTrainer(model=Net(), args=args, train_dataset=dataset())
    amp = trainer.create_optimizer()
    assert amp is trainer.amp
    assert type(amp.base_optimizer) is torch.optim.AdamW
    assert {group["betas"] for group in amp.param_groups} == {(0.8, 0.9)}
    for of in (trainer, TheirAMPTrainer, AMPTrainer):  # by an instance and by a class, as the Trainer's own method
        assert of.get_optimizer_cls_and_kwargs(args, None)[1]["base_optimizer"] is torch.optim.AdamW


def test_without_amp_it_is_their_trainer_bit_for_bit(tmp_path: Path) -> None:
    a, b = Net(), Net()
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("amp_")} | {
        "optim": "adamw_torch"
    }
    theirs = trained(TheirTrainer, a, TheirConfig(str(tmp_path), **settings))
    mixed = trained(TheirAMPTrainer, b, TheirAMPConfig(str(tmp_path), **settings))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert theirs.steps == mixed.steps
    assert "amp_passes" not in mixed.state.log_history[0]


def test_arguments_without_amps_options_are_refused(tmp_path: Path) -> None:
    args = TheirConfig(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(TypeError, match=r"TheirAMPTrainer needs .*class MyConfig\(TheirConfig, AMPArguments\)"):
        TheirAMPTrainer(model=Net(), args=args)


def test_checkpoints_and_publishing_go_without_amp(tmp_path: Path) -> None:
    """Each mixin alone before a Trainer that knows nothing of AMP."""

    class Safe(CheckpointMixin, TheirTrainer):
        pass

    class Published(PublishingMixin, TheirTrainer):
        pass

    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("amp_")}
    settings |= {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
    Safe(model=Net(), args=TheirConfig(str(tmp_path / "safe"), **settings), train_dataset=dataset()).train("last")
    assert sorted(p.name for p in (tmp_path / "safe").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    published = Published(model=Net(), args=TheirConfig(str(tmp_path / "card"), **settings), train_dataset=dataset())
    published.create_model_card()
    assert "AMP" not in (tmp_path / "card" / "README.md").read_text()


@pytest.mark.parametrize("mixin", [AMPMixin, CheckpointMixin, PublishingMixin])
def test_a_mixin_after_the_trainer_is_refused(mixin: type) -> None:
    type("Before", (mixin, TheirTrainer), {})
    with pytest.raises(TypeError, match="in After a mixin follows the Trainer and would do nothing"):
        type("After", (TheirTrainer, mixin), {})


class MeanOfWindow(OurTrainer):
    """The Trainer returns the loss as the model has it: the mean over the window is the model's affair."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True


class InTheSameMemory(MeanOfWindow):
    """Its loss is that of a compiled module with CUDA graphs of its own: every pass overwrites it."""

    slot = torch.zeros(())

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return InOneSlot.apply(super().compute_loss(*args, **kwargs), self.slot)


def test_no_loss_of_a_window_is_overwritten_by_graphs_of_a_compiled_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "output_dir": str(tmp_path)}
    expected = trained(MeanOfWindow, Net(), OurConfig(**settings))
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", ModuleType("as if there were such graphs"))
    found = trained(InTheSameMemory, Net(), OurConfig(**settings))
    for a, b in zip(expected.state.log_history, found.state.log_history, strict=True):
        if "loss" in a:
            assert (a["loss"], a["sharpness"]) == pytest.approx((b["loss"], b["sharpness"]), rel=1e-5)
