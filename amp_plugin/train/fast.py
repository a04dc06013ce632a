"""What `--fast` turns on: the layout, precision and compilation that pay on the device at hand."""

from __future__ import annotations

from typing import Any

import torch


def fast_settings(*, use_cpu: bool) -> dict[str, Any]:
    """Defaults of `train.py`'s options under `--fast`; a recipe or the command line may still say otherwise.

    channels-last everywhere. bf16 autocast where the device computes in it: elsewhere it is emulated, and slower than
    fp32. Compilation on CUDA only: beside the other two it gains nothing on a CPU, and takes its time to start.

    Args:
        use_cpu: even if there is an accelerator.
    """
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    settings: dict[str, Any] = {"channels_last": True}
    if accelerator is None:
        settings |= {"use_cpu": True, "bf16": cpu_computes_in_bf16()}
    elif accelerator.type == "cuda":
        settings |= {"torch_compile": True, "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
    return settings


def cpu_computes_in_bf16() -> bool:
    """Whether the processor has instructions for it that torch uses: AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
