"""YAML files that a person may have edited: read with an error that names the file, and checked by types."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from amp_plugin.train.plain_yaml import read_plain_yaml

_WORDS = {dict: "a mapping", list: "a list", str: "a text", int: "an integer"}


def read_yaml(path: Path) -> Any:
    """Return what a file says.

    Raises:
        ValueError: The file is not plain YAML.
    """
    try:
        return read_plain_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from error


def check_type(value: Any, kind: Any, name: str) -> None:
    """Raise a ValueError that names the first part of a value, a plain one, that is not of its annotated type."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return
    if origin is UnionType:
        if value is not None:
            check_type(value, parts[0], name)
        return
    if not isinstance(value, origin) or isinstance(value, bool):
        raise ValueError(f"{name} must be {_WORDS[origin]}, got {value!r}")
    for key, part in value.items() if origin is dict else ():
        check_type(key, parts[0], f"a key of {name}")
        check_type(part, parts[1], f"{name}.{key}")
    for i, part in enumerate(value if origin is list else ()):
        check_type(part, parts[0], f"{name}[{i}]")
