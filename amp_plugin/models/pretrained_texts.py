"""Text checkpoints to fine-tune, with their tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from amp_plugin.models.pretrained import PretrainedError, explained, pretrained_classifier

# What a tokenizer says that knows no limit is above this.
_NO_LIMIT = 10**6
_USUAL_LENGTH = 512


@dataclass(frozen=True)
class TextCheckpoint:
    """A text classifier to fine-tune.

    Attributes:
        model: with a head for the classes.
        new: names of the parameters that are not the checkpoint's.
        tokenizer: its own, able to pad.
        max_length: tokens of an example at most.
    """

    model: PreTrainedModel
    new: list[str]
    tokenizer: Any
    max_length: int


def text_checkpoint(name: str, class_names: Sequence[str], max_length: int | None = None) -> TextCheckpoint:
    """Load a checkpoint and its tokenizer.

    Args:
        name: an id on the Hugging Face Hub, or a folder.
        class_names: one name a class.
        max_length: tokens of an example at most; by default what the checkpoint takes, or 512 if it does not say.

    Raises:
        PretrainedError: it is out of reach, is no text model, has no tokenizer, or takes fewer tokens.
    """
    model, new = pretrained_classifier(AutoModelForSequenceClassification, name, class_names)
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:  # as decoders have none
        if tokenizer.eos_token is None:
            raise PretrainedError(f"pretrained {name!r}: its tokenizer has no token to pad batches with")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [n for n in (tokenizer.model_max_length, positions) if n is not None and n < _NO_LIMIT]
    longest = min(limits, default=None)
    if max_length is not None and (max_length < 1 or (longest is not None and max_length > longest)):
        raise PretrainedError(f"pretrained {name!r} takes 1 to {longest} tokens, but max_seq_length is {max_length}")
    return TextCheckpoint(model, new, tokenizer, max_length or longest or _USUAL_LENGTH)
