"""`AMPTrainer` with the paper's schedule and a final test."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_utils import PredictionOutput

from amp_plugin import AMPTrainer
from amp_plugin.train.described import card_words
from amp_plugin.train.methods.objective import ObjectiveTrainer
from amp_plugin.train.methods.random_perturbation import RandomPerturbationTrainer
from amp_plugin.train.options import RecipeArguments


class RecipeTrainer(RandomPerturbationTrainer, ObjectiveTrainer):
    """`AMPTrainer` with the paper's step schedule, and the methods it is compared with."""

    args: RecipeArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.card_details = card_words(self.args)
        if self.args.rival is not None:
            self._refuse_inexact_hosts()

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """AMPTrainer's choice, or the rival that ``args.optim`` asks for, around SGD."""
        if args.rival is None:
            return AMPTrainer.get_optimizer_cls_and_kwargs(args, model)
        base, kwargs = AMPTrainer.get_optimizer_cls_and_kwargs(args.base_arguments(), model)
        return args.rival, {**kwargs, **args.optimizer_kwargs(), "base_optimizer": base}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Multiply the learning rate by `lr_gamma` at each of `lr_milestones`, unless a stock schedule is named."""
        if self.args.lr_scheduler_type != "steps":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            scheduled: Any = self.optimizer if optimizer is None else optimizer
            milestones = [round(fraction * num_training_steps) for fraction in self.args.lr_milestones]
            scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(scheduled, milestones, self.args.lr_gamma)
            self.lr_scheduler = scheduler
        return self.lr_scheduler

    def final_test(self) -> PredictionOutput:
        """Predictions, labels and metrics (``eval_...``) of the evaluation data at the weights that will be saved.

        The metrics are logged, unless the last evaluation of the training already logged them.
        """
        tested = self.predict(self.eval_dataset, metric_key_prefix="eval")  # type: ignore[arg-type]
        logged = {r["step"] for r in self.state.log_history if "eval_error" in r}
        if self.state.global_step not in logged:
            self.log(dict(tested.metrics or {}))
        return tested
