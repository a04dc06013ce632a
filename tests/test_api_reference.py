"""REFERENCE.md is what the docstrings say now, and has every public name."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

pytest.importorskip("griffe", reason="reads the docstrings: pip install griffelib, of the extra test")
from guides import make_reference


def test_the_page_is_up_to_date() -> None:
    written = make_reference.PAGE.read_text()
    assert make_reference.page() == written, "run python recipes/guides/make_reference.py"
    for name in make_reference.MODULES:
        if importlib.util.find_spec(name) is not None:
            for public in importlib.import_module(name).__all__:
                assert f"\n### {public}\n" in written
