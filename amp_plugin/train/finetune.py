"""What `--pretrained` changes: the settings of a training that starts from good weights."""

from __future__ import annotations

from typing import Any

from amp_plugin.train.methods.optimizers import RIVALS


def fine_tuning_settings(optim: str | None) -> dict[str, Any]:
    """Defaults of `train.py`'s options under `--pretrained`; a recipe or the command line may still say otherwise.

    The usual ones of fine-tuning scripts: AdamW and a learning rate that rises to 5e-5 and falls to 0, three epochs,
    clip norm 1, weight decay 0.01 on matrices alone; or SGD with 0.01, if it is asked for.

    Args:
        optim: as asked for; None for the default.
    """
    sgd = optim in ("amp", "amp_sgd", "sgd", *RIVALS)
    return {
        "optim": optim or "amp_adamw_torch",
        "learning_rate": 0.01 if sgd else 5e-5,
        "lr_scheduler_type": "cosine" if sgd else "linear",
        "warmup_steps": 0.1,
        "weight_decay": 1e-4 if sgd else 0.01,
        "decay_all_parameters": False,
        "max_grad_norm": 1.0,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "amp_epsilon": 0.1,
        "amp_inner_lr": 0.1,
    }
