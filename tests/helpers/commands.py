"""The shell commands of the README and the guides: what they ask for is there, by the parsers they will meet."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
from accelerate.commands.launch import launch_command_parser
from pages import ROOT, Block, blocks
from timm.optim import create_optimizer_v2
from timm.utils import ParseKwargs
from torch import nn
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser

import amp_plugin
from amp_plugin import AMPTrainingArguments
from amp_plugin.train.options import parse

NEEDS = {"finetune_lora": "peft", "finetune_sft": "trl"}  # what recipes import that is not the package's


def check(words: list[str], scripts: set[str]) -> None:
    """Raise or exit, as the program would, unless the command names options that exist.

    Args:
        words: the command.
        scripts: files that its page has told the reader to save.
    """
    script, arguments = launched(words)
    arguments = ["." if word.startswith("/path/to/") else word for word in arguments]  # for a folder of the reader's
    if script in scripts and arguments:
        HfArgumentParser(AMPTrainingArguments).parse_args_into_dataclasses(arguments)
    elif script in scripts:
        pass
    elif script == "train.py":
        _check_timm(arguments)
    elif script in ("recipes/train.py", "amp_plugin.train"):
        parse(arguments)
    elif script == "amp_plugin.flatness":
        importlib.import_module("amp_plugin.flatness.__main__").parse(arguments)
    else:
        assert (ROOT / script).is_file(), f"{script} is neither in the repository nor on the page"
        name = Path(script).stem
        if name not in NEEDS:
            importlib.import_module(name).parse(arguments)
        elif importlib.util.find_spec(NEEDS[name]) is not None:
            importlib.import_module(name).parse([*arguments, "--use_cpu", "true"])  # where there is no GPU


def launched(words: list[str]) -> tuple[str, list[str]]:
    """The script, or module, that a command starts, and its arguments."""
    words = list(words)
    while "=" in words[0]:
        words.pop(0)
    program, *words = words
    name = Path(program).name
    if name == "torchrun":
        named = get_args_parser().parse_args(words)
        return named.training_script, named.training_script_args
    if name == "accelerate":
        assert words.pop(0) == "launch"
        named = launch_command_parser().parse_args(words)
        return named.training_script, named.training_script_args
    assert name in ("python", "python3"), f"unknown program {name}"
    if words[0] == "-m":
        words.pop(0)
    return words[0], words[1:]


def starts_own_script(block: Block) -> bool:
    """Whether a block starts nothing but scripts that its page shows, with torchrun, which needs no accelerator."""
    own = {b.script for b in blocks(block.page) if b.script}
    return all("torchrun" in words and launched(words)[0] in own for words in block.commands())


def run(words: list[str], folder: Path) -> str:
    """Run a command in a folder, with the programs of this environment; what it printed."""
    words = list(words)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    modules = {"torchrun": ["torch.distributed.run"], "accelerate": ["accelerate.commands.accelerate_cli"]}
    words = [sys.executable, *(["-m", *modules[words[0]]] if words[0] in modules else []), *words[1:]]
    ran = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def _check_timm(arguments: list[str]) -> None:
    """timm's own script is not in its wheel, so without it only what it hands to timm and to this package."""
    if script := os.environ.get("AMP_PLUGIN_TIMM_TRAIN"):
        _parse_as(Path(script), arguments)
    values = _values(arguments)
    assert amp_plugin.__name__ in values["--device-modules"]
    [model], [optimizer] = values["--model"], values["--opt"]
    assert timm.is_model(model)
    assert optimizer in timm.optim.list_optimizers()
    action: Any = type("Namespace", (), {})()
    ParseKwargs(["--opt-kwargs"], "opt_kwargs")(None, action, values.get("--opt-kwargs", []))  # type: ignore[arg-type]
    create_optimizer_v2(nn.Linear(2, 2), opt=optimizer, lr=0.1, **action.opt_kwargs)


def _parse_as(script: Path, arguments: list[str]) -> None:
    sys.path.insert(0, str(script.parent))
    try:
        spec = importlib.util.spec_from_file_location("timm_train_py", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    module.parser.parse_args(arguments)


def _values(arguments: list[str]) -> dict[str, list[str]]:
    """The values after each option."""
    values: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("-"):
            name = word
            values[name] = []
        else:
            values[name].append(word)
    return values
