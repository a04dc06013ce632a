"""The command line of `train.py`: help that can be read, errors of one line that name what was meant."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from amp_plugin.suggest import did_you_mean
from amp_plugin.train.recipe_file import known_recipes, recipe_options

# What --help shows.
GROUPS = {
    "data": "dataset data_root augment train_images validation_images image_size image_column text_column"
    " text_pair_column label_column train_split test_split dataset_config_name max_seq_length",
    "model": "model model_kwargs pretrained freeze_backbone",
    "AMP (Adversarial Model Perturbation; for mixed precision see --bf16 below)": "amp_epsilon amp_inner_lr"
    " amp_inner_iter amp_norm amp_ascent amp_parameters amp_batch_norm amp_rng sync_ascent",
    "Rival methods (also --optim sgd, rmp, sam, asam; --label_smoothing_factor; dropout by --model_kwargs)": (
        "flood_level mixup_alpha adversarial_epsilon rmp_epsilon sam_rho"
    ),
    "optimisation": "optim optim_args learning_rate lr_scheduler_type lr_milestones lr_gamma warmup_steps weight_decay"
    " decay_all_parameters max_grad_norm label_smoothing_factor num_train_epochs max_steps per_device_train_batch_size"
    " gradient_accumulation_steps",
    "run and output": "dry_run seed output_dir eval_strategy per_device_eval_batch_size logging_strategy save_strategy"
    " save_total_limit resume_from_checkpoint ledger report_to push_to_hub hub_model_id hub_license"
    " compare_with",
    "hardware and speed": "fast channels_last bf16 fp16 torch_compile use_cpu cpu_threads dataloader_num_workers",
}
# For some of them the stock text is long, or about something else.
_WORDS = {
    "bf16": "Mixed precision in bfloat16.",
    "dataloader_num_workers": "Processes that load batches; 0: the training process itself.",
    "fp16": "Mixed precision in float16, with loss scaling.",
    "gradient_accumulation_steps": "Batches whose gradients make one step; AMP perturbs once for all of them.",
    "hub_model_id": "Repository there. Default: the output folder's name.",
    "label_smoothing_factor": "Label smoothing of the training loss; 0.2 in the paper.",
    "max_steps": "Optimizer steps, instead of --num_train_epochs, if positive.",
    "optim_args": "Arguments of the base optimizer, e.g. momentum=0.9,nesterov=True.",
    "output_dir": "Folder of the results. Default: runs/DATASET-MODEL-OPTIM[-METHODS]-seedSEED.",
    "push_to_hub": "Push the model to the Hub whenever it is saved.",
    "seed": "Seed of the initial weights, the order and the augmentation.",
    "torch_compile": "Compile the model with torch.compile.",
    "use_cpu": "Use the CPU even if there is an accelerator.",
    "warmup_steps": "Steps of linear warmup, or below 1 a fraction of all; not with 'steps'.",
}
# What other training scripts call it.
_ELSEWHERE = {
    "amp": "optim amp (Adversarial Model Perturbation) or --bf16 (mixed precision)",
    "batch_size": "per_device_train_batch_size",
    "clip_grad": "max_grad_norm",
    "data_dir": "data_root",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "momentum": "optim_args momentum=...",
    "opt": "optim",
    "opt_kwargs": "optim_args",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "sched": "lr_scheduler_type",
    "smoothing": "label_smoothing_factor",
    "workers": "dataloader_num_workers",
}
_REST = "everything else of transformers.TrainingArguments"
_Group = tuple[str, list[argparse.Action]]


class CommandLine(HfArgumentParser):
    """The options of some dataclasses; what is wrong with them is a ValueError.

    Args:
        types: the dataclasses.
        description: for the help; calls the program ``train.py``.
    """

    def __init__(self, types: Any, description: str | None = None) -> None:
        program = Path(sys.argv[0]).name
        if program == "__main__.py":
            program = "python -m amp_plugin.train"
        super().__init__(
            types,
            prog=program,
            usage="%(prog)s [RECIPE] [--OPTION VALUE ...]",
            description=(description or "").replace("train.py", program),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.add_argument("--help_all", action=_HelpAll, help="Show all options.")
        self._by_name = {a.dest: a for a in reversed(self._actions) if a.dest not in ("help", argparse.SUPPRESS)}

    def with_recipe(self, argv: list[str]) -> list[str]:
        """The same options, with those of the recipe, if one is named first, in its place.

        Raises:
            ValueError: the recipe does not exist, or something in it is wrong.
        """
        if not argv or argv[0].startswith("-"):
            return argv
        options = recipe_options(argv[0])
        try:
            self.namespace(options)
        except ValueError as error:
            raise ValueError(f"recipe {argv[0]!r}: {error}") from None
        return [*options, *argv[1:]]

    def namespace(self, argv: list[str], **defaults: Any) -> argparse.Namespace:
        """All options by name.

        Args:
            argv: the options as given.
            **defaults: instead of those of the dataclasses, by name.

        Raises:
            ValueError: an option does not exist or does not take this value; the message says what was meant.
        """
        known, unknown = self.parse_known_args(argv, argparse.Namespace(**defaults))
        for token in unknown:
            if token.startswith("--"):
                self.error(f"no option {token.partition('=')[0]!r}{self._meant(token)}; --help lists them")
            self.error(f"unexpected {token!r}: a recipe comes first, and all other values follow an --OPTION")
        return known

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError, where argparse would print the usage and exit."""
        raise ValueError(re.sub(r"^argument (--\w+)[^:]*", r"\1", message))

    def format_help(self) -> str:
        """The help: what one may want to change, in groups."""
        return self._help(self._groups(), f"--help_all shows the options left out here, {_REST}. All of them work.")

    def format_help_all(self) -> str:
        """The help with all options."""
        groups = self._groups()
        shown = [action for _, actions in groups for action in actions]
        rest = [action for _, action in sorted(self._by_name.items()) if action not in shown]
        return self._help([*groups, (_REST, rest)])

    def _groups(self) -> list[_Group]:
        known = self._by_name
        return [(title, [known[n] for n in names.split() if n in known]) for title, names in GROUPS.items()]

    def _help(self, groups: list[_Group], last: str | None = None) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        recipes = "\n".join(f"  {name}" for name in known_recipes())
        formatter.start_section("RECIPE")
        formatter.add_text(
            f"A YAML file of options, or the name of one that comes with the package:\n{recipes}\n"
            "An OPTION wins over the recipe. Its default is in [brackets], unless that is off or nothing."
        )
        formatter.end_section()
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(last)
        return formatter.format_help()

    def _meant(self, option: str) -> str:
        name = option.lstrip("-").partition("=")[0].replace("-", "_")
        if name in _ELSEWHERE:
            return f", did you mean --{_ELSEWHERE[name]}"
        as_shown = [action.dest for _, actions in self._groups() for action in actions]
        longer = [known for known in dict.fromkeys([*as_shown, *self._by_name]) if f"_{name}_" in f"_{known}_"]
        if longer:
            return f", did you mean --{' or --'.join(longer[:3])}"
        return did_you_mean(f"--{name}", self._option_string_actions)


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> NoReturn:
        print(parser.format_help_all())
        sys.exit(0)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """An option's first name and what it takes; the default after its help."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type is string_to_bool:
            return "BOOL"
        return {int: "INT", float: "FLOAT"}.get(action.type, "TEXT")  # type: ignore[call-overload, no-any-return]

    def _get_help_string(self, action: argparse.Action) -> str:
        text = _WORDS.get(action.dest, action.help or "")
        if action.default in (None, False, "", argparse.SUPPRESS) or "Default: " in text:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{text} [{default}]"
