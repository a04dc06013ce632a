"""Options with values that make no sense are refused in one line that says what is wrong, before anything is read.

What comes of every option with values of all types: tests/project/test_inputs.py.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from main_job import QUICK
from transformers import TrainingArguments

from amp_plugin.metrics import classification_scores
from amp_plugin.train import job, options
from amp_plugin.train.command_line import CommandLine
from amp_plugin.train.optimizer_arguments import check_optimizer
from amp_plugin.train.ranges import RANGES
from amp_plugin.train.run_folder import write_config
from amp_plugin.train.settings import settings_of
from amp_plugin.train.stock_options import METRICS, check_precision
from amp_plugin.train.unused_options import without_effect

KINDS = (options.DataArguments, options.ModelArguments, options.RecipeArguments)
FIELDS = {field.name: field for kind in KINDS for field in dataclasses.fields(kind) if field.init}
OWN = {name for name in FIELDS if name not in {field.name for field in dataclasses.fields(TrainingArguments)}}
NUMBERS = [name for name in RANGES if name in FIELDS]


def checked(*argv: str) -> tuple[options.DataArguments, options.ModelArguments, options.RecipeArguments]:
    """Make all checks that come before the data are read."""
    parsed = options.parse([*argv, *(() if any(a.startswith("--use_cpu") for a in argv) else ("--use_cpu", "true"))])
    job.check_trackers(parsed[2].report_to)
    check_optimizer(parsed[2])
    check_precision(parsed[2])
    return parsed


def outside(name: str) -> Iterator[str]:
    """Yield values outside an option's range, of the option's own type."""
    low, high = (float(end) for end in RANGES[name][1:-1].split(", "))
    kinds = typing.get_type_hints(next(kind for kind in KINDS if name in typing.get_type_hints(kind)))[name]
    whole = kinds is int or int in typing.get_args(kinds)
    yield str(int(low) - 1) if whole else "-0.5"
    if RANGES[name].startswith("("):
        yield str(int(low))
    if not whole:
        yield "nan"
        if RANGES[name].endswith(")"):
            yield "inf"
    if high != float("inf"):
        yield str(int(high + 1))
    elif whole:
        yield str(2**32)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_its_range_is_named_with_the_range(name: str) -> None:
    values = list(outside(name))
    assert values
    for value in values:
        with pytest.raises(ValueError, match=rf"^--{name} must be (at least|above) .*, got "):
            options.parse([f"--{name}={value}", "--use_cpu", "true"])


def test_every_number_of_ours_has_a_range() -> None:
    hints = {name: hint for kind in KINDS for name, hint in typing.get_type_hints(kind).items()}
    numbers = {name for name in OWN if {int, float} & {hints[name], *typing.get_args(hints[name])}}
    assert numbers - {"lr_milestones"} <= RANGES.keys()


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_best_model_has_the_lowest_error_and_the_highest_accuracy(metric: str, prefix: str) -> None:
    _, _, args = checked("--metric_for_best_model", prefix + metric)
    assert args.greater_is_better is (metric == "accuracy")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("--metric_for_best_model eror", "--metric_for_best_model 'eror' is not measured, did you mean 'error'"),
        ("--metric_for_best_model error --greater_is_better true", "would keep the worst model: less is better"),
        ("--optim_args momentun=0.9", "sgd takes no 'momentun' there, did you mean 'momentum'"),
        ("--optim_args momentum", "must be NAME=VALUE"),
        ("--optim_args momentum=much", "could not convert string to float: 'much'"),
        ("--optim_args momentum=nan", "momentum must be finite"),
        ("--optim_args momentum=0.9,momentum=0.8", "has momentum twice"),
        ("--optim_args momentum=0.9,nesterov=maybe", "nesterov must be true or false"),
        ("--optim_args nesterov=true", "Nesterov momentum requires a momentum"),
        ("--optim_args weight_decay=0.1", "say --weight_decay"),
        ("--optim_args lr=0.1", "say --learning_rate"),
        ("--optim sam --optim_args momentun=0.9", "sgd takes no 'momentun'"),
        ("--optim amp_adamw_torch --optim_args betas=0.9", "say --adam_beta1 and --adam_beta2"),
        ("--optim adagrad --optim_args lr_decai=0.1", "did you mean 'lr_decay'; it takes lr_decay, eps"),
        ("--optim lomo", "--optim lomo: You need to install"),
        ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"a":1}', "unexpected keyword argument 'a'"),
        ("--save_strategy epok", "--save_strategy: epok is not a valid SaveStrategy, did you mean 'epoch'"),
        ("--output_dir=", "--output_dir is empty"),
        ("--dataset=", "--dataset is empty; give a value, or leave it out"),
        ("--report_to tensorboard --report_to=", "--report_to is empty"),
        ("--data_root nosuch", "--data_root 'nosuch' is no folder"),
        ("--augment cutot", "invalid choice: 'cutot', did you mean 'cutout'; choose one of default, none"),
        ("--amp_norm globl", "--amp_norm 'globl' is unknown, did you mean 'global'"),
        ("--do_train false", "--do_train false: this job trains"),
        ("--do_eval false", "--do_eval false: this job tests"),
        ("--torch_compile_backend nosuch", "--torch_compile_backend 'nosuch' is unknown; choose one of aot_eager"),
        (
            "--torch_compile_mode max-autotun",
            "--torch_compile_mode 'max-autotun' is unknown, did you mean 'max-autotune'",
        ),
        (
            "--accelerator_config nosuch",
            "--accelerator_config must be a JSON object or a file with one, got 'nosuch': No",
        ),
        (
            '--accelerator_config {"a":1}',
            "--accelerator_config: AcceleratorConfig.__init__() got an unexpected keyword",
        ),
        ('--deepspeed {"a":1}', "--deepspeed: No package metadata was found"),
        ("--deepspeed {}", "--deepspeed has no settings"),
        ("--fsdp nosuch", "--fsdp: Unknown `fsdp` option: nosuch"),
        ('--fsdp_config {"a":1,"a":2}', "--fsdp_config must be a JSON object or a file with one"),
        ("--lr_scheduler_kwargs [1]", "--lr_scheduler_kwargs must be a JSON object, got '[1]'"),
        ("--prediction_loss_only true", "--prediction_loss_only leaves nothing to report"),
        ("--label_names image", "--label_names"),
        ("--remove_unused_columns true", "--remove_unused_columns"),
        ("--neftune_noise_alpha 5", "--neftune_noise_alpha"),
        ("--batch_eval_metrics true", "--batch_eval_metrics"),
        ("--eval_do_concat_batches false", "--eval_do_concat_batches"),
        ("--include_for_metrics inputs", "--include_for_metrics"),
        ("--use_liger_kernel true", "--use_liger_kernel"),
        ("--auto_find_batch_size true", "--auto_find_batch_size: where memory runs out"),
        (
            "--fp16 true",
            "fp16 (--fp16, or --mixed_precision of accelerate launch): on a CPU accelerate would compute in",
        ),
        ("--fast --fp16 true", "fp16 (--fp16,"),
        ("--bf16 true --fp16_full_eval true", "--fp16_full_eval does not go with --bf16"),
        ("--train_sampling_strategy group_by_length", "--train_sampling_strategy"),
        ('--accelerator_config {"split_batches":true}', "--accelerator_config split_batches"),
        ("--dataloader_persistent_workers true", "needs --dataloader_num_workers"),
        ('--model_kwargs {"in_chans":1}', "--model_kwargs has 'in_chans', but images have three channels"),
        ('--model_kwargs {"features_only":true}', "--model_kwargs has 'features_only', but a network without"),
        ('--model_kwargs {"width":4,"width":8}', "'width' is there twice"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_data_are_read(told: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        checked(*told.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "told",
    [
        "--optim_args momentum=0.8,dampening=0.1",
        "--optim rmsprop --optim_args alpha=0.9,centered=true",
        "--optim amp_adafactor",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":0.01}',
        "--lr_scheduler_type reduce_lr_on_plateau --metric_for_best_model nll",
        "--label_names labels",
        "--max_grad_norm inf",
        "--max_steps -1",
    ],
)
def test_what_fits_is_taken(told: str) -> None:
    checked(*told.split())


@pytest.mark.parametrize("way", ["launcher", "recipe", "dry run"])
def test_a_cpu_computes_in_no_fp16_whoever_asks_for_it(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*QUICK, "--output_dir", str(tmp_path / "out")]
    if way == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    elif way == "recipe":
        (tmp_path / "mine.yaml").write_text("fp16: true\n")
        given = [str(tmp_path / "mine.yaml"), *given]
    else:
        given += ["--fp16", "true", "--dry_run"]
    with pytest.raises(ValueError, match=r"on a CPU accelerate would compute in float32 and call it fp16; use bf16"):
        job.main(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ("--adam_beta1 0.5 --adam_epsilon 1e-6", ["adam_beta1", "adam_epsilon"]),
        ("--optim amp_adamw_torch --adam_beta1 0.5 --adam_epsilon 1e-6", []),
        ("--save_steps 7 --eval_steps 7 --logging_steps 7", ["eval_steps", "logging_steps", "save_steps"]),
        ("--save_strategy steps --save_steps 7 --save_total_limit 1", []),
        ("--lr_scheduler_type cosine --lr_gamma 0.5", ["lr_gamma"]),
        ("--lr_gamma 0.5 --lr_milestones 0.25", []),
        ("--dataloader_pin_memory true", ["dataloader_pin_memory"]),
        ("--gradient_checkpointing_kwargs {}", ["gradient_checkpointing_kwargs"]),
        ("--gradient_checkpointing true --gradient_checkpointing_kwargs {}", []),
        ("--hub_model_id mine/model --run_name mine", ["hub_model_id", "run_name"]),
        ("--hub_model_id mine/model --push_to_hub true", []),
    ],
)
def test_what_would_change_nothing_is_told(told: str, named: list[str]) -> None:
    words = [*told.split(), "--use_cpu", "true"]
    notes = without_effect(CommandLine(options.TYPES).changed(words), options.parse(words)[2])
    assert [note.split()[0] for note in notes] == [f"--{name}" for name in named]


def test_a_run_s_own_settings_change_something(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", *checked("--lr_scheduler_type", "cosine", "--optim", "sgd"))
    words = [*options.with_recipe([str(tmp_path / "config.yaml")]), "--use_cpu", "true"]
    assert not without_effect(CommandLine(options.TYPES).changed(words), options.parse(words)[2])


def test_the_metrics_are_those_of_an_evaluation() -> None:
    measured = classification_scores([[0.0, 1.0]], [1])
    assert METRICS.keys() == {*measured, "loss"}


def test_no_of_yaml_is_the_word() -> None:
    assert str(checked("--save_strategy", "False")[2].save_strategy.value) == "no"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (("--per_device_train_batch_size", "100"), "60 examples to train on are fewer than the 100 of a batch"),
        (("--per_device_eval_batch_size", "7"), "examples out of the test"),
    ],
)
def test_dropping_the_last_batch_must_leave_one_and_the_whole_test(told: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job.main([*QUICK, "--dry_run", "--dataloader_drop_last", "true", *told])


@pytest.mark.parametrize(
    "model",
    [
        ("resnet18", "{}"),
        ("vit_tiny_patch16_224", '{"depth": 1}'),
        ("resnet18", None),
    ],
)
def test_an_architecture_is_made_for_the_images(
    model: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [a for a in QUICK if a != "--model_kwargs" and "width" not in a]
    kwargs = [] if model[1] is None else ["--model_kwargs", model[1]]
    job.main([*quick, "--dry_run", "--model", model[0], *kwargs])


@pytest.mark.parametrize(
    "model",
    [
        ("vit_tiny_patch16_224", '{"depth": 1, "img_size": 224}', "does not take images of 32 x 32 pixels"),
        ("resnet18", '{"global_pool": ""}', "does not take images"),
        ("preactresnet18", '{"width": NaN}', "does not take these arguments"),
        ("preactresnet18", '{"layers": 3}', "does not take these arguments"),
        ("preactresnet18", '{"layers": [], "width": 4}', "preactresnet18"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused_before_the_training(
    model: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=model[2]) as caught:
        job.main([*QUICK, "--dry_run", "--model", model[0], "--model_kwargs", model[1]])
    assert "\n" not in str(caught.value)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' stands in line 1 and again in line 2"),
        ("model_kwargs: {width: 4, width: 8}\n", "'width' stands in line 1 and again in line 1"),
        ("learning_rate: 1\nlearning-rate: 2\n", "has both learning_rate and learning-rate, which are one option"),
        ("model_kwargs: {width: !!set {a, b}}\n", "could not determine a constructor for the tag"),
        ("model_kwargs: {width: !!binary aGFsbG8=}\n", "could not determine a constructor for the tag"),
        ("seed: !!python/object/apply:os.system ['true']\n", "could not determine a constructor for the tag"),
        ("? [a, b]\n: 1\n", "a key is a list or a mapping"),
        (LAUGHS, "*a in line 2 refers to &a; write out what it stands for"),
        ("model_kwargs: " + "[" * 20000, "is not YAML"),
        ("a: &a [*a]\n", "refers to &a"),
        ("save_strategy: yes\n", "--save_strategy: True is not a valid SaveStrategy"),
    ],
)
def test_a_recipe_holds_plain_values_and_each_key_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        options.parse([str(tmp_path / "mine.yaml"), "--use_cpu", "true"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_date_and_a_no_in_a_recipe_are_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run_name: 2024-01-02\nsave_strategy: no\nmodel_kwargs: {name: 2024-01-02}\n")
    _, model, args = options.parse([str(tmp_path / "mine.yaml"), "--use_cpu", "true"])
    assert (args.run_name, model.parsed_model_kwargs()) == ("2024-01-02", {"name": "2024-01-02"})
    assert str(args.save_strategy.value) == "no"  # type: ignore[attr-defined]


def test_an_option_that_transformers_makes_an_object_of_is_recorded_as_given(tmp_path: Path) -> None:
    parsed = checked("--accelerator_config", '{"even_batches": false}')
    write_config(tmp_path / "config.yaml", *parsed)
    again = options.parse([str(tmp_path / "config.yaml"), "--use_cpu", "true"])
    assert settings_of(*again) == settings_of(*parsed)
    assert settings_of(*again)["accelerator_config"]["even_batches"] is False


FEATURES_OF_ONE_PIXEL = ["--image_size", "8", "--per_device_train_batch_size", "20", "--dry_run"]


@pytest.mark.parametrize(
    "told", [["--train_images", "41"], ["--train_images", "1"], ["--per_device_train_batch_size=1"]]
)
def test_a_batch_of_one_that_the_model_cannot_train_on_is_told_before_the_first_epoch(told: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"^a batch of an epoch holds one example \(\d+ in batches of \d+\), and the m"
    ):
        job.main([*QUICK, *FEATURES_OF_ONE_PIXEL, *told])


@pytest.mark.parametrize(
    "told", [["--train_images", "42"], ["--max_steps", "2"], ["--dataloader_drop_last", "true"], ["--image_size", "32"]]
)
def test_a_batch_of_one_harms_no_training_without_it_or_with_larger_features(told: list[str]) -> None:
    job.main([*QUICK, *FEATURES_OF_ONE_PIXEL, "--train_images", "41", *told])
