"""Fine-tune a causal language model by TRL's SFTTrainer with AMP (Adversarial Model Perturbation).

    python recipes/finetune_sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --use_peft \
        --output_dir out

These are the options of TRL's own script, and AMP's: ``--optim adamw_torch`` is the same training without AMP, to
compare with. ``--dataset_name`` is an id on the Hub, or a folder with files that `datasets` opens.

Neither ``amp_epsilon`` nor ``amp_inner_lr`` has been measured on language models: see recipes/guides/FINE_TUNING.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from amp_plugin import AMPArguments, AMPMixin


@dataclass
class Arguments(SFTConfig, AMPArguments):
    """SFTConfig with AMP."""

    optim: str = "amp_adamw_torch"
    amp_epsilon: float = 0.1
    amp_inner_lr: float = 0.1
    compares_with_amp: ClassVar[bool] = True  # --optim adamw_torch needs no other change


class AMPSFTTrainer(AMPMixin, SFTTrainer):
    """SFTTrainer with AMP."""


def parse(argv: Sequence[str] | None = None) -> tuple[ScriptArguments, Arguments, ModelConfig]:
    """Return what the command line asks for."""
    script, args, model = TrlParser((ScriptArguments, Arguments, ModelConfig)).parse_args_and_config(argv)
    return script, args, model


def main(argv: Sequence[str] | None = None) -> AMPSFTTrainer:
    """Train, save the model or its adapters, and return the Trainer."""
    script, args, model = parse(argv)
    trainer = AMPSFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
