"""The settings of a run: those of its options that decide what it finds."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from enum import Enum
from typing import Any

from amp_plugin import AMPArguments
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments, shown_name

# These stock options are recorded even at their defaults.
_STOCK = "seed max_steps gradient_accumulation_steps world_size warmup_steps bf16 fp16 torch_compile optim_args"
# These are recorded where they are on, so that older runs have the settings of new ones.
_RECORDED_WHERE_ON = {"amp_capture", "capture", "corrupted_test_images", "label_noise"}
# These options do not decide the outcome of a run; what --fast chose is recorded instead of it.
_NO_OUTCOME = (
    "compare_with data_root dataloader_pin_memory debug disable_tqdm do_eval dry_run fast hub_license ledger minutes"
    " output_dir project remove_unused_columns report_to resume_from_checkpoint run_name save_minutes save_total_limit"
)
_NO_OUTCOME_PREFIXES = ("ddp_", "hub_", "log_", "push_to_hub", "trackio_")


def decides_outcome(option: str) -> bool:
    """Tell whether an option decides what a run finds; some of the others hold a token, or folders of the machine."""
    return option not in _NO_OUTCOME.split() and not option.startswith(_NO_OUTCOME_PREFIXES)


def settings_of(data: DataArguments, model: ModelArguments, training: RecipeArguments) -> dict[str, Any]:
    """Return the settings that decide a run's outcome, for the ledger, without where the run wrote its results."""
    settings = {n: value for n, value in vars(data).items() if value or n not in _RECORDED_WHERE_ON}
    settings |= {"dataset": shown_name(data.dataset), "augment": data.augmentation, **vars(model)}
    if model.pretrained is not None:
        settings |= {"model": None, "model_kwargs": None, "pretrained": model.name}
    own = {"optim", *RecipeArguments.__annotations__, *(f.name for f in fields(AMPArguments))}
    own -= _RECORDED_WHERE_ON
    options = fields(training)
    recorded = [f.name for f in options if f.name in own] + _STOCK.split()
    recorded += [f.name for f in options if _changed(f, training)]
    settings |= {name: getattr(training, name) for name in recorded}
    return {name: _plain(value) for name, value in settings.items() if decides_outcome(name)}


def _plain(value: Any) -> Any:
    """Return a value that transformers has made of a plain one as JSON and YAML can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.value if isinstance(value, Enum) else value


def _changed(option: Field[Any], training: RecipeArguments) -> bool:
    """Tell whether an option differs from its default, as far as transformers, which settles some, lets us see."""
    value = getattr(training, option.name)
    default = option.default if option.default_factory is MISSING else option.default_factory()
    if is_dataclass(value):  # transformers makes it of the default None, or of a dict
        return value != type(value)()  # type: ignore[misc]
    return value != default and not (default is None and value is False)
