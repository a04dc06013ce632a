"""Test models published on a Hub (on loopback) by the stock client, and opened from there in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_pushes import FAULTS, TOKENS
from hub_server import Hub, Repository, card_errors, environment, hub_server
from main_job import QUICK, SCRIPT
from repository import HELPERS, ROOT
from safetensors.torch import load_file, save_file

import amp_plugin  # noqa: F401  # registers the architectures
from amp_plugin.hub import HubError, push_folder

NAME = "ann/first-run"
JOB = [
    *QUICK,
    *("--output_dir", "out", "--push_to_hub", "--hub_model_id", NAME, "--hub_token", "hf_writer"),
    *("--compare_with", "other"),
]

OTHER = {
    "commit": None,
    "versions": {},
    "settings": {"optim": "sgd", "seed": 3, "weight_decay": 1e-4},
    "metrics": {"eval_accuracy": 0.25, "eval_error": 75.0, "eval_nll": 2.125, "eval_ece": 0.0625},
}


def run(
    folder: Path, variables: dict[str, str], *command: str, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | variables
    environ |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, *command)
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def job(hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the main job, which publishes its model beside the record of another run."""
    (folder / "other").mkdir()
    (folder / "other" / "run.json").write_text(json.dumps(OTHER))
    return run(folder, environment(hub, folder / "home", token=None), str(SCRIPT), *JOB)


@pytest.fixture(scope="module")
def happened(folder: Path) -> dict[str, Any]:
    run(folder, {}, str(HELPERS / "hub_pushes.py"), str(folder))
    return json.loads((folder / "happened.json").read_text())


@pytest.fixture(scope="module")
def opened(hub: Hub, folder: Path, job: Any, happened: Any) -> Path:
    """Open the published models in a fresh process with empty caches."""
    names = ["ann/plain", "ann/trained"]
    for name in [*names, "ann/base", "ann/adapted"]:
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        hub.repositories["models", name] = Repository(files)
    run(folder, environment(hub, folder / "fresh", token=None), str(HELPERS / "hub_loads.py"), ".", *names, NAME)
    return folder


def test_the_main_job_publishes_its_model_without_pickles(hub: Hub, folder: Path, job: Any) -> None:
    files, local = hub.model(NAME).files, {path.name for path in (folder / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "run.json", "training_args.bin"} <= local
    assert files.keys() == local - {"training_args.bin"}
    assert job.stdout.splitlines()[-1] == f"published: {hub.endpoint}/{NAME}"
    assert f"PUT /lfs/{next(iter(hub.large))}" in hub.requests, "the weights went the way of large files"
    assert hub.large.keys() == hub.verified
    assert not any(b"hf_writer" in content for content in files.values()), "a token is published"
    assert hub.model(NAME).commits == ["End of training"]


@pytest.mark.slow
@pytest.mark.parametrize("token", ["hf_writer", "hf_reader"])
def test_several_processes_publish_once_or_all_end_before_the_training(hub: Hub, tmp_path: Path, token: str) -> None:
    name = f"ann/two-{token.replace('_', '-')}"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps(OTHER))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(SCRIPT), *JOB, "--hub_model_id", name, "--hub_token", token]
    done = run(tmp_path, environment(hub, tmp_path / "home", token=None), *command, fails=token == "hf_reader")
    if token == "hf_reader":
        assert "the token of 'ann' may only read" in done.stderr
        assert ("models", name) not in hub.repositories
        assert "epoch" not in done.stdout
    else:
        assert hub.model(name).commits == ["End of training"]
        assert done.stdout.count("published: ") == 1
        assert {"README.md", "config.json", "model.safetensors"} <= hub.model(name).files.keys()


def test_the_published_card_is_valid_and_true(hub: Hub, folder: Path, job: Any) -> None:
    card = hub.model(NAME).files["README.md"].decode()
    assert card_errors(card) == []
    metrics = json.loads((folder / "out" / "all_results.json").read_text())
    assert f"| **this model (AMP around SGD)** | {metrics['eval_accuracy']:.4f} | {metrics['eval_error']:.2f} |" in card
    assert "| SGD, without AMP | 0.2500 | 75.00 | 2.1250 | 0.0625 |" in card
    assert "The runs also differ in: `seed` `3`, here `42`." in card
    assert f'timm.create_model("hf-hub:{NAME}", pretrained=True)' in card
    (command,) = card.split("```bash\n")[1:]
    assert "--train_images 60" in command
    assert not any(word in command.split("```")[0] for word in ("hub", "hf_writer", "output_dir", "compare_with"))
    assert "fine-tuned" not in card
    assert "Native AMP" not in card


