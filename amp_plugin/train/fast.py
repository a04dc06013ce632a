"""What `--fast` turns on: the layout, precision and compilation that pay on the device at hand."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, and use it again; whether that could be arranged.

    glibc gives large blocks back to the system as soon as they are free, so every step has the same activations mapped
    and cleared anew, page by page. The process then never shrinks. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
