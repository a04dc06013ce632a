"""Define what `train.py` can be told: on the command line, in a YAML recipe, or both."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from amp_plugin.data import Augmentation
from amp_plugin.data.settings import BUNDLED
from amp_plugin.data.splits import Split
from amp_plugin.train.command_line import CommandLine, as_given, as_words, recipe_options
from amp_plugin.train.defaults import can_be_captured, fast_settings, fine_tuning_settings
from amp_plugin.train.json_options import check_json_options, read_json_option
from amp_plugin.train.method_options import MethodArguments, option
from amp_plugin.train.ranges import check_ranges
from amp_plugin.train.stock_options import check_stock_options, settle_best_metric, settle_choices
from amp_plugin.trainer.described import added_methods


@dataclass
class DataArguments:
    """Choose the images and their augmentation, or the texts."""

    dataset: str = option(
        "cifar10_sample", "cifar10, cifar100, svhn, cifar10_sample (bundled), or any other with its two columns."
    )
    data_root: str | None = option(None, "Folder in the layout of the Hub to load from, instead of the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    image_column: str | None = option(None, "Column of the images.")
    text_column: str | None = option(None, "Column of texts: a text classifier is fine-tuned instead.")
    text_pair_column: str | None = option(None, "Column of second texts, for pairs.")
    max_seq_length: int | None = option(None, "Tokens of a text at most. Default: as many as the checkpoint takes.")
    label_column: str | None = option(None, "Column of the labels.")
    train_split: str = option("train", "Split to train on.")
    test_split: str = option("test", "Split to test on.")
    image_size: int | None = option(
        None, "Side of the images that the network sees, in pixels. Default: theirs, or the checkpoint's."
    )
    augment: Literal["default", "none", "plain", "cutout", "autoaugment"] = option(
        "default",
        "plain: crop and flip; cutout: and Cutout; autoaugment: and AutoAugment and Cutout. Default: plain,"
        " but none on the bundled sample, which a network can then learn by heart.",
    )
    train_images: int | None = option(None, "Train on so many images (or texts) only, equally many of every class.")
    validation_images: int | None = option(
        None, "Hold out so many training images (or texts) and report on them, to choose settings honestly."
    )
    label_noise: float = option(
        0.0, "Give this fraction of the training images (or texts) another label, drawn evenly from the other classes."
    )
    corrupted_test_images: int = option(
        0,
        "Test the final model on so many test images under Gaussian noise, Gaussian blur, less contrast and JPEG too,"
        " at the five severities that CIFAR-10-C has for images of 32x32 pixels.",
    )

    def __post_init__(self) -> None:
        """Check the numbers, and that the options are for images or for texts."""
        check_ranges(self)
        if self.data_root is not None and not Path(self.data_root).is_dir():
            raise ValueError(f"--data_root {self.data_root!r} is no folder")
        images = {"image_column": None, "image_size": None, "augment": "default", "corrupted_test_images": 0}
        texts = {"text_pair_column": None, "max_seq_length": None}
        for name, default in (texts if self.text_column is None else images).items():
            if getattr(self, name) != default:
                kind = "texts, and needs --text_column" if name in texts else "images, and there is a --text_column"
                raise ValueError(f"--{name} is for {kind}")

    @property
    def augmentation(self) -> Augmentation:
        """Return `augment` with the default settled."""
        if self.augment == "default":
            return "none" if self.dataset == BUNDLED else "plain"
        return self.augment

    def chosen(self, train: Split, test: Split, *, classes: int, seed: int) -> tuple[Split, Split]:
        """Return the examples to train on, with the label noise of a seed, and those to report on."""
        if self.validation_images is not None:
            train, test = train.split(self.validation_images)
        train = train if self.train_images is None else train.subset(self.train_images)
        return (train.with_label_noise(self.label_noise, classes, seed) if self.label_noise else train), test


_DEFAULT_MODEL, _NARROW = "preactresnet18", '{"width": 16, "layers": [1, 1, 1, 1]}'
# These arguments of a timm architecture are settled elsewhere.
_SETTLED = {
    "checkpoint_path": "--pretrained takes a checkpoint",
    "features_only": "a network without its head cannot classify; leave it out",
    "in_chans": "images have three channels here (grey ones are made so); leave it out",
    "num_classes": "the data set tells the number of classes; leave it out",
    "pretrained": "--pretrained takes a checkpoint",
    "pretrained_cfg": "--pretrained takes a checkpoint",
    "pretrained_cfg_overlay": "--pretrained takes a checkpoint",
}


@dataclass
class ModelArguments:
    """Choose the network."""

    pretrained: str | None = option(
        None,
        "Fine-tune this checkpoint instead of training from scratch: an id on the Hub (timm's too, e.g."
        " resnet18.a1_in1k) or a folder. Its head is replaced, and other defaults apply: AdamW, 3 epochs, ...",
    )
    freeze_backbone: bool = option(False, "Train the head of --pretrained alone.")

    model: str = option(_DEFAULT_MODEL, "Any architecture that timm knows.")
    model_kwargs: str | None = option(
        None,
        f"Its arguments, as JSON. Default: those of a narrow network for {_DEFAULT_MODEL}, none for others; '{{}}' for"
        " the full network.",
    )

    def __post_init__(self) -> None:
        """Check the JSON, and that there is a backbone to freeze."""
        if self.model_kwargs is None:
            self.model_kwargs = _NARROW if self.model == _DEFAULT_MODEL else "{}"
        for name, where in _SETTLED.items():
            if name in self.parsed_model_kwargs():
                raise ValueError(f"--model_kwargs has {name!r}, but {where}")
        if self.freeze_backbone and self.pretrained is None:
            raise ValueError("--freeze_backbone needs --pretrained: random features are not worth keeping")

    @property
    def name(self) -> str:
        """Return the model's name; a checkpoint in a folder goes by the folder's own name."""
        return self.model if self.pretrained is None else shown_name(self.pretrained)

    def parsed_model_kwargs(self) -> dict[str, Any]:
        """Return `model_kwargs` as a dict."""
        return read_json_option("model_kwargs", self.model_kwargs or "{}")


@dataclass
class RecipeArguments(MethodArguments):
    """Hold the paper's settings where they do not depend on the data set, and the small job's where they do."""

    learning_rate: float = option(0.1, "Learning rate at the start.")
    lr_scheduler_type: str = option("steps", "'steps': drop at --lr_milestones; or a schedule of the stock Trainer.")
    lr_milestones: list[float] = field(
        default_factory=lambda: [0.5, 0.75],
        metadata={"help": "Fractions of the training at which the learning rate drops."},
    )
    lr_gamma: float = option(0.1, "What it is multiplied by there.")
    weight_decay: float = option(1e-4, "Weight decay.")
    decay_all_parameters: bool = option(True, "On BatchNorm and biases too.")
    max_grad_norm: float = option(50.0, "Clip norm of the descent gradient.")
    num_train_epochs: float = option(30, "Passes over the training images.")
    per_device_train_batch_size: int = option(50, "Images of a step, per process.")
    per_device_eval_batch_size: int = option(500, "Images of an evaluation batch.")
    amp_epsilon: float = option(0.2, "Radius of the ball (paper: 0.5 for wide networks).")
    amp_inner_lr: float = option(0.3, "Step length of the ascent (paper: 1).")
    eval_strategy: str = option("epoch", "When to test.")
    eval_every_epochs: int = option(1, "With --eval_strategy epoch: test after every so many epochs, and at the end.")
    logging_strategy: str = option("epoch", "When to log.")
    save_strategy: str = option("no", "When to save a checkpoint; 'epoch' to resume.")
    save_minutes: float | None = option(
        None, "Save a checkpoint at the first end of an epoch so many minutes after the last one; in long epochs too."
    )
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    minutes: float | None = option(
        None,
        "Stop before so many minutes, counted from the start of the job, with a checkpoint and the command that"
        " continues. Nothing is reported then.",
    )
    resume_from_checkpoint: str | None = option(
        None,
        "'last': continue from the last complete checkpoint in the output folder, or start if there is"
        " none, so the same command starts a job and continues it (torchrun --max_restarts repeats it after a"
        " failure); 'true': the same, but there must be one; or the folder of a checkpoint. Its settings must be"
        " those of this run, except for the length and for what is tested, logged and saved when.",
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Experiment trackers, e.g. tensorboard."}
    )
    remove_unused_columns: bool = option(False, "The data set has what the model takes.")
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Pin the batches' memory for an accelerator."}
    )
    cpu_threads: int | None = option(
        None, "Threads of a process on the CPU. Default: torch's, but all cores under accelerate launch."
    )
    fast: bool = option(
        False,
        "Use what is fast on this device: channels-last, bf16 autocast and, on CUDA, torch.compile and --capture; on a"
        " CPU, freed memory is kept. Any of --channels_last, --bf16, --torch_compile and --capture still wins.",
    )
    capture: bool = option(
        False,
        "On CUDA: keep the images on the device, augment them there, and replay each step as CUDA graphs, so that"
        " Python holds nothing up. --fast does, where it can.",
    )
    channels_last: bool = option(False, "Memory format of images and convolutions.")
    dry_run: bool = option(
        False,
        "Print what would be done and what it would take, and exit. Nothing is trained or written; but a"
        " data set that is not in the cache yet is fetched into it.",
    )
    ledger: str | None = option(None, "JSON Lines file to append the finished run to: settings, commit, metrics.")
    compare_with: str | None = option(
        None,
        "Output folder of another run, e.g. with --optim sgd, to show beside this one in the model card; or"
        " a ledger, for the last run in it with the same settings and another optimizer.",
    )
    hub_license: str = option("mit", "Licence of the weights, as the Hub calls it.")

    def __post_init__(self) -> None:
        """Check the schedule and the stock options."""
        check_ranges(self)  # before the words below compare numbers
        settle_choices(self)
        settle_best_metric(self)
        if not all(0.0 < m < 1.0 for m in self.lr_milestones):
            raise ValueError(f"lr_milestones must be fractions of the training in (0, 1), got {self.lr_milestones}")
        if self.minutes is not None and self.save_only_model:
            raise ValueError("--minutes needs checkpoints to continue from, which --save_only_model leaves incomplete")
        if self.save_strategy == "best" and (self.minutes is not None or self.save_minutes is not None):
            raise ValueError("--minutes and --save_minutes save at other times than --save_strategy best; use epoch")
        self.amp_capture |= self.capture
        self._take_precision_of_launcher()
        self.warmup_steps = float(self.warmup_steps)  # the default is an int
        if self.lr_scheduler_type == "steps" and self.warmup_steps:
            raise ValueError("lr_scheduler_type 'steps' has no warmup; leave warmup_steps at 0 or use e.g. cosine")
        super().__post_init__()

    def _take_precision_of_launcher(self) -> None:
        """Take what ``accelerate launch --mixed_precision`` asks for, which the accelerator would do unrecorded."""
        wish = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if not (self.bf16 or self.fp16) and wish not in ("no", ""):
            if wish not in ("bf16", "fp16"):
                raise ValueError(f"accelerate launch --mixed_precision {wish}: this job computes in bf16, fp16 or no")
            self.bf16, self.fp16 = wish == "bf16", wish == "fp16"

    def stock_values(self) -> dict[str, Any]:
        """Return the values that stand for ours wherever transformers reads the arguments."""
        schedule = {"lr_scheduler_type": "constant"} if self.lr_scheduler_type == "steps" else {}
        return super().stock_values() | schedule

    def arithmetic(self) -> str:
        """Tell how the passes are computed; the text is empty for eager, channels-first fp32."""
        chosen = {"channels-last": self.channels_last, "bf16": self.bf16, "fp16": self.fp16}
        chosen |= {"compiled": self.torch_compile, "captured": self.captures}
        chosen |= {"fp32": self.fast and not (self.bf16 or self.fp16)}
        return ", ".join(name for name, on in chosen.items() if on)

    def checkpoint_to_resume(self) -> str | bool | None:
        """Return a checkpoint's folder, "last", or whether to take the last checkpoint in the output folder."""
        word = str(self.resume_from_checkpoint).lower()
        return word == "true" if word in ("true", "false") else self.resume_from_checkpoint


