"""Checkpoints to fine-tune: `transformers` classifiers with pretrained weights and a head for other classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import AutoConfig, PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification

from amp_plugin.files import FileError, check_safetensors, in_one_line, read_json


class PretrainedError(ValueError):
    """A checkpoint cannot be fine-tuned; the message names it and says why."""


def pretrained_classifier(auto_class: Any, name: str, class_names: Sequence[str]) -> tuple[PreTrainedModel, list[str]]:
    """Load a checkpoint with a head for other classes, which is drawn anew unless its shape is the checkpoint's.

    The checkpoint is an id on the Hugging Face Hub, or a folder that ``save_pretrained`` or timm's ``save_for_hf``
    wrote. With the model come the names of the parameters and running statistics that the checkpoint did not have.
    """
    config = checkpoint_config(auto_class, name)
    if isinstance(config, TimmWrapperConfig):  # the wrapper adds num_classes itself
        config.model_args = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
    config.problem_type = "single_label_classification"
    config.id2label = dict(enumerate(class_names))
    config.label2id = {label: i for i, label in enumerate(class_names)}
    with explained(name):
        model, info = auto_class.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False
        )
    drawn = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    counters = "num_batches_tracked"  # which nothing here reads
    new = [key for key in model.state_dict() if key in drawn and not key.endswith(counters)]
    head = set(head_parameters(model))
    backbone = [key for key, parameter in model.named_parameters() if parameter not in head]
    if 2 * len(drawn.intersection(backbone)) > len(backbone):
        raise PretrainedError(
            f"pretrained {name!r} holds the weights of another network: {len(drawn.intersection(backbone))} of"
            f" {len(backbone)} parameters of its {config.model_type} backbone are not there"
        )
    return model, new


def checkpoint_config(auto_class: Any, name: str) -> Any:
    """Return the configuration of a checkpoint that ``auto_class`` can open."""
    with explained(name):
        _check_files(name, "*config.json")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if type(config) not in auto_class._model_mapping:
        raise PretrainedError(
            f"pretrained {name!r} is a {config.model_type} model, for which there is no {auto_class.__name__};"
            " choose a checkpoint of another kind, or a data set of what it reads"
        )
    return config


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of the classification head, which lie outside the pretrained backbone."""
    if isinstance(model, TimmWrapperForImageClassification):
        heads = model.timm_model.get_classifier()
        return [p for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()]
    backbone = set(model.base_model.parameters())
    return [p for p in model.parameters() if p not in backbone]


def freeze_backbone(model: PreTrainedModel) -> None:
    """Train the head alone: the backbone gets no gradient, and its BatchNorm keeps the checkpoint's statistics."""
    head = set(head_parameters(model))
    if not head:
        raise ValueError(f"{type(model).__name__} has no head apart from its backbone, so freezing it leaves nothing")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in head)
    for module in model.modules():
        if isinstance(module, _NormBase) and head.isdisjoint(module.parameters()):
            module.register_forward_pre_hook(_stay_in_eval_mode)


def _stay_in_eval_mode(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    module.eval()  # a Trainer puts the whole model into training mode at every step


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the exceptions of transformers about a checkpoint into one `PretrainedError`."""
    if (os.path.isabs(name) or name.startswith((".", "~"))) and not os.path.isdir(name):
        raise PretrainedError(f"pretrained {name!r}: there is no such folder")
    try:
        try:
            yield
        except FileError:
            raise
        except Exception:  # a value in the configuration may lead to any
            _check_files(name, "*.json")  # the error itself seldom says which file it is about
            raise
    except FileError as error:
        raise PretrainedError(f"pretrained {name!r}: {error}") from error
    except Exception as error:
        where = "the folder is no checkpoint" if os.path.isdir(name) else "no such folder, and the Hub does not give it"
        raise PretrainedError(f"pretrained {name!r}: {where}: {in_one_line(error)}") from error


def _check_files(name: str, configurations: str) -> None:
    """Raise a `FileError` if the weights or a configuration, in a folder or in the cache of the Hub, are damaged."""
    cached = None if os.path.isdir(name) else try_to_load_from_cache(name, "config.json")
    folder = Path(name) if os.path.isdir(name) else Path(cached).parent if isinstance(cached, str) else None
    if folder is None:
        return
    advice = "make or fetch the checkpoint anew" if cached is None else f"delete {folder}, and it is fetched anew"
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path, advice)
    for path in sorted(folder.glob(configurations)):
        if not isinstance(read_json(path, advice), dict):
            raise FileError(f"{str(path)!r} is damaged (it is no JSON object); {advice}")


@torch.no_grad()
def accepts(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> str | None:
    """Say why the model cannot take such a batch; return None if it can."""
    training = model.training
    try:
        model.eval()(**inputs)
    except Exception as error:  # each architecture fails in its own way
        return in_one_line(error)
    finally:
        model.train(training)
    return None
