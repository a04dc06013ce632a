from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT

import amp_plugin


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_loads_neither_transformers_nor_datasets() -> None:
    heavy = ("transformers", "datasets", "evaluate", "accelerate", "matplotlib", "pandas")
    loaded = python(f"import sys, amp_plugin; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_importing_the_package_registers_with_timm() -> None:
    code = "import amp_plugin, timm, timm.optim as o; print('amp' in o.list_optimizers(), timm.is_model('wrn28_10'))"
    assert python(code) == "True True"


@pytest.mark.parametrize("name", amp_plugin.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(amp_plugin, name).__doc__
    assert name in dir(amp_plugin)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'amp_plugin' has no attribute 'SAM'"):
        _ = amp_plugin.SAM  # type: ignore[attr-defined]
