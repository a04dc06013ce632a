"""What `pip install amp-plugin` brings and what its extras add, compared with what the code imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from repository import HELPERS, ROOT

import amp_plugin

tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11's parser")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
USERS = (
    "benchmark",
    "flatness",
    "plots",
    "tensorboard",
)  # of the package and the recipes; the others are for developers

# Distributions whose module has another name, and those that are needed without an import of ours.
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "markdown-it-py": "markdown_it",
    "pytorch-ignite": "ignite",
}
UNSEEN = {"tensorboard": "transformers imports it for --report_to tensorboard"}
BROUGHT = {  # by what is required
    "pyarrow": "datasets",
    "safetensors": "transformers",
    "scipy": "scikit-learn, in plots",
    "tokenizers": "transformers",
    "typing_extensions": "torch",
}
IF_THERE = {
    "composer": "its test runs where it is installed",
    "peft": "adapters are published where the model has some",
}


def modules(requirements: list[str]) -> set[str]:
    """The modules that the requirements bring, those of extras among them included."""
    found = set()
    for requirement in requirements:
        [name] = re.findall(r"^[\w-]+", requirement)
        if name == "amp-plugin":
            extras = re.findall(r"\[(.*)\]", requirement)[0].split(",")
            found |= {m for extra in extras for m in modules(EXTRAS[extra])}
        else:
            found.add(MODULES.get(name, name.replace("-", "_")))
    return found


@cache
def imported(*folders: str) -> set[str]:
    """The modules of others that the files in the folders import anywhere."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    ours = {"amp_plugin", *(path.stem for folder in (ROOT / "recipes", HELPERS) for path in folder.iterdir())}
    return {name for file in files for name in _imports(file)} - ours - set(sys.stdlib_module_names) - BROUGHT.keys()


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_the_package_and_its_recipes_import_what_they_require() -> None:
    base, added = modules(PROJECT["dependencies"]), modules([f"amp-plugin[{','.join(USERS)}]"])
    assert imported("amp_plugin", "recipes") <= base | added | modules(EXTRAS["hosts"]) | IF_THERE.keys()
    assert base <= imported("amp_plugin", "recipes"), "what nothing imports need not be installed"


@pytest.mark.parametrize("extra", USERS)
def test_an_extra_adds_what_is_imported(extra: str) -> None:
    added = modules(EXTRAS[extra])
    assert added - imported("amp_plugin", "recipes") <= UNSEEN.keys()
    assert not added & modules(PROJECT["dependencies"]), "the base has it already"


def test_the_test_extra_and_the_hosts_are_all_that_tests_import() -> None:
    known = modules(PROJECT["dependencies"]) | {
        m for extra in ("test", "plots", "hosts") for m in modules(EXTRAS[extra])
    }
    assert imported("tests") - imported("amp_plugin", "recipes") <= known | IF_THERE.keys()


def test_the_version_is_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    newest = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == amp_plugin.__version__
