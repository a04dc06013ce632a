from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT

import amp_plugin


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """What a process that has imported nothing else says of the package: which modules it loaded, what timm has."""
    heavy = ("transformers", "datasets", "evaluate", "accelerate", "matplotlib", "pandas")
    code = (
        f"import sys, amp_plugin; print([m for m in {heavy} if m in sys.modules])\n"
        "import timm, timm.optim as o; print('amp' in o.list_optimizers(), timm.is_model('wrn28_10'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines()


def test_importing_the_package_loads_neither_transformers_nor_datasets(imported: list[str]) -> None:
    assert imported[0] == "[]"


def test_importing_the_package_registers_with_timm(imported: list[str]) -> None:
    assert imported[1] == "True True"


@pytest.mark.parametrize("name", amp_plugin.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(amp_plugin, name).__doc__
    assert name in dir(amp_plugin)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'amp_plugin' has no attribute 'SAM'"):
        _ = amp_plugin.SAM  # type: ignore[attr-defined]
