"""The settings of a training in words, for a model card."""

from __future__ import annotations

from typing import Any

from amp_plugin.trainer.arguments import AMPTrainingArguments

_PRETTY = {"sgd": "SGD", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW"}


def optimizer_in_words(args: AMPTrainingArguments, *, arguments: bool = False) -> str:
    """E.g. "AMP around SGD", or "SGD, without AMP"; with the optimizer's `arguments` if asked for."""
    base = str(getattr(args.base_arguments().optim, "value", args.base_arguments().optim))
    base = _PRETTY.get(base, base)
    if arguments and args.optim_args:
        base += f" ({', '.join(args.optim_args.split(','))})"
    return f"AMP around {base}" if args.uses_amp else f"{base}, without AMP"


def settings_in_words(args: AMPTrainingArguments) -> dict[str, str]:
    """What decided the outcome of a training, by name, as far as the arguments tell."""
    words = {"optimizer": optimizer_in_words(args, arguments=True)}
    if args.uses_amp:
        norm = "one ball per parameter tensor" if args.amp_norm == "tensor" else "one ball for all parameters"
        words |= {
            "AMP's `epsilon`, radius of the ball": f"{args.amp_epsilon:g}",
            "AMP's `inner_lr`, step length of the ascent": f"{args.amp_inner_lr:g}",
            "AMP's `inner_iter`, ascent steps per update": str(args.amp_inner_iter),
            "AMP's `norm`": f"`{args.amp_norm}`: {norm}",
        }
        if args.amp_ascent != "full":
            words["AMP's `ascent`, which steps ascend and along what"] = f"`{args.amp_ascent}`"
        if args.amp_parameters is not None:
            words["AMP's `parameters`, what it perturbs"] = f"`{args.amp_parameters}`"
        if not args.sync_ascent:
            words["AMP's ascent gradient"] = "of each process for itself"
    processes, accumulation = args.world_size, args.gradient_accumulation_steps
    batch = args.train_batch_size * processes * accumulation
    factors = f"{args.train_batch_size} x {processes} process(es) x {accumulation} accumulated"
    return {
        **words,
        "learning rate": f"{args.learning_rate:g}, {_schedule(args)}",
        "weight decay": f"{args.weight_decay:g}{_decayed(args)}",
        "gradient clipping": f"to norm {args.max_grad_norm:g}" if args.max_grad_norm else "none",
        "batch size": str(batch) if batch == args.train_batch_size else f"{batch} ({factors})",
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        **({"label smoothing": f"{args.label_smoothing_factor:g}"} if args.label_smoothing_factor else {}),
        "precision": _precision(args),
        "seed": str(args.seed),
    }


def _schedule(args: Any) -> str:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name == "steps":  # of the main job
        milestones = " and ".join(f"{100 * m:g} %" for m in args.lr_milestones)
        return f"times {args.lr_gamma:g} at {milestones} of the training"
    warmup = f" after {args.warmup_steps:g} steps of warmup" if args.warmup_steps else ""
    return f"{name.replace('_', ' ')} schedule{warmup}"


def _decayed(args: AMPTrainingArguments) -> str:
    if not args.weight_decay:
        return ""
    return " on all parameters" if args.decay_all_parameters else " on all but biases and normalisation layers"


def _precision(args: AMPTrainingArguments) -> str:
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    return f"{f'{mixed} mixed precision' if mixed else 'fp32'}{', compiled' if args.torch_compile else ''}"
