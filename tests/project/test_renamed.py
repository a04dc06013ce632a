"""Old names of modules and methods work for one version, and warn with the new name."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from repository import ROOT
from torch import nn

from amp_plugin import AMP, ExtraPasses
from amp_plugin._moved import _MOVED
from amp_plugin.core.policies import AscentPolicy


@pytest.mark.parametrize("old", _MOVED)
def test_a_module_is_found_by_its_old_name(old: str) -> None:
    for moved in _MOVED:  # of this package alone: torch has a module `distributed`, too
        sys.modules.pop(f"amp_plugin.{moved}", None)
    new = importlib.import_module(f"amp_plugin.{_MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=rf"amp_plugin\.{old} is now amp_plugin\.{_MOVED[old]};"):
        module = importlib.import_module(f"amp_plugin.{old}")
    for name, value in vars(new).items():
        if not name.startswith("__"):
            assert getattr(module, name) is value


def test_an_old_pickle_names_the_class_of_today() -> None:
    name = b"camp_plugin.optimizer\nAMP\n."
    with pytest.warns(DeprecationWarning, match="amp_plugin.optimizer is now"):
        importlib.import_module("amp_plugin.optimizer")
    assert pickle.loads(name) is AMP


def test_an_unknown_module_is_still_unknown() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'amp_plugin\.nothing'"):
        importlib.import_module("amp_plugin.nothing")


def test_the_package_itself_uses_no_old_name() -> None:
    code = "import amp_plugin, amp_plugin.train.job, amp_plugin.hub, amp_plugin.flatness"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:amp_plugin", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_methods_and_attributes_have_their_old_names() -> None:
    net = nn.Linear(2, 2)
    amp, passes = AMP(net.parameters(), lr=0.1), ExtraPasses(net)
    with pytest.warns(DeprecationWarning, match=r"AMP\.pass_on_overflow is now propagate_overflow"):
        amp.pass_on_overflow()
    with pytest.warns(DeprecationWarning, match=r"ExtraPasses\.number is now nth"), passes.number(0):
        first = torch.rand(1)
    with pytest.warns(DeprecationWarning, match=r"ExtraPasses\.extra is now perturbed"), passes.extra():
        assert torch.equal(torch.rand(1), first)
    with pytest.warns(DeprecationWarning, match=r"AscentPolicy\.foreseeable is now is_deterministic"):
        assert amp.policy.foreseeable


def test_a_policy_written_for_the_old_names_is_followed() -> None:
    with pytest.warns(DeprecationWarning, match=r"Last\.part is now select_batches") as warned:

        @dataclass
        class Last(AscentPolicy):
            name = "last"

            def part(self, batches: Sequence[Any] | None) -> tuple[Sequence[Any], float]:
                assert batches is not None
                return batches[-1:], 1 / len(batches)

    assert warned[0].filename == __file__
    amp = AMP(nn.Linear(2, 2).parameters(), lr=0.1, ascent=Last())
    assert next(amp.passes_of_step(["first", "last"])) == ["last"]
