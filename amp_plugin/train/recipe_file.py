"""Recipes: YAML files of options, some of which come with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from amp_plugin.suggest import did_you_mean

# In the wheel beside this file, where pyproject.toml has them put; in a clone where they are at home.
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")


def known_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = next((f for f in _FOLDERS if f.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_options(recipe: str) -> list[str]:
    """A recipe as it would be written on the command line.

    Args:
        recipe: a YAML file, or the name of one that comes with the package.

    Raises:
        ValueError: there is none, or it is not a mapping of options to values.
    """
    known = known_recipes()
    path = Path(recipe)
    if not path.is_file():
        path = known.get(recipe, path)
    if not path.is_file():
        raise ValueError(
            f"recipe {recipe!r} does not exist{did_you_mean(path.stem, known)}; known by name are {', '.join(known)}"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {recipe!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {recipe!r} must be a mapping of options to values")
    return as_options(settings, recipe)


def as_options(settings: Mapping[str, Any], recipe: str) -> list[str]:
    """A mapping of options to values as it would be written on the command line.

    Args:
        settings: as read from YAML.
        recipe: where they come from, for the error.

    Raises:
        ValueError: an option has no value.
    """
    return [token for name, value in settings.items() for token in _tokens(recipe, f"--{name}", value)]


def _tokens(recipe: str, option: str, value: Any) -> list[str]:
    if value is None:
        raise ValueError(f"recipe {recipe!r} has no value for {option}; leave it out for the default")
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={json.dumps(value) if isinstance(value, dict) else value}"]
