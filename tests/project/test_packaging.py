"""What is in the sdist and the wheel, so that the package works without its repository."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from repository import ROOT

import amp_plugin

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_no_recipe_is_forgotten() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11's parser")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {f"recipes/{p.name}": f"amp_plugin/train/recipes/{p.name}" for p in RECIPES}


@pytest.mark.slow
def test_sdist_and_wheel_hold_what_the_package_needs(tmp_path: Path) -> None:
    missing = [name for name in ("build", "hatchling") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"builds the package: pip install {' '.join(missing)}")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert sources == {*tracked, "PKG-INFO"}, "the sdist is the repository"
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = f"amp_plugin-{amp_plugin.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        for path in RECIPES:
            assert archive.read(f"amp_plugin/train/recipes/{path.name}") == path.read_bytes()
    package = {name for name in tracked if name.startswith("amp_plugin/")}
    assert files == package | {f"amp_plugin/train/recipes/{path.name}" for path in RECIPES}
    assert {name for name in package if name.endswith((".parquet", "py.typed"))}, "the sample, and the mark for mypy"
    assert (metadata["Name"], metadata["Version"]) == ("amp-plugin", amp_plugin.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("MIT", ">=3.10")
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2010.04925"]
    assert wheel.stat().st_size < 10_000_000
    if importlib.util.find_spec("twine"):
        check = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
        done = subprocess.run(check, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    required = {line.partition(">")[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required >= {"torch", "timm", "transformers", "accelerate", "datasets", "evaluate"}
