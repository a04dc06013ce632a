"""CONTRIBUTING.md: what it names exists, its drawing has every room and door, its commands are those of `.ci/run`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from repository import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
[DRAWING] = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
[COMMANDS] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
CODE = re.findall(r"`([^`\n]+)`", PAGE.replace("```", ""))
PACKAGE = ROOT / "amp_plugin"


def files_named(code: str) -> list[str]:
    """The words that name a file or a folder: by a slash, a suffix or a leading dot; perhaps with a name in it."""
    return [word for word in code.split() if re.fullmatch(r"\.?[\w./-]*(/|/\w+|\.(py|md|toml|yaml))(::[\w.]+)?", word)]


def file_of(name: str) -> Path:
    return next((root / name for root in (ROOT, PACKAGE) if (root / name).exists()), ROOT / name)


def defined_in(body: list[ast.stmt], name: str) -> bool:
    """Whether a function, class or variable is defined there; `Class.method` in the class."""
    head, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == head:
            return not rest or defined_in(node.body, rest)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not rest and any(isinstance(target, ast.Name) and target.id == head for target in targets):
            return True
    return False


NAMED = sorted({word for code in CODE for word in files_named(code)})


def test_the_page_names_enough_to_be_of_use() -> None:
    assert len(PAGE.splitlines()) <= 160
    assert sum("::" in name for name in NAMED) > 20


@pytest.mark.parametrize("name", [name for name in NAMED if name != "file.py::name"])
def test_what_the_page_names_exists(name: str) -> None:
    path, _, inside = name.partition("::")
    file = file_of(path)
    assert file.exists()
    assert not inside or defined_in(ast.parse(file.read_text()).body, inside)


def test_the_drawing_has_the_rooms_and_the_doors() -> None:
    """Every module of the doors by its name; every other public module or folder of the package; nothing else."""
    drawn = set(re.findall(r"(?:\w+/|\w+\.py)(?=\W)", DRAWING))
    rooms = {f"{p.name}/" for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    modules = {p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("_")}
    doors = {p.name for p in (PACKAGE / "doors").glob("*.py") if not p.name.startswith("_")}
    assert rooms | doors <= drawn
    assert modules - drawn <= {
        "arguments.py",
        "command.py",
        "files.py",
        "interrupts.py",
        "intervals.py",
        "suggest.py",
        "text.py",
        "whole_file.py",
    }  # in the text below the drawing
    files = {p.name for folder in (PACKAGE, ROOT / "recipes") for p in folder.rglob("*.py")}
    folders = {f"{p.name}/" for folder in (PACKAGE, ROOT / "recipes") for p in folder.iterdir() if p.is_dir()}
    assert drawn <= files | folders | {"recipes/", "policies/"}


def test_every_arrow_is_between_boxes_of_the_drawing() -> None:
    boxes = set(re.findall(r"^ +(\w+)\[", DRAWING, re.MULTILINE))
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", DRAWING, re.MULTILINE)
    assert {end for arrow in arrows for end in arrow} == boxes


def test_the_commands_are_those_of_the_check() -> None:
    install, test, lint = COMMANDS.strip().splitlines()
    check = (ROOT / ".ci" / "run").read_text()
    assert lint.split(" && ") == re.findall(r"^run \.venv/bin/(.+)$", check, re.MULTILINE)
    assert f"-m {test}\n" in (ROOT / "README.md").read_text()  # the line that the check takes from there
    [extra] = re.findall(r"\.\[(\w+)\]", install)
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11's parser")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra in extras


@pytest.mark.parametrize("word", re.findall(r"^\| ([\w ]+) \|", PAGE.partition("## Words")[2], re.MULTILINE)[1:])
def test_the_code_has_the_words_of_the_glossary(word: str) -> None:
    assert any(word in file.read_text() for file in PACKAGE.rglob("*.py")), "then the glossary needs no such word"
