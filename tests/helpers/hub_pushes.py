"""Pushes through all of the package's doors and through faults, in one process: ``hub_pushes.py FOLDER``.

The Hub is in this process too. What happened goes to FOLDER/happened.json, what was published to FOLDER/OWNER/NAME.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hub_server import Fault, Hub, environment, hub_server

TOKENS = {"no token": None, "read-only": "hf_reader", "invalid": "hf_gone", "narrow": "hf_narrow"}
FAULTS = {
    "401": [Fault("POST", "/commit/", 401)],
    "403": [Fault("POST", "/commit/", 403)],
    "409": [Fault("POST", "/commit/", 409)],
    "429": [Fault("POST", "/preupload/", 429, times=99)],
    "500": [Fault("PUT", "/lfs/", 500, times=99)],
    "cut": [Fault("PUT", "/lfs/", None, times=99)],
    # The client overcomes these by itself.
    "429 once": [Fault("POST", "/preupload/", 429, headers={"Retry-After": "7"})],
    "cut once": [Fault("PUT", "/lfs/", None), Fault("POST", "/lfs/verify", 500)],
}


def main(folder: Path, hub: Hub) -> None:
    import huggingface_hub
    import timm
    import torch
    from huggingface_hub.utils import _http
    from peft import LoraConfig, get_peft_model
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        TimmWrapperConfig,
        TimmWrapperForImageClassification,
    )

    from amp_plugin import AMPTrainer, AMPTrainingArguments
    from amp_plugin.hub import HubError, push, push_folder, require_write_access
    from amp_plugin.train import job
    from amp_plugin.train.trainer import RecipeTrainer

    waits: list[float] = []
    _http.time = SimpleNamespace(sleep=waits.append)  # the client's waits between its own attempts
    happened: dict[str, Any] = {}

    def problem(do: Callable[[], Any]) -> str:
        try:
            do()
        except HubError as error:
            return str(error)
        return ""

    small = {"width": 4, "layers": [1, 1, 1, 1], "num_classes": 3}
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(12)]

    # A timm model.
    torch.manual_seed(1)
    model = timm.create_model("preactresnet18", **small)
    push(model, "ann/plain", class_names=["cat", "dog", "owl"], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    torch.save(model.eval()(torch.ones(2, 3, 32, 32)), folder / "plain.pt")

    # AMPTrainer with a wrapper made from a configuration, whose weights have names that timm does not know.
    config = {"architecture": "preactresnet18", "num_labels": 3, "model_args": {"width": 4, "layers": [1, 1, 1, 1]}}
    wrapper = TimmWrapperForImageClassification(
        TimmWrapperConfig(**config, pretrained_cfg={"input_size": [3, 32, 32]}, label_names=["cat", "dog", "owl"])
    )
    args = AMPTrainingArguments(
        str(folder / "trained"),
        push_to_hub=True,
        hub_model_id="trained",
        hub_always_push=True,  # however long the first one takes to fail
        save_strategy="epoch",
        per_device_train_batch_size=4,
        num_train_epochs=2,
        eval_strategy="epoch",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        fp16=False,
    )
    trainer = AMPTrainer(model=wrapper, args=args, train_dataset=data, eval_dataset=data)
    happened["id before training"] = trainer.hub_model_id
    hub.faults = [Fault("POST", "/commit/", 403)]  # the push of the first checkpoint
    trainer.train()
    happened["commits while training"] = list(hub.model("ann/trained").commits)
    trainer.push_to_hub()
    torch.save(wrapper.eval()(torch.ones(2, 3, 32, 32)).logits.detach(), folder / "trained.pt")

    # Adapters of a language model from the Hub.
    torch.manual_seed(2)
    language = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    language.save_pretrained(folder / "ann" / "base")
    language.name_or_path = language.config._name_or_path = "ann/base"  # as if it had been loaded from there
    adapters = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    adapted = get_peft_model(language, adapters)
    tokens = torch.arange(8)
    args = dataclasses.replace(args, output_dir=str(folder / "adapted"), hub_model_id="adapted", eval_strategy="no")
    trainer = AMPTrainer(model=adapted, args=args, train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8)
    trainer.train()
    trainer.push_to_hub()
    torch.save(adapted.eval()(tokens[None]).logits.detach(), folder / "adapted.pt")

    # What is known before a training.
    calls: list[str] = []
    RecipeTrainer.train = lambda *args, **kwargs: calls.append("trained")  # type: ignore[method-assign]
    hub.repositories["datasets", "ann/pets"] = hub.repositories["spaces", "ann/demo"] = dataclasses.replace(
        hub.model("ann/plain")
    )
    names = {**dict.fromkeys(TOKENS, "plain"), "data set": "ann/pets", "space": "ann/demo", "a bad name": "a b"}
    refused = {}
    for case, name in {**names, "another's": "bob/x", "offline": "plain", "no network": "plain"}.items():
        token = TOKENS.get(case, "hf_writer")
        os.environ.pop("HF_TOKEN")
        os.environ.update({} if token is None else {"HF_TOKEN": token})
        endpoint, huggingface_hub.constants.ENDPOINT = hub.endpoint, hub.endpoint
        if case == "no network":
            huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
        huggingface_hub.constants.HF_HUB_OFFLINE = case == "offline"
        command = ["--push_to_hub", "--hub_model_id", name, "--use_cpu", "true", "--output_dir", str(folder / "job")]
        refused[case] = problem(lambda command=command: job.main(command))
        huggingface_hub.constants.ENDPOINT, huggingface_hub.constants.HF_HUB_OFFLINE = endpoint, False
        os.environ["HF_TOKEN"] = "hf_writer"
    happened["refused"], happened["started to train"] = refused, calls

    # Faults while a run is pushed, and the same push again.
    run = folder / "trained"
    before = digest(run)
    for case, faults in FAULTS.items():
        hub.large, hub.verified = {}, set()
        name = f"ann/{case.replace(' ', '-')}"
        require_write_access(name)
        waits.clear()
        hub.faults = [dataclasses.replace(fault) for fault in faults]
        error = problem(lambda name=name: push_folder(run, name))
        met = [f.times for f in hub.faults] != [f.times for f in faults]
        hub.faults = []
        happened[case] = {
            "met": met,
            "error": error,
            "waits": list(waits),
            "published meanwhile": len(hub.model(name).files),
            "same files": digest(run) == before,
        }
        push_folder(run, name)
        happened[case]["published"] = sorted(hub.model(name).files)
        happened[case]["weights"] = hashlib.sha256(hub.model(name).files["model.safetensors"]).hexdigest()
    (folder / "happened.json").write_text(json.dumps(happened))
    for name in ("ann/plain", "ann/trained", "ann/adapted"):
        for path, content in hub.model(name).files.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_bytes(content)


def digest(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with hub_server() as server:
        os.environ.update(environment(server, target / "home"))
        main(target, server)
