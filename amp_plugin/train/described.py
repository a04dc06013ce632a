"""What a run was trained with, in words, from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amp_plugin.train.method_options import RADII, MethodArguments
from amp_plugin.trainer.described import optimizer_in_words, settings_in_words


def methods_in_words(settings: Mapping[str, Any]) -> dict[str, str]:
    """The methods in use but for AMP, with what they are set to; dropout is the model's own business.

    Args:
        settings: by name, of a recorded run or the ``vars`` of `MethodArguments`.
    """
    words: dict[str, str] = {}
    option, _ = RADII.get(str(settings.get("optim")), (None, None))
    if option is not None:
        per_tensor = settings.get("optim") == "rmp" and settings.get("amp_norm") == "tensor"
        ball = "one ball per parameter tensor" if per_tensor else "one ball for all parameters"
        words[_rival(settings)] = f"{option.partition('_')[2]} {settings[option]:g}, {ball}"
    if smoothing := settings.get("label_smoothing_factor"):
        words["label smoothing"] = f"{smoothing:g}"
    if (level := settings.get("flood_level")) is not None:
        words["flooding"] = f"level {level:g}"
    if (alpha := settings.get("mixup_alpha")) is not None:
        words["mixup"] = f"proportions from Beta({alpha:g}, {alpha:g})"
    if (epsilon := settings.get("adversarial_epsilon")) is not None:
        words["adversarial training"] = f"FGSM, epsilon {epsilon:.3g} of pixels in [0, 1]"
    return words


def objectives(settings: Mapping[str, Any]) -> list[str]:
    """The names of those that go with any optimizer."""
    return [name for name in methods_in_words(settings) if name != _rival(settings)]


def trained_with(settings: Mapping[str, Any], optimizer: str | None = None) -> str:
    """E.g. "AMP around SGD", "SAM around SGD, without AMP", "SGD, without AMP, with mixup".

    Args:
        settings: see `methods_in_words`.
        optimizer: in words, but for a rival; by default as far as ``optim`` tells.
    """
    optim = str(settings.get("optim"))
    if optim in RADII:
        optimizer = f"{_rival(settings)} around SGD, without AMP"
    elif optimizer is None:
        optimizer = {"amp": "AMP around SGD", "sgd": "SGD, without AMP"}.get(optim, optim)
    added = objectives(settings)
    return f"{optimizer}, with {' and '.join(added)}" if added else optimizer


def card_words(args: MethodArguments) -> dict[str, Any]:
    """Fields ``optimizer`` and ``settings`` of `amp_plugin.hub.Run`."""
    settings = settings_in_words(args)
    if args.rival is not None:
        settings["optimizer"] = f"{_rival(vars(args))} around {settings['optimizer']}"
    return {
        "optimizer": trained_with(vars(args), optimizer_in_words(args)),
        "settings": {**settings, **methods_in_words(vars(args))},
    }


def _rival(settings: Mapping[str, Any]) -> str:
    return str(settings.get("optim")).upper()
