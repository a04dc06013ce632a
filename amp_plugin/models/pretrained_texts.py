"""Text checkpoints to fine-tune, with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from amp_plugin.models.pretrained import PretrainedError, explained, pretrained_classifier

_NO_LIMIT = 10**6  # a tokenizer without a limit reports a larger number
_USUAL_LENGTH = 512


@dataclass(frozen=True)
class TextCheckpoint:
    """A text classifier to fine-tune."""

    model: PreTrainedModel  # with a head for the classes
    new: list[str]  # names of the parameters that the checkpoint did not have
    tokenizer: Any  # tokenizer of the checkpoint, able to pad
    max_length: int  # largest number of tokens of an example


def text_checkpoint(name: str, class_names: Sequence[str], max_length: int | None = None) -> TextCheckpoint:
    """Load a checkpoint, an id on the Hugging Face Hub or a folder, and its tokenizer.

    An example has at most ``max_length`` tokens, by default the checkpoint's own limit, or 512 without one.
    """
    model, new = pretrained_classifier(AutoModelForSequenceClassification, name, class_names)
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.pad_token is None:  # decoders have none
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
