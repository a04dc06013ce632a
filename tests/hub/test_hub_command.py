"""What ``python -m amp_plugin.hub`` says of a folder that cannot be pushed; nothing asks the Hub."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from endings import error_of
from safetensors.torch import save_file

from amp_plugin.command import run_command
from amp_plugin.hub import HubError
from amp_plugin.hub.access import explained

command = importlib.import_module("amp_plugin.hub.__main__")
REPOSITORY = "ann/net"


def refusal(*arguments: str) -> str:
    return error_of(lambda: run_command(lambda: command.main(arguments), (FileNotFoundError, HubError, ValueError)))


@pytest.fixture(autouse=True)
def _whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("empty").mkdir()
    Path("file").write_text("")
    save_file({"weight": torch.ones(8)}, "run/model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", REPOSITORY], "folder: '' is no path"),
        (["\0", REPOSITORY], "folder: '\\x00' is no path"),
        (["nowhere", REPOSITORY], "there is no model to push in 'nowhere'"),
        (["empty", REPOSITORY], "there is no model to push in 'empty'"),
        (["file", REPOSITORY], "there is no model to push in 'file'"),
        (["run"], "the following arguments are required: repo_id"),
        ([], "the following arguments are required: folder, repo_id"),
        (["run", REPOSITORY, "main"], "unexpected 'main'"),
        (["run", REPOSITORY, "--privat"], "no option '--privat', did you mean '--private'"),
        (["run", ""], "repo_id is empty; give a value"),
        (["run", "a/b/c"], "cannot push to 'a/b/c' on the Hub"),
        (["run", "a b"], "cannot push to 'a b' on the Hub"),
        (["run", REPOSITORY], "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_push_that_cannot_be_meant_is_told(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amp_plugin.hub.access.get_token", lambda: "hf_token")
    assert said in refusal(*arguments)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", cut, "'run/model.safetensors' is damaged (Error while deserializing"),
        ("model.safetensors", lambda path: path.write_text("text"), "'run/model.safetensors' is damaged"),
        ("README.md", lambda path: path.write_bytes(b"caf\xe9"), "'run/README.md' is no text in UTF-8"),
        ("README.md", lambda path: path.mkdir(), "'run/README.md' is a folder, not a file"),
    ],
)
def test_a_damaged_folder_is_told(
    name: str, damage: Callable[[Path], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(*_: object, **__: object) -> None:
        with explained("the commit"):
            raise ValueError("no Hub here")

    monkeypatch.setattr("amp_plugin.hub.upload.require_write_access", lambda name, **_: name)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", push)
    damage(Path("run", name))
    found = refusal("run", REPOSITORY)
    assert said in found
    assert "no Hub here" not in found
