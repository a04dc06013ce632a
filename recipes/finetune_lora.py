"""Fine-tune a causal language model with LoRA and AMP (Adversarial Model Perturbation) on the lines of a text file.

    python recipes/finetune_lora.py --model Qwen/Qwen3-0.6B --text notes.txt --output_dir out --num_train_epochs 3

All options of `transformers.TrainingArguments` and of AMP are taken, see ``--help``; ``--optim adamw_torch`` is the
same training without AMP, to compare with. The adapters are saved in the output folder.

Neither ``amp_epsilon`` nor ``amp_inner_lr`` has been measured on language models: see recipes/guides/FINE_TUNING.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from amp_plugin import AMPArguments, AMPMixin


@dataclass
class Task:
    """What is trained on what."""

    model: str = field(metadata={"help": "Causal language model: an id on the Hub, or a folder."})
    text: Path = field(metadata={"help": "Text file; each line that is not empty is an example."})
    rank: int = field(default=8, metadata={"help": "Rank of the adapters; their scale is alpha / rank = 2."})
    max_length: int = field(default=512, metadata={"help": "Tokens of an example; what follows is cut off."})


@dataclass
class Arguments(AMPArguments, TrainingArguments):
    """The Trainer's arguments and AMP's, with defaults for adapters."""

    optim: str = "amp_adamw_torch"
    learning_rate: float = 2e-4
    amp_epsilon: float = 0.1
    amp_inner_lr: float = 0.1
    compares_with_amp: ClassVar[bool] = True  # --optim adamw_torch needs no other change


class LoraTrainer(AMPMixin, Trainer):
    """The Trainer with AMP."""


def parse(argv: Sequence[str] | None = None) -> tuple[Task, Arguments]:
    """Return what the command line asks for."""
    task, args = HfArgumentParser((Task, Arguments)).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    return task, args


def main(argv: Sequence[str] | None = None) -> LoraTrainer:
    """Train, save the adapters and return the Trainer."""
    task, args = parse(argv)
    set_seed(args.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(task.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(task.model)
    lora = LoraConfig(r=task.rank, lora_alpha=2 * task.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    lines = [line for line in task.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    trainer = LoraTrainer(
        model=get_peft_model(model, lora),
        args=args,
        train_dataset=[
            {
                "input_ids": tokenizer(line + tokenizer.eos_token, truncation=True, max_length=task.max_length)[
                    "input_ids"
                ]
            }
            for line in lines
        ],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
