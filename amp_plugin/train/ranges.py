"""The ranges of the options that are numbers."""

from __future__ import annotations

from typing import Any

from amp_plugin.intervals import demand

# As `amp_plugin.intervals` reads them.
RANGES = {
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, inf)",
    "adversarial_epsilon": "(0, 1)",
    "amp_epsilon": "[0, inf)",
    "amp_inner_iter": "[1, inf)",
    "amp_inner_lr": "[0, inf)",
    "corrupted_test_images": "[0, inf)",
    "cpu_threads": "[1, 4096]",
    "data_seed": "[0, inf)",
    "dataloader_num_workers": "[0, 1024]",
    "dataloader_prefetch_factor": "[1, inf)",
    "ddp_bucket_cap_mb": "[1, inf)",
    "ddp_timeout": "[1, inf)",
    "eval_accumulation_steps": "[1, inf)",
    "eval_delay": "[0, inf)",
    "eval_every_epochs": "[1, inf)",
    "eval_steps": "(0, inf)",
    "flood_level": "[0, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "image_size": "[1, 4096]",
    "label_noise": "[0, 1)",
    "label_smoothing_factor": "[0, 1)",
    "learning_rate": "[0, inf)",
    "local_rank": "[-1, 65535]",
    "logging_steps": "(0, inf)",
    "lr_gamma": "(0, inf)",
    "max_grad_norm": "[0, inf]",
    "max_seq_length": "[1, inf)",
    "max_steps": "[1, inf)",
    "minutes": "(0, inf)",
    "mixup_alpha": "(0, inf)",
    "num_train_epochs": "(0, 1000000000]",
    "per_device_eval_batch_size": "[1, inf)",
    "per_device_train_batch_size": "[1, inf)",
    "rmp_epsilon": "[0, inf)",
    "sam_rho": "[0, inf)",
    "save_minutes": "(0, inf)",
    "save_steps": "(0, inf)",
    "save_total_limit": "[0, inf)",
    "seed": "[0, inf)",
    "torch_empty_cache_steps": "[1, inf)",
    "train_images": "[1, inf)",
    "validation_images": "[1, inf)",
    "warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
}
# These options are off where they are left out.
_SWITCHES = ("adversarial_epsilon", "flood_level", "mixup_alpha", "rmp_epsilon", "sam_rho")


def check_ranges(options: Any) -> None:
    """Raise a ValueError for the first attribute of `options` that is outside its range in `RANGES`.

    None stands for an option that is left out, and -1 for `max_steps` that is.
    """
    for name, text in RANGES.items():
        value = getattr(options, name, None)
        if value is None or (name == "max_steps" and value == -1):
            continue
        if not (must := demand(text, value)):
            continue
        hint = "; leave it out to train without it" if name in _SWITCHES else ""
        hint = "; leave it out to count in epochs" if name == "max_steps" else hint
        raise ValueError(f"--{name} must be {must}, got {value}{hint}")
