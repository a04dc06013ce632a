"""Each guard in pitfalls.py is there, and the test named with it fails when the guard is taken out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pitfalls import PITFALLS, Pitfall, table
from repository import RECORDS, ROOT

by_name = pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda p: p.what)


def test_the_table_is_that_of_the_list() -> None:
    assert (RECORDS / "PITFALLS.md").read_text() == table() + "\n"


@by_name
def test_the_guard_and_its_test_are_there(pitfall: Pitfall) -> None:
    assert pitfall.guard in (ROOT / "amp_plugin" / pitfall.file).read_text()
    file, _, name = pitfall.test.partition("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.slow
@by_name
def test_without_the_guard_the_test_fails(pitfall: Pitfall, tmp_path: Path) -> None:
    for folder in ("amp_plugin", "recipes", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "amp_plugin" / pitfall.file
    file.write_text(file.read_text().replace(pitfall.guard, pitfall.without))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{pitfall.test}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout
