"""timm's own test_optim.py and test_models.py, run over the optimizers and models that we register with timm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from repository import HELPERS, ROOT

FOLDER = os.environ.get("AMP_PLUGIN_TIMM_TESTS")

ONE_OF_TIMMS = "is about an optimizer of timm's"
WEIGHTS = "reads weights that timm has published, and there are none of ours"
NO_MODEL = "is about one of timm's models"

# Tests that do not apply, and why. test_sgd, test_adam and test_lamb run with epsilon 0: a part of each calls step()
# after a backward pass of its own, which AMP refuses with a ball, because nothing has made the ascent. Those of
# Lookahead run with a small ball, because a wide one leaves the narrow valley in which they begin.
NOT_OURS = {
    "test_optim.py": {
        r"test_(kron|muon|adamuon|adopt|adan|adabelief|rectified|adaother|adafactor|laprop|lars|madgrad|mars|novograd"
        r"|rmsprop|adamp|sgdp|lookahead_radam|cadamp|csgdp|csgdw)": ONE_OF_TIMMS,
        r"test_compiled_\w+": "compiles the step() of an optimizer of timm's; AMP's own step is not compiled",
        r"test_param_groups_\w+": "makes groups, and no optimizer",
    },
    "test_models.py": {
        r"test_model_(inference|load_pretrained|features_pretrained)": WEIGHTS,
        r"test_model_default_cfgs_non_std": "is for models that make no maps; test_model_default_cfgs is for ours",
        r"test_model_forward_torchscript_with_features_fx": NO_MODEL,
        r"test_(naflexvit|gemma4)_\w+": NO_MODEL,
    },
}


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="AMP_PLUGIN_TIMM_TESTS names no folder with the tests of timm's repository")
@pytest.mark.parametrize("name", NOT_OURS)
def test_timms_own_tests_pass_with_ours(name: str, tmp_path: Path) -> None:
    pytest.importorskip("expecttest", reason="torch's own TestCase, which timm's tests use, needs it")
    file = Path(str(FOLDER)).resolve() / name
    report = tmp_path / "report.xml"
    options = ["-c", os.devnull, f"--rootdir={file.parent}", f"--junitxml={report}", "-q"]
    options += ["-p", "timm_suite", "-p", "no:cacheprovider", "-p", "no:timeout"]
    without = [f"--deselect={name}::{test}" for test in _tests(file) if _reason(name, test)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *without, str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]), "TORCH_DEVICE": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = ElementTree.parse(report).findall(".//testcase")
    run = {case.attrib["name"].partition("[")[0] for case in cases if case.find("skipped") is None}
    assert run == {test for test in _tests(file) if not _reason(name, test)}, "each runs, or the table has a reason"


def _tests(file: Path) -> list[str]:
    return re.findall(r"^ *def (test_\w+)", file.read_text(), re.MULTILINE)


def _reason(name: str, test: str) -> str:
    return next((why for pattern, why in NOT_OURS[name].items() if re.fullmatch(pattern, test)), "")
