"""The recipes for language models, on a tiny one and a small text that is made here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from host_texts import tokenizer, words
from language_problems import llama
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and texts."""
    folder: Path = tmp_path_factory.mktemp("given")
    llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    texts = folder / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text("\n".join(words(6, i % 4) for i in range(16)) + "\n\n")
    return folder


def recipe(name: str) -> ModuleType:
    for library in {"finetune_lora": ["peft"], "finetune_sft": ["peft", "trl"]}[name]:
        pytest.importorskip(library, reason=f"the recipe needs {library}: pip install {library}")
    return __import__(name)


def trained(name: str, given: Path, folder: Path, *more: str) -> Any:
    what = {
        "finetune_lora": ["--model", str(given / "model"), "--text", str(given / "texts" / "train.txt"), "--rank", "2"],
        "finetune_sft": [
            *("--model_name_or_path", str(given / "model"), "--dataset_name", str(given / "texts"), "--use_peft"),
            *("--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--dtype", "float32"),
        ],
    }
    same = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_steps 6 --logging_steps 1 --use_cpu"
    same += " --learning_rate 0.05 --report_to none --disable_tqdm true --save_strategy no --bf16 false"
    return recipe(name).main([*what[name], "--output_dir", str(folder), *same.split(), *more])


@pytest.mark.parametrize("name", ["finetune_lora", "finetune_sft"])
def test_it_trains_adapters_with_amp(name: str, given: Path, tmp_path: Path) -> None:
    trainer = trained(name, given, tmp_path)
    logs = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["amp_passes"] for r in logs] == [2.0] * 6
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all(r["perturbation_norm"] > 0 for r in logs)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained_parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in trained_parameters)
    for n, p in trained_parameters.items():
        assert torch.equal(saved[n.replace(".default", "")], p.detach())


@pytest.mark.parametrize("name", ["finetune_lora", "finetune_sft"])
def test_one_option_makes_it_the_training_without_amp(name: str, given: Path, tmp_path: Path) -> None:
    trainer = trained(name, given, tmp_path, "--optim", "adamw_torch")
    assert trainer.amp is None
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert "amp_passes" not in trainer.state.log_history[0]
