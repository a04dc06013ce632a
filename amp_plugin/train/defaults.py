"""Choose the defaults of `train.py`'s options under `--fast` and `--pretrained`.

A recipe or the command line may still say otherwise.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

from amp_plugin.train.methods.optimizers import BASELINES

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def fine_tuning_settings(optim: str | None) -> dict[str, Any]:
    """Return the defaults under `--pretrained`, for a training that starts from good weights.

    They are the usual ones of fine-tuning scripts: AdamW and a learning rate that rises to 5e-5 and falls to 0, three
    epochs, clip norm 1, weight decay 0.01 on matrices alone; or SGD with 0.01, if `optim` asks for SGD.
    """
    sgd = optim in ("amp", "amp_sgd", "sgd", *BASELINES)
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


def fast_settings(*, use_cpu: bool) -> dict[str, Any]:
    """Return the defaults under `--fast`: the layout, precision and compilation that pay on the device at hand.

    The layout is channels-last everywhere. bf16 autocast is on where the device computes in bf16: elsewhere bf16 is
    emulated, and slower than fp32. Compilation and capture are on for CUDA only: beside the other two compilation gains
    nothing on a CPU, and takes its time to start.
    """
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    settings: dict[str, Any] = {"channels_last": True}
    if accelerator is None:
        settings |= {"use_cpu": True, "bf16": cpu_computes_in_bf16()}
    elif accelerator.type == "cuda":
        settings |= {"torch_compile": True, "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
        settings |= {"capture": True}
    return settings


def can_be_captured(named: Any) -> bool:
    """Tell whether the steps of a training with these options, as far as they are told by name, can be captured.

    Texts differ in length; fp16 and ascent policies let the host decide; and the optimizer needs a fused kernel.
    """
    fused = ("sgd", "adamw_torch", "adamw_torch_fused", "adagrad")
    optims = (None, "amp", "sam", "asam", *fused, *(f"amp_{name}" for name in fused))
    return named.optim in optims and named.text_column is None and not named.fp16 and named.amp_ascent == "full"


def cpu_computes_in_bf16() -> bool:
    """Tell whether the processor has instructions for bf16 that torch uses: AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, and use it again; tell whether that could be arranged.

    glibc gives large blocks back to the system as soon as they are free, so every step has the same activations mapped
    and cleared anew, page by page. The process then never shrinks. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
