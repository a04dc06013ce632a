"""Read the options that are JSON, so that a mistake in one is told with the option's name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The options that hold a JSON object; True for those that may also name a file with one.
JSON_OPTIONS = {
    "accelerator_config": True,
    "activation_checkpointing_kwargs": False,
    "deepspeed": True,
    "fsdp_config": True,
    "gradient_checkpointing_kwargs": False,
    "lr_scheduler_kwargs": False,
    "model_kwargs": False,
}


def check_json_options(given: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option that holds no JSON object, or has a key twice, which the stock parser drops."""
    for name in JSON_OPTIONS:
        value = read_json_option(name, given[name]) if isinstance(given.get(name), str) else None
        if name == "deepspeed" and value == {}:
            raise ValueError("--deepspeed has no settings, and would be passed over; leave it out")


def read_json_option(name: str, text: str) -> dict[str, Any]:
    """Return the object that an option holds, or that the file holds which the option names."""
    in_file = not text.startswith("{")  # as transformers tells the two apart
    wanted = f"--{name} must be a JSON object{' or a file with one' if JSON_OPTIONS[name] else ''}, got {text!r}"
    if in_file and not JSON_OPTIONS[name]:
        raise ValueError(wanted)
    try:
        value: Any = json.loads(
            Path(text).read_text(encoding="utf-8") if in_file else text, object_pairs_hook=_each_once
        )
    except OSError as error:
        raise ValueError(f"{wanted}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(wanted)
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)
