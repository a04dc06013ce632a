"""Upload a run's folder, or a timm model, to the Hub in one commit without pickles, which can be repeated."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

from amp_plugin.files import FileError, check_safetensors, read_text
from amp_plugin.hub.access import HubError, explained, hub_api, require_write_access
from amp_plugin.hub.card import PLACEHOLDER, Run, model_card, with_later_pictures

WEIGHTS = "model.safetensors"
_CARD = "README.md"
# transformers' wrapper of timm models adds it to the parameters' names, but reads the names without it too.
_WRAPPER_PREFIX = "timm_model."
# Pickles run code when they are opened. Folders of checkpoints and what begins with "_" are the Trainer's own.
_PICKLES = ("*.bin", "*.ckpt", "*.pickle", "*.pkl", "*.pt", "*.pth")
_LEFT_OUT = ("_*", ".*", "*/.*", "checkpoint-*", "*/checkpoint-*", *_PICKLES)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload the model",
) -> CommitInfo:
    """Push the folder of a finished run: weights, configuration, card and pictures, but no pickles or checkpoints.

    There is one commit, so the repository has the whole folder or what it had before; the folder is not changed. After
    a failure the push can be repeated, and goes on with the large files that have not arrived yet.

    Args:
        folder: folder with ``model.safetensors`` (or its shards, or an adapter's), ``config.json`` and ``README.md``.
        repo_id: ``OWNER/NAME``, or ``NAME`` for the token's owner; made if it does not exist.
        token: token with write permission, default the one that is logged in.
        private: whether a repository that has to be made is private.
        revision: branch, default ``main``.
        commit_message: message of the commit.

    Returns:
        The commit; its ``repo_url`` is the address of the repository.

    Raises:
        FileNotFoundError: there is nothing to push.
        HubError: the folder cannot be pushed; the message names the command that repeats the push.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"there is no model to push in {str(folder)!r}: no {WEIGHTS}. Give the output folder of a finished run, or"
            " one that save_pretrained wrote"
        )
    advice = "train or save again. Nothing was pushed"
    try:
        for path in files:
            check_safetensors(path, advice)
        if (card := folder / _CARD).exists():
            read_text(card, "write the card in UTF-8. Nothing was pushed")
    except FileError as error:
        raise HubError(str(error)) from error
    repo_id = require_write_access(repo_id, token=token, private=private)
    return upload(folder, repo_id, token=token, revision=revision, commit_message=commit_message)


def push(
    model: nn.Module,
    repo_id: str,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    run: Run | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload the model",
) -> CommitInfo:
    """Push a timm model, so that timm and transformers open it; `push_folder` describes the arguments not named here.

    Args:
        model: model made by `timm.create_model`.
        class_names: one name a class.
        mean: mean per channel, of pixels in [0, 1], default that of the model's ``pretrained_cfg``.
        std: standard deviation per channel, of pixels in [0, 1], default that of the model's ``pretrained_cfg``.
        run: data, settings and results for the card, default the architecture alone.

    Raises:
        ValueError: the model is not timm's, or the number of names is not that of its classes.
        HubError: the model cannot be pushed.
    """
    settings: Any = getattr(model, "pretrained_cfg", None)
    if settings is None:
        raise ValueError(
            f"push takes a model of timm.create_model, not {type(model).__name__}; for others: push_folder"
        )
    classes = int(getattr(model, "num_classes", 0))
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names has {len(class_names)} names, but the model {classes} classes")
    repo_id = require_write_access(repo_id, token=token, private=private)
    run = run or Run(name=repo_id.split("/")[-1], architecture=settings["architecture"], library="timm")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config: dict[str, Any] = {} if class_names is None else {"label_names": list(class_names)}
        save_for_hf(model, temporary, model_config=config, safe_serialization=True)
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        saved.get("model_args", {}).pop("num_classes", None)  # transformers would pass it twice
        saved["pretrained_cfg"].update({k: list(v) for k, v in {"mean": mean, "std": std}.items() if v is not None})
        (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
        model_card(run).save(folder / _CARD)
        return upload(folder, repo_id, token=token, revision=revision, commit_message=commit_message, lasting=False)


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | None,
    revision: str | None,
    commit_message: str,
    path_in_repo: str = "",
    complete: bool = False,
    lasting: bool = True,
) -> CommitInfo:
    """Upload a folder, as `push_folder` does, to a repository that is there and writable.

    A `complete` upload has the pickles too, for a checkpoint to resume from; a `lasting` folder outlives a failure.
    """
    repeat = f"python -m amp_plugin.hub {shlex.quote(str(folder))} {repo_id}"
    then = f". Nothing is lost: everything is in {str(folder)!r}; push it with: {repeat}" if lasting else ""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    chosen = filter_repo_objects(files, ignore_patterns=None if complete else list(_LEFT_OUT))
    with (
        explained(f"could not push {str(folder)!r} to {repo_id!r} on the Hub", then),
        tempfile.TemporaryDirectory() as temporary,
    ):
        operations = [
            CommitOperationAdd(f"{path_in_repo}/{name}".lstrip("/"), _content(files[name], repo_id, Path(temporary)))
            for name in chosen
        ]
        return hub_api(token).create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def upload_later(
    folder: Path, repo_id: str, failed: Callable[[str], None], **settings: Any
) -> Future[CommitInfo | None]:
    """Upload a copy of the folder as it is now, in the background; `failed` gets the reason if that cannot be done."""
    copied = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    shutil.copytree(folder, copied.name, dirs_exist_ok=True)

    def work() -> CommitInfo | None:
        with copied:
            try:
                return upload(Path(copied.name), repo_id, lasting=False, **settings)
            except Exception as error:
                failed(str(error))
                return None

    return hub_api(settings["token"]).run_as_future(work)


def _content(path: Path, repo_id: str, temporary: Path) -> Path | bytes:
    """Return what to upload: the file, but timm's names for weights, and the card with repository and pictures."""
    if path.name == _CARD:
        try:
            card = path.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
        except UnicodeDecodeError as error:
            raise HubError(f"{path.name} is not UTF-8 ({error})") from error
        return with_later_pictures(card, path.parent).encode()
    if path.name == WEIGHTS:
        with safe_open(path, "pt") as file:
            wrapped = all(name.startswith(_WRAPPER_PREFIX) for name in file.keys())  # noqa: SIM118
        if wrapped:
            weights = {name.removeprefix(_WRAPPER_PREFIX): tensor for name, tensor in load_file(path).items()}
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            return temporary / WEIGHTS
    return path
