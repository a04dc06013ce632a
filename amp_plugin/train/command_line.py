"""Parse the command line of `train.py`: recipes, a help to be read, and errors of one line that name what was meant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from amp_plugin.arguments import OneLine
from amp_plugin.files import FileError, in_one_line, read_text
from amp_plugin.suggest import did_you_mean
from amp_plugin.train.plain_yaml import read_plain_yaml

# The help shows these options.
GROUPS = {
    "data": "dataset data_root augment train_images validation_images label_noise corrupted_test_images"
    " image_size image_column text_column text_pair_column label_column train_split test_split dataset_config_name"
    " max_seq_length",
    "model": "model model_kwargs pretrained freeze_backbone",
    "AMP (Adversarial Model Perturbation; for mixed precision see --bf16 below)": "amp_epsilon amp_inner_lr"
    " amp_inner_iter amp_norm amp_ascent amp_parameters amp_batch_norm amp_rng amp_sync_ascent",
    "Baselines (also --optim sgd, rmp, sam, asam; --label_smoothing_factor; dropout by --model_kwargs)": (
        "flood_level mixup_alpha adversarial_epsilon rmp_epsilon sam_rho"
    ),
    "optimisation": "optim optim_args learning_rate lr_scheduler_type lr_milestones lr_gamma warmup_steps weight_decay"
    " decay_all_parameters max_grad_norm label_smoothing_factor num_train_epochs max_steps per_device_train_batch_size"
    " gradient_accumulation_steps",
    "run and output": "dry_run seed output_dir eval_strategy eval_every_epochs per_device_eval_batch_size"
    " logging_strategy save_strategy save_minutes save_total_limit resume_from_checkpoint minutes ledger report_to"
    " push_to_hub hub_model_id hub_license compare_with",
    "hardware and speed": "fast capture channels_last bf16 fp16 torch_compile use_cpu cpu_threads"
    " dataloader_num_workers",
}
# The stock help text of these options is long, or about something else.
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
# Other training scripts have these names for some options.
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
_KINDS: dict[Any, str] = {string_to_bool: "BOOL", int: "INT", float: "FLOAT"}
_REST = "everything else of transformers.TrainingArguments"
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")  # in a wheel, in a clone


class CommandLine(OneLine, HfArgumentParser):
    """Parse the options of some dataclasses; the `description` for the help calls the program ``train.py``."""

    may_be_blank = ("optim_args",)  # then the base optimizer has its own defaults

    def __init__(self, types: Any, description: str | None = None) -> None:
        program = Path(sys.argv[0]).name.replace("__main__.py", "python -m amp_plugin.train")
        super().__init__(
            types,
            prog=program,
            usage="%(prog)s [RECIPE] [--OPTION VALUE ...]",
            description=(description or "").replace("train.py", program),
            epilog=f"--help_all shows the options left out here, {_REST}. All of them work.",
            formatter_class=lambda prog: _Formatter(prog, max_help_position=34),
            allow_abbrev=False,
        )
        self._by_name = {a.dest: a for a in reversed(self._actions) if a.dest != "help"}
        self._action_groups.clear()
        recipes = "\n".join(f"  {name}" for name in known_recipes())
        self.add_argument_group(
            "RECIPE",
            f"A YAML file of options, or the name of one that comes with the package:\n{recipes}\n"
            "An OPTION wins over the recipe. Its default is in [brackets], unless that is off or nothing.",
        )
        for title, names in GROUPS.items():
            self._show(title, names.split())

    def namespace(self, argv: list[str], **defaults: Any) -> argparse.Namespace:
        """Return all options by name; `defaults` are in place of those of the dataclasses.

        Raises:
            ValueError: an option does not exist or does not take this value; the message says what was meant.
        """
        if "--help_all" in argv:
            self.epilog = None
            self._show(_REST, sorted(self._by_name.keys() - " ".join(GROUPS.values()).split()))
            argv = ["--help"]
        known, unknown = self.parse_known_args(argv, argparse.Namespace(**defaults))
        for token in unknown:
            if token.startswith("--"):
                self.error(f"no option {token.partition('=')[0]!r}{self._meant(token)}; --help lists them")
            self.error(f"unexpected {token!r}: a recipe comes first, and all other values follow an --OPTION")
        self.check_texts(known)
        return known

    def changed(self, argv: list[str]) -> dict[str, Any]:
        """Return the options that are given another value than their default, by name."""
        known, _ = self.parse_known_args(argv)
        return {n: value for n, value in vars(known).items() if value != self._by_name[n].default}

    def _show(self, title: str, names: list[str]) -> None:
        """Add a group of options to the help."""
        self.add_argument_group(title)._group_actions = [self._by_name[name] for name in names]

    def _meant(self, option: str) -> str:
        name = option.lstrip("-").partition("=")[0].replace("-", "_")
        if name in _ELSEWHERE:
            return f", did you mean --{_ELSEWHERE[name]}"
        ordered = dict.fromkeys([*" ".join(GROUPS.values()).split(), *self._by_name])
        longer = [known for known in ordered if f"_{name}_" in f"_{known}_"]
        if longer:
            return f", did you mean --{' or --'.join(longer[:3])}"
        return did_you_mean(f"--{name}", self._option_string_actions)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Show an option's first name and the kind of its value, and the default after its help."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _KINDS.get(action.type, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = _WORDS.get(action.dest, action.help or "")
        if action.default in (None, False, "", argparse.SUPPRESS) or "Default: " in text:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{text} [{default}]"


def known_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    folder = next((f for f in _FOLDERS if f.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_options(recipe: str) -> list[str]:
    """Return a recipe, a YAML file or the name of one that comes with the package, as options on the command line."""
    known = known_recipes()
    path = Path(recipe) if Path(recipe).is_file() else known.get(recipe)
    if path is None:
        meant = did_you_mean(Path(recipe).stem, known)
        said = "is a folder, not a file" if Path(recipe).is_dir() else f"does not exist{meant}"
        raise ValueError(f"recipe {recipe!r} {said}; known by name are {', '.join(known)}")
    try:
        settings = read_plain_yaml(read_text(path, "give a recipe in YAML"))
    except FileError:
        raise
    except Exception as error:  # a tag may ask for a value that its own constructor does not know
        raise ValueError(f"recipe {recipe!r} is not YAML: {in_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {recipe!r} must be a mapping of options to values")
    return as_options(settings, recipe)


def as_options(settings: Mapping[str, Any], recipe: str) -> list[str]:
    """Return a mapping of options to values as it would be written on the command line; errors name the `recipe`."""
    tokens: list[str] = []
    known: dict[str, str] = {}
    for name, value in settings.items():
        if (other := known.setdefault(str(name).replace("-", "_"), name)) != name:
            raise ValueError(f"recipe {recipe!r} has both {other} and {name}, which are one option")
        if value is None:
            raise ValueError(f"recipe {recipe!r} has no value for --{name}; leave it out for the default")
        try:
            text = json.dumps(value) if isinstance(value, dict) else value
        except TypeError as error:
            raise ValueError(f"recipe {recipe!r}: --{name} has a value that JSON has not: {error}") from error
        tokens += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={text}"]
    return tokens


def as_given(argv: list[str]) -> dict[str, list[str]]:
    """Return the values of each option on a command line; the last one of a name wins, as in argparse."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, *values = word[2:].split("=", 1)
            options[name.replace("-", "_")] = values
        else:
            values.append(word)
    return options


def as_words(options: Mapping[str, list[str]]) -> list[str]:
    """Return options and their values, as `as_given` returns them, as a command line."""
    words = ([f"--{n}={v[0]}"] if len(v) == 1 else [f"--{n}", *v] for n, v in options.items())
    return [word for some in words for word in some]
