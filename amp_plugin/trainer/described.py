"""Turn the settings of a training into words: for the model card, the first line of a run and the dry run.

Settings are arguments by name, perhaps recorded ones. The options of the main job count where a training has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amp_plugin.doors.training_args import AMPArguments
from amp_plugin.text import in_code, in_markdown

Settings = Mapping[str, Any]

# Each baseline of the main job has a ball around the weights, and an option for the radius of the ball.
BALLS = {"rmp": "rmp_epsilon", "sam": "sam_rho", "asam": "sam_rho"}
_NAMES = {"amp": "SGD", "sgd": "SGD", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW"}
_ONE_BALL = {"tensor": "one ball per parameter tensor", "global": "one ball for all parameters"}


def optimizer_in_words(settings: Settings) -> str:
    """Name the optimizer and the methods beside it: "AMP around SGD", or "SAM around SGD, without AMP, with mixup"."""
    methods = added_methods(settings)
    return _optimizer(settings) + (f", with {' and '.join(methods)}" if methods else "")


def added_methods(settings: Settings) -> list[str]:
    """List the methods in use that go with any optimizer."""
    return [name for name in methods_in_words(settings) if name.lower() not in BALLS]


def methods_in_words(settings: Settings) -> dict[str, str]:
    """Describe the methods in use, except AMP and dropout, by name; dropout is the model's own business."""
    words: dict[str, str] = {}
    optim = str(settings.get("optim"))
    if (radius := BALLS.get(optim)) is not None:
        ball = _ONE_BALL["tensor" if optim == "rmp" and settings.get("amp_norm") == "tensor" else "global"]
        words[optim.upper()] = f"{radius.partition('_')[2]} {settings[radius]:g}, {ball}"
    if smoothing := settings.get("label_smoothing_factor"):
        words["label smoothing"] = f"{smoothing:g}"
    if (level := settings.get("flood_level")) is not None:
        words["flooding"] = f"level {level:g}"
    if (alpha := settings.get("mixup_alpha")) is not None:
        words["mixup"] = f"proportions from Beta({alpha:g}, {alpha:g})"
    if (epsilon := settings.get("adversarial_epsilon")) is not None:
        words["adversarial training"] = f"FGSM, epsilon {epsilon:.3g} of pixels in [0, 1]"
    return words


def amp_in_words(args: AMPArguments) -> str:
    """Describe AMP's settings in one phrase for the terminal."""
    words = f"AMP, epsilon {args.amp_epsilon}, inner_lr {args.amp_inner_lr}"
    words += "" if args.amp_inner_iter == 1 else f", inner_iter {args.amp_inner_iter}"
    words += f", {args.amp_norm} ball"
    words += "" if args.amp_ascent == "full" else f", ascent {args.amp_ascent}"
    return words + ("" if args.amp_parameters is None else f" on {args.amp_parameters!r}")


def settings_in_words(args: AMPArguments) -> dict[str, str]:
    """Describe the settings that decided the outcome of a training, by name, in Markdown for the table in the card."""
    arguments = f" ({', '.join(args.optim_args.split(','))})" if args.optim_args else ""
    words = {"optimizer": in_markdown(_optimizer(vars(args), arguments))}
    if args.uses_amp:
        words |= {
            "AMP's `epsilon`, radius of the ball": f"{args.amp_epsilon:g}",
            "AMP's `inner_lr`, step length of the ascent": f"{args.amp_inner_lr:g}",
            "AMP's `inner_iter`, ascent steps per update": str(args.amp_inner_iter),
            "AMP's `norm`": f"`{args.amp_norm}`: {_ONE_BALL[args.amp_norm]}",
        }
        if args.amp_ascent != "full":
            words["AMP's `ascent`, which steps ascend and along what"] = in_code(args.amp_ascent)
        if args.amp_parameters is not None:
            words["AMP's `parameters`, what it perturbs"] = in_code(args.amp_parameters)
        if not args.amp_sync_ascent:
            words["AMP's ascent gradient"] = "of each process for itself"
    processes, accumulation = args.world_size, args.gradient_accumulation_steps
    batch = args.train_batch_size * processes * accumulation
    factors = f"{args.train_batch_size} x {processes} process(es) x {accumulation} accumulated"
    methods = methods_in_words(vars(args))
    decayed = " on all parameters" if args.decay_all_parameters else " on all but biases and normalisation layers"
    precision = "bf16 mixed precision" if args.bf16 else "fp16 mixed precision" if args.fp16 else "fp32"
    return {
        **words,
        "learning rate": f"{args.learning_rate:g}, {schedule_in_words(args)}",
        "weight decay": f"{args.weight_decay:g}{decayed if args.weight_decay else ''}",
        "gradient clipping": f"to norm {args.max_grad_norm:g}" if args.max_grad_norm else "none",
        "batch size": str(batch) if batch == args.train_batch_size else f"{batch} ({factors})",
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        **{name: text for name, text in methods.items() if name == "label smoothing"},
        "precision": precision + (", compiled" if args.torch_compile else ""),
        "seed": str(args.seed),
        **methods,
    }


def schedule_in_words(args: Any) -> str:
    """Describe how the learning rate changes."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name == "steps":  # only the main job has this schedule
        milestones = " and ".join(f"{100 * m:g} %" for m in args.lr_milestones)
        return f"times {args.lr_gamma:g} at {milestones} of the training"
    warmup = f" after {args.warmup_steps:g} steps of warmup" if args.warmup_steps else ""
    return f"{name.replace('_', ' ')} schedule{warmup}"


def _optimizer(settings: Settings, arguments: str = "") -> str:
    optim = str(settings.get("optim"))
    if optim in BALLS:
        return f"{optim.upper()} around SGD{arguments}, without AMP"
    base = optim.removeprefix("amp_")
    base = _NAMES.get(base, base) + arguments
    return f"AMP around {base}" if optim == "amp" or optim.startswith("amp_") else f"{base}, without AMP"
