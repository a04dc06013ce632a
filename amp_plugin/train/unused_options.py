"""Find the options that are given and change nothing, because of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from amp_plugin.train.trainer import RecipeTrainer


class _Need(NamedTuple):
    """What options need to have an effect: a test, and words for it."""

    met: Callable[[Any], object]
    words: str


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _for_optimizer(name: str) -> _Need:
    """Return the need of an option that is an argument of some optimizers."""

    def reaches(args: Any) -> bool:
        other = copy.copy(args)
        setattr(other, name, getattr(args, name) / 2 + 0.1)
        try:
            one, two = (RecipeTrainer.get_optimizer_cls_and_kwargs(a)[1] for a in (args, other))
        except ValueError:  # some want to see the model first
            return True
        return bool(one != two)

    return _Need(reaches, "with this --optim")


_STEPS = _Need(lambda args: _word(args.lr_scheduler_type) == "steps", "with another schedule than 'steps'")
_CHECKPOINTING = _Need(lambda args: args.gradient_checkpointing, "without --gradient_checkpointing true")
_PUSHED = _Need(lambda args: args.push_to_hub, "without --push_to_hub true")
_TRACKED = _Need(lambda args: args.report_to, "without a tracker; see --report_to")
_WORKERS = _Need(lambda args: args.dataloader_num_workers > 0, "without --dataloader_num_workers")
_NEEDS = {
    **{name: _for_optimizer(name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "dataloader_multiprocessing_context": _WORKERS,
    "dataloader_pin_memory": _Need(lambda args: args.device.type != "cpu", "without an accelerator"),
    "do_predict": _Need(lambda args: False, "here: this job tests its model at the end in any case"),
    "eval_delay": _Need(lambda args: _word(args.eval_strategy) != "no", "with --eval_strategy no"),
    "eval_every_epochs": _Need(lambda args: _word(args.eval_strategy) == "epoch", "without --eval_strategy epoch"),
    "eval_steps": _Need(lambda args: _word(args.eval_strategy) == "steps", "without --eval_strategy steps"),
    "fsdp_config": _Need(lambda args: args.fsdp, "without --fsdp true"),
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "hub_model_id": _PUSHED,
    "hub_private_repo": _PUSHED,
    "hub_revision": _PUSHED,
    "hub_strategy": _PUSHED,
    "length_column_name": _Need(lambda args: False, "here: the examples are drawn at random"),
    "logging_steps": _Need(lambda args: _word(args.logging_strategy) == "steps", "without --logging_strategy steps"),
    "lr_gamma": _STEPS,
    "lr_milestones": _STEPS,
    "optim_target_modules": _Need(lambda args: args.base_optim.startswith(("apollo", "galore")), "with this --optim"),
    "project": _TRACKED,
    "run_name": _TRACKED,
    "save_steps": _Need(lambda args: _word(args.save_strategy) == "steps", "without --save_strategy steps"),
    "use_cache": _Need(lambda args: False, "here: a classifier keeps no keys and values"),
}


def without_effect(given: Collection[str], args: Any) -> list[str]:
    """Return a sentence for each given option that changes nothing; `args` are all arguments of the training."""
    return [f"--{n} has no effect {_NEEDS[n].words}" for n in sorted(given) if n in _NEEDS and not _NEEDS[n].met(args)]
