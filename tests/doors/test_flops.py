"""The count of floating-point operations is the stock Trainer's, without its look at all parameters in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, Trainer, TrainerCallback, TrainingArguments

from amp_plugin import AMPMixin, AMPTrainer, AMPTrainingArguments

LOGGING_STEPS = 4


class Net(nn.Module):
    """A model that counts its parameters as those of transformers do."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 3))
        self.looks = 0

    def num_parameters(self, exclude_embeddings: bool) -> int:
        assert exclude_embeddings
        self.looks += 1
        return sum(p.numel() for p in self.parameters())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(x).square().mean()}


class Grows(TrainerCallback):
    """Adds a layer, which the optimizer trains, in the middle of the steps between two logs."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == LOGGING_STEPS + 2:
            layer = nn.Linear(3, 3, bias=False)
            kwargs["model"].layers.append(layer)
            kwargs["optimizer"].param_groups[0]["params"].append(layer.weight)


def batch_of_texts(samples: Any) -> BatchEncoding:
    """Collate as the tokenizers of transformers do, whose batches are no dictionaries."""
    return BatchEncoding({"x": torch.stack([sample["x"] for sample in samples])})


def trained(
    kind: type[Trainer], folder: Path, optim: str = "sgd", *, grows: bool = False, **more: Any
) -> tuple[float, int]:
    args = (AMPTrainingArguments if issubclass(kind, AMPTrainer) else TrainingArguments)(
        str(folder),
        optim=optim,
        num_train_epochs=4,
        per_device_train_batch_size=3,
        logging_steps=LOGGING_STEPS,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = Net()
    trainer = kind(model, args, train_dataset=[{"x": torch.ones(3)}] * 7, callbacks=[Grows()] * grows, **more)
    trainer.train()
    return trainer.state.total_flos, model.looks


@pytest.mark.parametrize("collator", [None, batch_of_texts])
@pytest.mark.parametrize("grows", [False, True])
def test_the_count_is_the_stock_trainers_with_fewer_looks(grows: bool, collator: Any, tmp_path: Path) -> None:
    more = {"grows": grows, "data_collator": collator}
    stock, looks = trained(Trainer, tmp_path, **more)
    assert looks == 12
    ours, looks = trained(AMPTrainer, tmp_path, **more)
    amp, amp_looks = trained(AMPTrainer, tmp_path, "amp", **more)
    assert (ours, amp) == (stock, 2 * stock)
    assert looks == amp_looks <= 10, "two sizes of batches, three logs"


def test_an_own_count_is_asked_for_every_batch(tmp_path: Path) -> None:
    class Counts(Trainer):
        asked = 0

        def floating_point_ops(self, inputs: Any) -> int:
            self.asked += 1
            return self.asked

    class Ours(AMPMixin, Counts):
        pass

    args = AMPTrainingArguments(
        str(tmp_path), optim="amp", max_steps=5, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    trainer = Ours(Net(), args, train_dataset=[{"x": torch.ones(3)}] * 7)
    trainer.train()
    assert trainer.state.total_flos == 2 * sum(range(1, 6))
