"""Test runs whose folder was renamed, copied or moved, and runs that continue with one setting changed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import sys
import typing
from pathlib import Path

import pytest
import timm
import torch
from main_job import QUICK
from safetensors.torch import load_file, save_file

from amp_plugin.train import job, options
from amp_plugin.train.identity import check_checkpoint
from amp_plugin.train.run_folder import open_run
from amp_plugin.train.settings import settings_of

BEST = [*QUICK, "--save_strategy", "epoch", "--load_best_model_at_end", "true", "--metric_for_best_model", "nll"]
WEIGHTS = "model.safetensors"


def run(folder: Path, *arguments: str) -> str:
    """Run the job in a folder, and return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        job.main([*BEST, "--output_dir", str(folder), *arguments])
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run whose best model is that of its first epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        run(folder)
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        read = json.loads(state.read_text())
        read |= {"best_global_step": 3, "best_model_checkpoint": str(folder / "checkpoint-3"), "best_metric": 0.0}
        state.write_text(json.dumps(read))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the folder


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("limit", ["1", "2"])
def test_a_copy_continues_with_its_own_best_model(finished: Path, tmp_path: Path, limit: str) -> None:
    """The checkpoints of both name the best one by its folder before the copy."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    best = copy / "checkpoint-3" / WEIGHTS
    save_file({name: 2 * value for name, value in load_file(best).items()}, best, metadata={"format": "pt"})
    weights, before = best.read_bytes(), contents(finished)
    run(copy, "--resume_from_checkpoint", "last", "--save_total_limit", limit)
    assert (copy / WEIGHTS).read_bytes() == weights
    assert contents(finished) == before
    left = {path.name for path in copy.glob("checkpoint-*")}
    assert left == {"1": {"checkpoint-3"}, "2": {"checkpoint-3", "checkpoint-6"}}[limit]


@pytest.mark.usefixtures("no_pictures")
def test_a_renamed_folder_is_opened_predicts_and_continues(finished: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(finished, tmp_path / "elsewhere" / "a name"))
    weights, before = (moved / WEIGHTS).read_bytes(), contents(moved)
    model = timm.create_model(f"local-dir:{moved}", pretrained=True).eval()
    saved = open_run(moved)
    batch = next(iter(saved.training_batches(10, 10)))
    with torch.no_grad():
        assert torch.equal(model(batch["pixel_values"]), saved.task.model.eval()(batch["pixel_values"]).logits)
    assert contents(moved) == before, "who reads a run writes nothing there"
    (moved / "README.md").unlink()
    run(moved, "--resume_from_checkpoint", "last", "--num_train_epochs", "2")
    assert "preactresnet18" in (moved / "README.md").read_text(), "the card is made again"
    assert (moved / WEIGHTS).read_bytes() == (moved / "checkpoint-3" / WEIGHTS).read_bytes() != weights


@pytest.mark.usefixtures("no_pictures")
def test_a_run_continues_elsewhere_from_a_folder_that_it_only_reads(finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    longer = ["--num_train_epochs", "3", "--load_best_model_at_end", "false"]
    printed = run(tmp_path / "new", "--resume_from_checkpoint", str(finished / "checkpoint-6"), *longer)
    assert "continues after step 6 of 9" in printed
    assert contents(finished) == before


def test_a_best_model_that_is_gone_or_was_chosen_otherwise_is_known_before(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    for state in copy.glob("checkpoint-*/trainer_state.json"):
        state.write_text(state.read_text().replace(str(finished), str(tmp_path / "gone")))
    shutil.rmtree(copy / "checkpoint-3")
    last = ["--resume_from_checkpoint", "last"]
    with pytest.raises(
        ValueError, match=r"checkpoint-3, the best model so far, is not in '.*copy' any more, and --load"
    ):
        run(copy, *last)
    for metric in ("accuracy", "eval_loss"):
        with pytest.raises(
            ValueError, match=f"metric_for_best_model: nll -> {metric}: the best model so far was chosen"
        ):
            run(finished, *last, "--metric_for_best_model", metric)


@pytest.mark.usefixtures("no_pictures")
def test_a_best_model_that_cannot_be_loaded_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.Trainer._load_best_model", lambda trainer: (tmp_path / "none").read_bytes())
    with pytest.raises(SystemExit) as left:
        job.run([*BEST, "--output_dir", str(tmp_path)])
    lines = str(left.value.code).strip().splitlines()
    assert lines[0].startswith("error: could not load the best model, ")
    assert lines[0].endswith("; the results are the last step's")
    assert lines[1].endswith("the same command with --resume_from_checkpoint last makes all of them")
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "checkpoint-6" / WEIGHTS).read_bytes()
    assert (tmp_path / "run.json").exists()


# --- the settings

KINDS = (options.DataArguments, options.ModelArguments, options.RecipeArguments)
FIELDS = {field.name: field for kind in KINDS for field in dataclasses.fields(kind) if field.init}
HINTS = {name: hint for kind in KINDS for name, hint in typing.get_type_hints(kind).items()}
OF_THE_MACHINE = {"deepspeed", "fsdp", "fsdp_config", "local_rank", "parallelism_config", "ddp_backend"}
# Another value than this run's, where the type does not tell one.
OTHER = {
    **{"amp_ascent": "stale", "amp_batch_norm": "all", "amp_norm": "global", "amp_parameters": "head"},
    **{"amp_rng": "fresh", "augment": "cutout", "lr_scheduler_type": "cosine", "optim": "sgd", "sync_ascent": "false"},
    **{"model": "resnet18", "model_kwargs": '{"width": 8}', "optim_args": "momentum=0.5", "lr_milestones": "0.3"},
    **{"logging_strategy": "no", "hub_strategy": "end", "log_level": "error", "log_level_replica": "error"},
    **{"report_to": "none", "label_names": "labels", "debug": "underflow_overflow", "lr_scheduler_kwargs": "{}"},
    **{"activation_checkpointing_kwargs": "{}", "gradient_checkpointing_kwargs": "{}", "amp_inner_iter": "2"},
    **{"torch_compile_backend": "eager", "torch_compile_mode": "default", "train_images": "50"},
    **{"accelerator_config": '{"even_batches": false}', "dataloader_multiprocessing_context": "fork"},
    **{"max_steps": "99", "num_train_epochs": "4", "lr_gamma": "0.5", "metric_for_best_model": "accuracy"},
    **{"data_root": ".", "dataset": "cifar100", "mixup_alpha": "0.5", "validation_images": "100"},
}
# These go on: they choose the length, what is tested, logged, saved and told when, and where the run is made.
GOES_ON = """
    compare_with corrupted_test_images cpu_threads data_root dataloader_num_workers dataloader_pin_memory
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm
    do_eval dry_run eval_accumulation_steps eval_delay eval_every_epochs eval_on_start eval_steps eval_use_gather_object
    hub_always_push hub_license hub_model_id hub_private_repo hub_revision hub_strategy hub_token ledger
    load_best_model_at_end log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter
    logging_steps logging_strategy max_steps minutes num_train_epochs output_dir per_device_eval_batch_size project
    push_to_hub report_to resume_from_checkpoint run_name save_minutes save_on_each_node save_only_model save_steps
    save_total_limit trackio_bucket_id trackio_space_id trackio_static_space_id use_cpu
