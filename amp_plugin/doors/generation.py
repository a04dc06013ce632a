"""Texts that a Trainer generates in the middle of its step, so that every pass of AMP would train on others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def generation_refused(model: nn.Module | None, trainer: str, unless: Callable[[], bool]) -> Iterator[None]:
    """Let ``model.generate`` raise a RuntimeError that says where generating has its place, unless this is the place.

    Args:
        model: model that is trained, without what is around it.
        trainer: name of the Trainer, for the error.
        unless: function that tells whether the model may generate now.
    """
    generate: Any = getattr(model, "generate", None)
    if model is None or not callable(generate):
        yield
        return
    attributes = vars(model)
    before = {name: attributes[name] for name in ("generate",) if name in attributes}

    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if unless():
            return generate(*args, **kwargs)
        raise RuntimeError(
            f"{trainer} generates in its training_step or compute_loss, which AMP calls in every pass of a step, so the"
            " passes would be on different texts. AMP goes with Trainers that generate in _prepare_inputs, as TRL's"
            " GRPOTrainer and RLOOTrainer do"
        )

    attributes["generate"] = checked
    try:
        yield
    finally:
        del attributes["generate"]
        attributes.update(before)
