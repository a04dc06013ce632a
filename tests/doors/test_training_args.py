"""`AMPArguments` beside the arguments of another library, in either order."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from amp_plugin import AMPArguments, AMPTrainingArguments


@dataclass
class TheirConfig(TrainingArguments):
    """Arguments of a library: other defaults, one option more, and a check of its own."""

    learning_rate: float = field(default=2e-5)
    logging_steps: float = field(default=10)
    temperature: float = field(default=1.0, metadata={"help": "Divisor of the logits."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.temperature <= 0.0:
            raise ValueError("temperature must be positive")
        self.checked = True


@dataclass
class Last(TheirConfig, AMPArguments):
    """AMP's options behind theirs."""


@dataclass
class First(AMPArguments, TheirConfig):
    """AMP's options before theirs."""


class UndecoratedLast(TheirConfig, AMPArguments):
    """No dataclass, so without AMP's fields."""


class UndecoratedFirst(AMPArguments, TheirConfig):
    """No dataclass, so without their fields."""


ORDERS = pytest.mark.parametrize("config", [Last, First])


@ORDERS
def test_the_defaults_of_the_other_class_stay(tmp_path: Path, config: Any) -> None:
    theirs, ours = TheirConfig(str(tmp_path), use_cpu=True), config(str(tmp_path), use_cpu=True)
    settings = theirs.to_dict()
    assert {name: value for name, value in ours.to_dict().items() if name in settings} == settings
    assert (ours.learning_rate, ours.logging_steps, ours.uses_amp, ours.checked) == (2e-5, 10, False, True)
    assert config(str(tmp_path), optim="sgd", use_cpu=True).optim_args is None


@ORDERS
@pytest.mark.parametrize(
    ("optim", "base", "optim_args"),
    [("amp", "sgd", "momentum=0.9,nesterov=True"), ("amp_adamw_torch", "adamw_torch", None)],
)
def test_amp_is_asked_for_by_name(tmp_path: Path, config: Any, optim: str, base: str, optim_args: str | None) -> None:
    args = config(str(tmp_path), optim=optim, amp_epsilon=0.2, temperature=2.0, use_cpu=True)
    assert (args.optim, args.uses_amp, args.amp_epsilon, args.checked) == (optim, True, 0.2, True)
    stock = args.base_arguments()
    assert (stock.optim, stock.optim_args, stock.temperature) == (base, optim_args, 2.0)
    assert args.optim == optim


@ORDERS
@pytest.mark.parametrize("optim", ["amp", "amp_adafactor", "adamw_torch"])
def test_they_survive_parsing_json_replace_and_pickle(tmp_path: Path, config: Any, optim: str) -> None:
    parser = HfArgumentParser(config)
    with_amp = optim.startswith("amp")
    ball = {"amp_epsilon": "0.2", "amp_norm": "global"} if with_amp else {}
    command = ["--output_dir", str(tmp_path), "--optim", optim, "--temperature", "2", "--use_cpu", "true"]
    (args,) = parser.parse_args_into_dataclasses([*command, *(w for k, v in ball.items() for w in (f"--{k}", v))])
    (tmp_path / "args.json").write_text(json.dumps(args.to_dict()))
    duplicates: list[Callable[[], Any]] = [
        lambda: args,
        lambda: replace(args, logging_steps=7),
        lambda: pickle.loads(pickle.dumps(args)),
        lambda: copy.deepcopy(args),
        lambda: parser.parse_json_file(tmp_path / "args.json")[0],
    ]
    for duplicate in duplicates:
        again = duplicate()
        assert type(again) is config
        assert (again.optim, again.temperature, again.learning_rate) == (optim, 2.0, 2e-5)
        assert (again.amp_epsilon, again.amp_norm) == ((0.2, "global") if with_amp else (0.5, "tensor"))
        assert again.uses_amp == with_amp


@ORDERS
def test_both_classes_check_their_own(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        config(str(tmp_path), optim="amp", temperature=0.0, use_cpu=True)
    with pytest.raises(ValueError, match="optim 'amp_adamv' is unknown, did you mean"):
        config(str(tmp_path), optim="amp_adamv", use_cpu=True)
    with pytest.raises(ValueError, match="rng must be one of 'same', 'fresh', got 'new'"):
        config(str(tmp_path), amp_rng="new", use_cpu=True)


@pytest.mark.parametrize("config", [UndecoratedLast, UndecoratedFirst, AMPArguments])
def test_a_class_that_is_no_dataclass_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(TypeError, match=rf"{config.__name__} has not the fields of all its bases.*@dataclass class"):
        config(output_dir=str(tmp_path), optim="amp")


@pytest.mark.parametrize("bases", [(TheirConfig, AMPTrainingArguments), (AMPTrainingArguments, TheirConfig)])
def test_two_classes_with_defaults_for_everything_are_refused(bases: tuple[type, ...]) -> None:
    with pytest.raises(
        TypeError, match=r"AMPTrainingArguments and TheirConfig; combine TheirConfig with.*AMPArguments"
    ):
        type("Both", bases, {})
