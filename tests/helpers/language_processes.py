"""Trains language models under torchrun, for test_language_model_training.py: weights, losses, equal replicas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from language_problems import documents, gpt2, masked_bert, trained
from leaving import leave
from problems import parameters_of
from torch import nn

RUNS: dict[str, dict[str, Any]] = {
    "GPT-2": {"model": gpt2},
    "GPT-2, compiled": {"model": gpt2, "torch_compile": True, "torch_compile_backend": "eager"},
    "BERT, masked": {"model": masked_bert},
}


def run(folder: str, model: Any, **kwargs: Any) -> dict[str, Any]:
    net = model()
    trainer = trained(
        net,
        documents(24),
        folder,
        gradient_accumulation_steps=4,
        num_train_epochs=5,
        ddp_backend="gloo",
        **kwargs,
    )
    weights = nn.utils.parameters_to_vector(net.parameters()).detach()
    replicas = [torch.empty_like(weights) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(replicas, weights)
    return {
        "weights": parameters_of(net),
        "losses": [(r["loss"], r["amp_loss"]) for r in trainer.state.log_history if "loss" in r],
        "replicas are equal": all(torch.equal(r, weights) for r in replicas),
    }


if __name__ == "__main__":
    results = {name: run(sys.argv[1], **settings) for name, settings in RUNS.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    leave()
