"""The README and the guides: snippets run as they stand, the options of commands exist, links lead somewhere."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pages
import pytest
import torch
from accelerate.state import AcceleratorState
from pages import Block
from PIL import Image
from torch import distributed, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from amp_plugin import AMP, Perturbation
from amp_plugin.core.optimizer import _instances
from amp_plugin.models.classifier import image_classifier

PAGES = [pages.README, *pages.GUIDES]
SNIPPETS = [block for page in PAGES for block in pages.blocks(page)]
COMMANDS = [block for page in PAGES for block in pages.blocks(page, "bash")]
# A snippet that does this has to train with AMP.
TRAINS = re.compile(r"(optimizer|scaler)\.step\(|\.train\(\)$|trainer\.train\(", re.MULTILINE)


class Autocast(torch.autocast):
    """In bf16 where a snippet has fp16, which a CPU without arithmetic for it computes ninety times as slowly."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(device_type, torch.bfloat16 if dtype == torch.float16 else dtype, **kwargs)


class Training:
    """How often the weights were perturbed, and how often a base optimizer made a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ascents = self.steps = 0
        ascend = Perturbation.ascend

        def counted(*args: Any, **kwargs: Any) -> None:
            self.ascents += 1
            ascend(*args, **kwargs)

        monkeypatch.setattr(Perturbation, "ascend", counted)
        self.handle = register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p) for amp in _instances for group in amp.param_groups for p in group["params"]}
        beside = not any(id(p) in held for group in optimizer.param_groups for p in group["params"])
        if not isinstance(optimizer, AMP) and not (beside and self.ascents):  # a second optimizer beside AMP
            self.steps += 1


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    training = Training(monkeypatch)
    yield training
    training.handle.remove()


@pytest.fixture
def one_process(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, for scripts what a launcher sets for one process, and what takes less time on a CPU."""
    monkeypatch.chdir(tmp_path)
    block = request.getfixturevalue("block")
    if block.script:
        launches = [
            commands.launched(words) for other in pages.blocks(block.page, "bash") for words in other.commands()
        ]
        monkeypatch.setattr(sys, "argv", next([script, *words] for script, words in launches if script == block.script))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launcher.items():
            monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "autocast", Autocast)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    torch._dynamo.reset()


def namespace_of_a_reader(folder: Path, *, transformers: bool) -> dict[str, Any]:
    """What bare pages take a reader to have."""
    model = image_classifier("preactresnet18", "abcd", mean=[0.5] * 3, std=[0.2] * 3, width=2, layers=(1, 1, 1, 1))
    model.save_pretrained(folder / "runs" / "cifar10_sample-preactresnet18-amp-seed42")
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(4, (8,))
    return {
        "model": model if transformers else model.timm_model,
        "optimizer": AMP(model.timm_model.parameters(), lr=0.1),
        "images": images,
        "labels": labels,
        "criterion": nn.CrossEntropyLoss(),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=4),
        "dataset": [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)],
        "image": Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)),
    }


@pytest.mark.parametrize("block", SNIPPETS, ids=str)
@pytest.mark.usefixtures("one_process")
def test_a_snippet_runs_and_trains_with_amp(block: Block, tmp_path: Path, training: Training) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if block.page in pages.BARE:
        namespace |= namespace_of_a_reader(tmp_path, transformers="Trainer(" in block.code)
    before = pages.setup(block)
    for part in [block] if before is None else [before, block]:
        exec(part.compiled(), namespace)
    assert not any(amp.perturbed for amp in _instances)
    if TRAINS.search(block.code):
        assert training.steps > 0, "nothing was trained"
        every_step = "ascent=" not in block.code  # a policy may leave some out
        assert training.ascents >= (training.steps if every_step else 1), "some steps were without AMP"


@pytest.mark.parametrize("block", [b for page in PAGES for b in pages.blocks(page, "python theirs")], ids=str)
def test_code_of_other_libraries_runs_where_they_are_installed(block: Block) -> None:
    library = re.match(r"from (\w+)[.\w]* import", block.code)
    code, before = block.compiled(), pages.blocks(block.page)[0].compiled()
    assert library is not None
    if importlib.util.find_spec(library[1]) is not None:
        namespace: dict[str, Any] = {}
        exec(before, namespace)
        exec(code, namespace)


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_the_options_of_commands_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pages.ROOT)
    for words in block.commands():
        commands.check(words, scripts={b.script for b in pages.blocks(block.page) if b.script})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    targets += re.findall(r"(?:src|srcset)=\"(?!https?://)([^\"]+)\"", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in COMMANDS if commands.starts_own_script(b)], ids=str)
def test_scripts_run_in_several_processes(block: Block, tmp_path: Path) -> None:
    for script in pages.blocks(block.page):
        if script.script:
            (tmp_path / script.script).write_text(script.code)
    for words in block.commands():
        commands.run(words, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("AMP_PLUGIN_TIMM_TRAIN" not in os.environ, reason="needs timm's train.py in AMP_PLUGIN_TIMM_TRAIN")
@pytest.mark.parametrize("block", [b for b in COMMANDS if "train.py --data-dir images" in b.code], ids=str)
def test_timms_script_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one epoch in one process on the CPU, where it cannot use DDP, with the folder that a snippet writes."""
    monkeypatch.chdir(tmp_path)
    [folder] = [b for b in pages.blocks(block.page) if 'Path("images")' in b.code]
    namespace: dict[str, Any] = {}
    for part in (pages.setup(folder), folder):
        assert part is not None
        exec(part.compiled(), namespace)
    for image in list(Path("images").rglob("*.png")):
        if int(image.stem) >= 200:  # some of every class are enough
            image.unlink()
    shutil.copy(os.environ["AMP_PLUGIN_TIMM_TRAIN"], tmp_path / "train.py")
    for words in block.commands():
        words = [
            "1" if before == "--nproc_per_node" else word for before, word in zip(["", *words], words, strict=False)
        ]
        printed = commands.run([*words, "--epochs", "1", "--device", "cpu", "--workers", "0"], tmp_path)
        assert "Adversarial Model Perturbation is attached to ClassificationTask: AMP" in printed