def published_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / ("out" if name == NAME else name) / "model.safetensors")


@pytest.mark.parametrize("name", [NAME, "ann/plain", "ann/trained"])
def test_a_published_model_opens_everywhere_with_the_same_logits(opened: Path, name: str) -> None:
    found = torch.load(opened / name / "logits.pt", weights_only=False)
    classes = 10 if name == NAME else 3
    model = timm.create_model("preactresnet18", width=4, layers=[1, 1, 1, 1], num_classes=classes)
    model.load_state_dict(published_weights(opened, name))
    with torch.no_grad():
        logits = model.eval()(torch.ones(2, 3, 32, 32))
    if name != NAME:  # the logits were kept before the push
        assert torch.equal(logits, torch.load(opened / f"{name.split('/')[1]}.pt", weights_only=True))
    assert torch.equal(found["timm"], logits)
    assert torch.equal(found["transformers"], logits)
    torch.testing.assert_close(found["scores of timm"], found["scores of transformers"])
    torch.testing.assert_close(found["scores of the pipeline"], found["scores of transformers"])
    assert found["names"][0] == found["names"][1]
    assert len(found["names"][0]) == classes


def test_published_adapters_open_on_their_base_model_as_their_card_says(opened: Path) -> None:
    published = {path.name for path in (opened / "ann" / "adapted").iterdir()} - {"logits.pt"}
    assert published == {"README.md", "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"}
    torch.testing.assert_close(
        torch.load(opened / "ann" / "adapted" / "logits.pt"), torch.load(opened / "adapted.pt"), rtol=0, atol=0
    )


def test_a_timm_model_keeps_its_class_names_and_normalisation(opened: Path) -> None:
    found = torch.load(opened / "ann/plain" / "logits.pt", weights_only=False)
    assert found["names"][0] == ["cat", "dog", "owl"]
    assert (list(found["data"]["mean"]), list(found["data"]["std"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_what_forbids_a_push_is_told_before_the_training(happened: dict[str, Any]) -> None:
    messages = {
        "no token": "there is no token: log in with `hf auth login`",
        "read-only": "the token of 'ann' may only read",
        "invalid": "the token is not valid",
        "narrow": "the token has no write permission there",
        "another's": "the token has no write permission there",
        "data set": "it is a dataset; give the model a name of its own (--hub_model_id)",
        "space": "it is a space; give the model a name of its own (--hub_model_id)",
        "a bad name": "Repo id must use alphanumeric chars",
        "offline": "HF_HUB_OFFLINE is set",
        "no network": "no connection to http://127.0.0.1:9",
    }
    assert messages.keys() == happened["refused"].keys() >= TOKENS.keys()
    for case, message in messages.items():
        assert message in happened["refused"][case], case
    assert happened["started to train"] == []


def test_a_checkpoint_that_cannot_be_pushed_does_not_stop_the_training(happened: dict[str, Any]) -> None:
    assert happened["id before training"] == "ann/trained"
    assert happened["commits while training"] == ["Training in progress, step 6"]


@pytest.mark.parametrize("case", FAULTS)
def test_a_failed_push_loses_nothing_and_can_be_repeated(happened: dict[str, Any], case: str) -> None:
    result = happened[case]
    assert result["met"], "the fault never came"
    assert result["same files"]
    if case.endswith("once"):
        assert result["error"] == ""
    else:
        said = "no connection" if case == "cut" else f"(status {case}"
        assert said in result["error"]
        assert result["error"].endswith(f"/trained ann/{case}")
        assert "push it with: python -m amp_plugin.hub" in result["error"]
        assert result["published meanwhile"] == 0, "a commit is all or nothing"
    assert result["published"] == ["README.md", "config.json", "model.safetensors"]
    assert result["weights"] == happened["401"]["weights"]


def test_weights_that_are_not_whole_are_told_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(8)}, weights)
    weights.write_bytes(weights.read_bytes()[:-4])
    monkeypatch.setattr("amp_plugin.hub.upload.require_write_access", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(HubError, match=r"model\.safetensors' is damaged .*; train or save again\. Nothing was pushed"):
        push_folder(tmp_path, NAME)


def test_the_client_waits_as_long_as_the_hub_asks(happened: dict[str, Any]) -> None:
    assert happened["429 once"]["waits"] == [8.0]