"""
# These cannot be set alone, or not in this job, whether or not it continues a run.
REFUSED_ANYWAY = """
    auto_find_batch_size batch_eval_metrics dataloader_persistent_workers dataloader_prefetch_factor
    eval_do_concat_batches eval_strategy
    freeze_backbone greater_is_better include_for_metrics include_num_input_tokens_seen liger_kernel_config
    max_seq_length neftune_noise_alpha prediction_loss_only remove_unused_columns rmp_epsilon sam_rho save_strategy
    text_pair_column tf32 train_sampling_strategy use_liger_kernel warmup_steps
"""
# What an option is recorded as, where that is not its own name.
RECORDED = {"fast": "bf16", "sync_ascent": "amp_sync_ascent"}


def other_value(name: str) -> str:
    """Return a value of an option that is neither its default's nor this run's."""
    kinds, default = {HINTS[name], *typing.get_args(HINTS[name])}, FIELDS[name].default
    if name in OTHER:
        return OTHER[name]
    if bool in kinds:
        return str(default is not True and name not in ("load_best_model_at_end", "use_cpu")).lower()
    if int in kinds:
        return str(default + 2) if isinstance(default, int) else "7"
    if float in kinds:
        return str(default / 2) if isinstance(default, float) and default else "0.5"
    return "other"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(FIELDS.keys() - OF_THE_MACHINE))
def test_a_setting_that_is_changed_is_named_or_makes_no_difference(
    finished: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*BEST, "--output_dir", str(finished), "--resume_from_checkpoint", "last"]
    try:
        parsed = options.parse([*command, f"--{name}={other_value(name)}"])
    except ValueError:
        assert name in REFUSED_ANYWAY.split()
        return
    said, notes = "", list[str]()
    try:
        notes = check_checkpoint(str(finished / "checkpoint-6"), settings_of(*parsed), parsed[2])
    except ValueError as error:
        said = str(error)
    if name in GOES_ON.split():
        assert not said
        assert bool(notes) == (name in ("num_train_epochs", "max_steps"))
    else:
        assert f" {RECORDED.get(name, name)}: " in f" {said}"
        assert " -> " in said
        assert "\n" not in said
