from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMPTrainer, AMPTrainingArguments


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append(self.body[0].weight.dtype)
        logits = self.body(x.to(self.body[0].weight.dtype))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_evaluation_in_half_precision_leaves_the_weights_as_they_were_trained(
    precision: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows: list[Any] = [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(k % 3)} for k in range(12)]
    args = AMPTrainingArguments(
        str(tmp_path),
        max_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **{f"{precision}_full_eval": True},
    )
    trainer = AMPTrainer(model=Net(), args=args, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    model: Any = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    params = list(model.parameters())
    model.seen.clear()
    trainer.evaluate()
    assert set(model.seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys() == model.state_dict().keys()
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert model.state_dict()[name].dtype == saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor)
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))  # the optimizer holds them


def test_a_failed_evaluation_gives_the_weights_back_too(tmp_path: Path) -> None:
    def fail(prediction: Any) -> dict[str, float]:
        raise ZeroDivisionError

    rows: list[Any] = [{"x": torch.ones(6), "labels": torch.tensor(0)}]
    args = AMPTrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, bf16_full_eval=True)
    trainer = AMPTrainer(model=Net(), args=args, eval_dataset=rows, compute_metrics=fail)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())  # type: ignore[union-attr]
