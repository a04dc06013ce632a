"""What every test shares: all cores, no network, one thread, fixed seeds, and the real data where it is present."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the files out between the cores, unless a single file is asked for: what its tests share is made once."""
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ or not hasattr(option, "numprocesses"):  # a core of those; -p no:xdist
        return
    alone = len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file()
    if option.numprocesses is None and not (alone or option.usepdb):
        option.numprocesses = min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1, 8)
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> None:
    """The Trainer collects garbage as it starts, which takes a third of a second where this much was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _accelerate_starts_afresh() -> None:
    """Whether it is in the middle of an accumulation window is one state for the whole process."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].GradientState._reset_state()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process, which is a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _ctrl_c_is_as_it_was() -> Iterator[None]:
    """A command that was interrupted in this process leaves at once when it is interrupted again."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if signal.getsignal(signal.SIGINT) is not before:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt, also where the tests run in the background and a shell has had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with CIFAR-10, CIFAR-100 and an SVHN sample in the layout of the Hub."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("AMP_PLUGIN_DATA_ROOT", beside))
    if not (root / "uoft-cs" / "cifar10").is_dir():
        pytest.skip("needs the real CIFAR-10: set AMP_PLUGIN_DATA_ROOT to a folder in the layout of the Hub")
    return root


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main job draws none, as where matplotlib is missing: that takes longer than its training."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were saved, to ask them what they show."""
    figure_module = pytest.importorskip("matplotlib.figure", reason="draws pictures")
    figures: list[Any] = []
    save = figure_module.Figure.savefig

    def remember(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(figure_module.Figure, "savefig", remember)
    yield figures
    assert figures, "nothing was saved"
