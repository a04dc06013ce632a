"""Make what the main job trains: a model with its examples, from scratch or from a checkpoint."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from amp_plugin.data import ImageBatches, TextBatches, load_images, load_texts
from amp_plugin.data.settings import SOURCES
from amp_plugin.models.classifier import image_classifier
from amp_plugin.models.pretrained import freeze_backbone
from amp_plugin.models.pretrained_images import image_checkpoint
from amp_plugin.models.pretrained_texts import text_checkpoint
from amp_plugin.train.methods.mixup import MixedBatches
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments, shown_name
from amp_plugin.train.resident import move_to_device
from amp_plugin.train.stock_options import check_whole_batches


@dataclass(frozen=True)
class Task:
    """Hold a model, and the examples to train and to report on, in whole batches: see `amp_plugin.data.collate`."""

    dataset: str  # its name, for the reader
    model: PreTrainedModel
    train: ImageBatches | TextBatches
    test: ImageBatches | TextBatches
    processor: Any = None  # image processor or tokenizer to save beside the model
    new: list[str] | None = None  # parameters that do not come from the checkpoint; None without a checkpoint
    label_noise: float = 0.0  # share of the examples to train on that were given another label
    to_corrupt: ImageBatches | None = None  # images to test on that the final model is tested on as corrupted ones too

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the examples to train and to report on, and of the names of the classes."""
        names = hashlib.sha256(repr(self.class_names()).encode(errors="surrogatepass")).hexdigest()[:16]
        return {"train": self.train.split.fingerprint(), "test": self.test.split.fingerprint(), "classes": names}

    def class_names(self) -> list[str]:
        """Return the names of the classes, in the order of the model's outputs."""
        names: Any = self.model.config.id2label
        return [str(names[i]) for i in sorted(names)]

    def examples_to_train(self) -> str:
        """Tell how many examples there are to train on, and how many of them were given another label, if any."""
        count, kind = len(self.train), self.train.split.kind
        noise = f", {round(self.label_noise * count):,} of them with another label" if self.label_noise else ""
        return f"{count:,} {kind} to train{noise}"

    def origin(self) -> str:
        """Tell where the parameters come from, and how many are trained, if not all; the text is empty from scratch."""
        if self.new is None:
            return ""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        drawn = f" except {', '.join(self.new)}" if self.new else ""
        frozen = f", {trained:,} of them trained" if trained < self.model.num_parameters() else ""
        return f" (the checkpoint's{drawn}{frozen})"


def make_task(data_args: DataArguments, model_args: ModelArguments, args: RecipeArguments) -> Task:
    """Load data and model as the options say."""
    task = (_image_task if data_args.text_column is None else _text_task)(data_args, model_args, args)
    if model_args.freeze_backbone:
        freeze_backbone(task.model)
    return task


def check_batch_of_one(task: Task, args: RecipeArguments) -> None:
    """Check that the model can train on one example, if a batch of the training has no more.

    BatchNorm cannot where its features are one pixel large, and would say so at the end of the first epoch.

    Raises:
        ValueError: The model cannot; the message says what to change.
    """
    size, examples = args.train_batch_size, len(task.train)
    batches = math.ceil(examples / size)
    longest = (
        args.max_steps * args.gradient_accumulation_steps if args.max_steps > 0 else args.num_train_epochs * batches
    )
    filled = args.world_size > 1 or args.dataloader_drop_last or examples % size != 1 or longest < batches
    if size > 1 and filled:
        return
    example = {name: value.cpu() for name, value in task.train.__getitems__([0]).items()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(task.model).train()(**example)
    except Exception as error:  # each architecture fails in its own way
        raise ValueError(
            f"a batch of an epoch holds one example ({examples:,} in batches of {size}), and the model cannot train on"
            f" one ({' '.join(str(error).split())}); choose another --per_device_train_batch_size or another number of"
            f" {task.train.split.kind} to train on"
        ) from error


def _image_task(data_args: DataArguments, model_args: ModelArguments, args: RecipeArguments) -> Task:
    """Make a timm architecture from scratch, or load an image checkpoint, with images."""
    checkpoint, side = None, data_args.image_size
    if model_args.pretrained is not None:
        checkpoint = image_checkpoint(model_args.pretrained, side)
        side = checkpoint.image_size
    with args.main_process_first(desc="decoding the images"):
        data = load_images(
            data_args.dataset,
            data_root=data_args.data_root,
            config_name=data_args.dataset_config_name,
            image_column=data_args.image_column,
            label_column=data_args.label_column,
            train_split=data_args.train_split,
            test_split=data_args.test_split,
            # Small images of one size are kept and augmented as they are, and resized batch by batch.
            image_size=None if data_args.dataset in SOURCES else side,
        )
    train, test = data_args.chosen(data.train, data.test, classes=len(data.class_names), seed=args.seed)
    check_whole_batches(args, len(train), len(test))
    model: PreTrainedModel
    processor, new, settings = None, None, data.settings
    if checkpoint is None:
        model = image_classifier(
            model_args.model,
            data.class_names,
            mean=settings.mean,
            std=settings.std,
            image_size=side or train.images.shape[1:3],
            **model_args.parsed_model_kwargs(),
        )
    else:
        settings = replace(settings, mean=checkpoint.mean, std=checkpoint.std)
        model, new = checkpoint.classifier(data.class_names)
        processor = checkpoint.processor
    if args.channels_last:
        torch.nn.Module.to(model, memory_format=torch.channels_last)  # transformers hides the signature
    batches = partial(ImageBatches, settings=settings, image_size=side, channels_last=args.channels_last)
    training: Any = batches
    if args.mixup_alpha is not None:
        training = partial(MixedBatches, **batches.keywords, alpha=args.mixup_alpha, classes=len(data.class_names))
    training, testing = training(train, augment=data_args.augmentation, seed=args.seed), batches(test)
    if not args.dry_run:
        move_to_device(training, args)
        move_to_device(testing, args)
    count = min(data_args.corrupted_test_images, len(test))
    to_corrupt = batches(test.spread(count)) if count else None
    return Task(shown_name(data.name), model, training, testing, processor, new, data_args.label_noise, to_corrupt)


def _text_task(data_args: DataArguments, model_args: ModelArguments, args: RecipeArguments) -> Task:
    """Load a text checkpoint, with texts."""
    if model_args.pretrained is None:
        raise ValueError("--text_column needs --pretrained: texts are classified with a pretrained language model")
    for name in ("mixup_alpha", "adversarial_epsilon"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for images, and there is a --text_column")
    with args.main_process_first(desc="reading the texts"):
        data = load_texts(
            data_args.dataset,
            text_column=str(data_args.text_column),
            text_pair_column=data_args.text_pair_column,
            label_column=data_args.label_column or "label",
            data_root=data_args.data_root,
            config_name=data_args.dataset_config_name,
            train_split=data_args.train_split,
            test_split=data_args.test_split,
        )
    train, test = data_args.chosen(data.train, data.test, classes=len(data.class_names), seed=args.seed)
    check_whole_batches(args, len(train), len(test))
    checkpoint = text_checkpoint(model_args.pretrained, data.class_names, data_args.max_seq_length)
    batches = partial(TextBatches, tokenizer=checkpoint.tokenizer, max_length=checkpoint.max_length)
    return Task(
        *(shown_name(data.name), checkpoint.model, batches(train), batches(test)),
        *(checkpoint.tokenizer, checkpoint.new, data_args.label_noise),
    )