def shown_name(name: str) -> str:
    """Return a name on the Hub as it is, and only the last part of a folder's path: the rest is private."""
    return Path(name).resolve().name if Path(name).is_dir() else name


TYPES: Any = (DataArguments, ModelArguments, RecipeArguments)
_REFUSALS = (ImportError, NotImplementedError, OSError, TypeError, ValueError)  # of transformers, for an option


def with_recipe(argv: list[str]) -> list[str]:
    """Return the options with those of the recipe in place of its name, if `argv` names one first."""
    if not argv or argv[0].startswith("-"):
        return argv
    options = recipe_options(argv[0])
    try:
        CommandLine(TYPES).namespace(options)
    except ValueError as error:
        raise ValueError(f"recipe {argv[0]!r}: {error}") from None
    return [*options, *argv[1:]]


def parse(argv: list[str], description: str | None = None) -> tuple[DataArguments, ModelArguments, RecipeArguments]:
    """Read the recipe, if `argv` names one first, then the options after it, which win."""
    parser = CommandLine(TYPES, description)
    argv = with_recipe(argv)
    named = parser.namespace(argv, optim=None, do_train=None, do_eval=None)  # None if nobody says
    if named.do_train is False:
        raise ValueError("--do_train false: this job trains; see --dry_run")
    if named.do_eval is False:
        raise ValueError("--do_eval false: this job tests its model; --eval_strategy no tests it at the end alone")
    if named.pretrained is not None:
        parser.set_defaults(**fine_tuning_settings(named.optim))
    if named.fast:
        chosen = fast_settings(use_cpu=named.use_cpu)
        if named.fp16:
            chosen.pop("bf16", None)
        if named.text_column is not None:
            del chosen["channels_last"]
        if not can_be_captured(named):
            chosen.pop("capture", None)
        parser.set_defaults(**chosen)
    check_json_options(vars(named))
    try:
        data, model, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except _REFUSALS as error:
        raise ValueError(_naming_the_option(error, parser, argv)) from error
    check_stock_options(training, texts=data.text_column is not None)
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = default_folder(data, model, training)
    return data, model, training


def _naming_the_option(error: Exception, parser: CommandLine, argv: list[str]) -> str:
    """Return an error's message in one line, with the option in front without which there would be no such error.

    Messages of transformers, and of what it imports for an option, name a file, a package or an own word.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    options = as_given(argv)
    if not any(re.search(rf"--{name}\b|^{name}\b", said) for name in options):
        for name in options:
            others = as_words({other: theirs for other, theirs in options.items() if other != name})
            try:
                parser.parse_args_into_dataclasses(others, look_for_args_file=False)
            except _REFUSALS as now:
                if str(now) == str(error):
                    continue
            return f"--{name}: {said}"
    return said


def default_folder(data: DataArguments, model: ModelArguments, training: RecipeArguments) -> str:
    """Return the output folder of a run that is given none."""
    name = (shown_name(data.dataset), model.name, training.optim, *added_methods(vars(training)))
    return "runs/" + "-".join(name).replace("/", "_").replace(" ", "_") + f"-seed{training.seed}"
