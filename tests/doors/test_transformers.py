from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from launch import run_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from amp_plugin import AMP, AMPTrainer, AMPTrainingArguments

SAMPLES, MICRO_BATCH = 44, 4


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
        self.labels = torch.randint(4, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


class Net(nn.Module):
    """A classifier that returns its loss; without BatchNorm, so that a window equals one large batch."""

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.GELU(), nn.Flatten(), nn.Dropout(dropout))
        self.fc = nn.Linear(216, 4)
        self.passes = 0
        self.loss_scale = 1.0
        self.config = SimpleNamespace()  # the Trainer looks at it when labels are smoothed

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.passes += self.training
        logits = self.fc(self.body(pixel_values))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels) * self.loss_scale, "logits": logits}


class InOrder(AMPTrainer):
    """Without shuffling, so that the batches are known."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **kwargs: Any) -> AMPTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "optim": "amp",
        "learning_rate": 0.05,
        "weight_decay": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": MICRO_BATCH,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 1.0,
    }
    return AMPTrainingArguments(**{**defaults, **kwargs})


def trained(model: Net, args: AMPTrainingArguments, **kwargs: Any) -> InOrder:
    trainer = InOrder(model=model, args=args, train_dataset=Images(), **kwargs)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def hand_written_loop(model: Net, accumulation: int, optimizer: AMP, epochs: int = 2) -> list[tuple[float, float]]:
    """One large batch for each window; the last one of an epoch has what is left. Returns clean and AMP losses."""
    data, losses = Images(), []
    for _ in range(epochs):
        for images, labels in zip(
            data.images.split(MICRO_BATCH * accumulation), data.labels.split(MICRO_BATCH * accumulation), strict=True
        ):
            passes: list[float] = []
            for _ in range(optimizer.inner_iter + 1):
                loss = F.cross_entropy(model.fc(model.body(images)), labels)
                loss.backward()
                passes.append(loss.item())
                if len(passes) <= optimizer.inner_iter:
                    optimizer.ascend()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((passes[0], passes[-1]))
    return losses


def grouped(model: Net) -> list[dict[str, Any]]:
    """The Trainer's groups: biases are not decayed."""
    return [
        {"params": [p for n, p in model.named_parameters() if "bias" not in n], "weight_decay": 1e-2},
        {"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0},
    ]


# --- the accumulation window


@pytest.mark.parametrize("accumulation", [1, 2, 4])  # 11 micro-batches: the last window has 1, 1 and 3
@pytest.mark.parametrize("inner_iter", [1, 2])
@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("optim", ["amp", "amp_adamw_torch"])
def test_a_window_equals_one_large_batch(
    tmp_path: Path, accumulation: int, inner_iter: int, norm: Any, optim: str
) -> None:
    ours, theirs = Net(), Net()
    settings: dict[str, Any] = {"epsilon": 0.1, "inner_lr": 0.5, "inner_iter": inner_iter, "norm": norm}
    lr = 0.05 if optim == "amp" else 0.01
    args = arguments(
        tmp_path,
        optim=optim,
        learning_rate=lr,
        gradient_accumulation_steps=accumulation,
        **{f"amp_{name}": value for name, value in settings.items()},
    )
    trainer = trained(ours, args)
    base: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if optim == "amp" else {"base_optimizer": "AdamW"}
    losses = hand_written_loop(theirs, accumulation, AMP(grouped(theirs), lr, **settings, **base))
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.linalg.vector_norm(p - q[1]) < 2e-6 * torch.linalg.vector_norm(q[1]), name
    logs = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["loss"] for r in logs] == pytest.approx([clean for clean, _ in losses], rel=1e-4)
    assert [r["amp_loss"] for r in logs] == pytest.approx([amp for _, amp in losses], rel=1e-4)
    assert all(r["sharpness"] == pytest.approx(r["amp_loss"] - r["loss"]) for r in logs)
    assert all(0.0 <= r["clipped"] <= 1.0 and r["perturbation_norm"] > 0.0 for r in logs)
    assert ours.passes == 2 * 11 * (inner_iter + 1)


@pytest.mark.parametrize("optim", ["amp", "sgd"])
def test_logs_are_means_over_the_steps_since_the_last_log(tmp_path: Path, optim: str) -> None:
    every, third = (
        [r for r in trained(Net(), arguments(tmp_path, optim=optim, logging_steps=n)).state.log_history if "loss" in r]
        for n in (1, 11)
    )
    for key in ("loss", "amp_loss", "clipped") if optim == "amp" else ("loss",):
        assert third[0][key] == pytest.approx(sum(r[key] for r in every[:11]) / 11, rel=1e-5)
    assert ("amp_loss" in third[0]) == (optim == "amp")


class NaNAtOnePoint(InOrder):
    """Loses the value of the loss at theta + delta, in some of the steps; the gradient stays."""

    steps: tuple[int, ...] = (3,)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        lost = self.amp is not None and self.amp.perturbed and self.state.global_step in self.steps
        return loss + torch.tensor(torch.nan) if lost else loss


@pytest.mark.parametrize("lost", [(3,), (0, 5), tuple(range(22))])
@pytest.mark.parametrize("filtered", [True, False])
def test_the_filter_of_the_logs_is_for_the_loss_at_the_perturbed_weights_too(
    tmp_path: Path, filtered: bool, lost: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NaNAtOnePoint, "steps", lost)
    logs = []
    for kind, logging_steps in ((InOrder, 1), (NaNAtOnePoint, 11)):
        args = arguments(tmp_path, logging_steps=logging_steps, logging_nan_inf_filter=filtered)
        trainer = kind(model=Net(), args=args, train_dataset=Images())
        trainer.train()
        logs.append([r for r in trainer.state.log_history if "loss" in r])
    every, third = logs
    there = [r for i, r in enumerate(every[:11]) if i not in lost]
    assert third[0]["loss"] == pytest.approx(sum(r["loss"] for r in every[:11]) / 11, rel=1e-5)
    for key in ("amp_loss", "sharpness"):
        if not filtered:
            assert math.isnan(third[0][key])
        elif there:
            assert third[0][key] == pytest.approx(sum(r[key] for r in there) / len(there), rel=1e-4)
        else:
            assert key not in third[0], "a mean of no value"


@pytest.mark.parametrize("off", [{"amp_epsilon": 0.0}, {"amp_inner_iter": 0}])
def test_without_perturbation_it_is_the_stock_trainer_bit_for_bit(tmp_path: Path, off: dict[str, Any]) -> None:
    a, b = Net(dropout=0.5, batch_norm=True), Net(dropout=0.5, batch_norm=True)
    trained(a, arguments(tmp_path, gradient_accumulation_steps=2, **off))
    trained(b, arguments(tmp_path, gradient_accumulation_steps=2, optim="sgd"))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert a.passes == b.passes


def test_sgd_gives_the_stock_trainers_weights(tmp_path: Path) -> None:
    class InOrderStock(Trainer):
        _get_train_sampler = InOrder._get_train_sampler

    a, b = Net(), Net()
    args = arguments(tmp_path, optim="sgd")
    trained(a, args)
    stock = TrainingArguments(
        **{
            f: getattr(args, f)
            for f in ("output_dir", "learning_rate", "weight_decay", "lr_scheduler_type", "num_train_epochs")
        },
        per_device_train_batch_size=MICRO_BATCH,
        optim="sgd",
        optim_args="momentum=0.9,nesterov=True",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    InOrderStock(model=b, args=stock, train_dataset=Images()).train()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_label_smoothing_and_dropout_masks(tmp_path: Path) -> None:
    """A vanishing ball: the same masks in both passes make it SGD; fresh ones do not."""
    nets = {rng: Net(dropout=0.5) for rng in ("same", "fresh", "sgd")}
    for rng, net in nets.items():
        args: dict[str, Any] = {"optim": "sgd"} if rng == "sgd" else {"amp_rng": rng, "amp_epsilon": 1e-30}
        trained(net, arguments(tmp_path, label_smoothing_factor=0.1, gradient_accumulation_steps=3, **args))
    assert torch.equal(nets["same"].fc.weight, nets["sgd"].fc.weight)
    assert not torch.equal(nets["fresh"].fc.weight, nets["sgd"].fc.weight)


@pytest.mark.parametrize(("policy", "updates"), [("clean", 22), ("all", 44)])
def test_running_statistics_follow_the_policy(tmp_path: Path, policy: str, updates: int) -> None:
    net = Net(batch_norm=True)
    trained(net, arguments(tmp_path, gradient_accumulation_steps=2, amp_batch_norm=policy))
    assert net.body[1].num_batches_tracked == updates


def test_flos_count_every_pass(tmp_path: Path) -> None:
    net = Net()
    net.main_input_name = "pixel_values"  # type: ignore[assignment]
    net.num_parameters = lambda **_: 100  # type: ignore[assignment]
    counts = {}
    for optim in ("amp", "sgd"):
        ball = {"amp_inner_iter": 2} if optim == "amp" else {}
        trainer = InOrder(model=net, args=arguments(tmp_path, optim=optim, **ball), train_dataset=Images())
        trainer.train()
        counts[optim] = trainer.state.total_flos
    assert counts["amp"] == 3 * counts["sgd"] > 0


def test_models_that_ignore_num_items_in_batch_get_the_right_scale(tmp_path: Path) -> None:
    """transformers' image classifiers take **kwargs but do not use num_items_in_batch (transformers#47688)."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], num_labels=4, layer_type="basic")
    norms = []
    for accumulation in (1, 2):
        torch.manual_seed(0)
        model = ResNetForImageClassification(config).eval()
        model.train = lambda mode=True, model=model: model  # type: ignore[method-assign] # frozen statistics: exact
        args = arguments(
            tmp_path,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4 // accumulation,
            max_steps=1,
        )
        norms.append(trained(model, args).state.log_history[0]["perturbation_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# --- resume, stops and failures


class StopAt(TrainerCallback):
    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, self._stop)
        self.step = step
        self.calls = 0

    def _stop(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.step:
            control.should_training_stop = True
            control.should_save = True
        return control


@pytest.mark.parametrize("stop", [3, 8])  # in the middle of the first and of the second epoch
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(tmp_path: Path, stop: int) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "amp_inner_iter": 2, "lr_scheduler_type": "cosine"}
    whole, interrupted = Net(dropout=0.5, batch_norm=True), Net(dropout=0.5, batch_norm=True)
    trained(whole, arguments(tmp_path / "whole", **settings))
    first = arguments(tmp_path / "parts", save_strategy="steps", save_steps=stop, **settings)
    trained(interrupted, first, callbacks=[StopAt("on_step_end", stop)])
    resumed = Net(dropout=0.5, batch_norm=True)
    checkpoint = str(tmp_path / "parts" / f"checkpoint-{stop}")
    trained(resumed, arguments(tmp_path / "parts", resume_from_checkpoint=checkpoint, **settings))
    assert not torch.equal(interrupted.fc.weight, whole.fc.weight)
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_a_checkpoint_holds_clean_weights_and_loads_as_weights_only(tmp_path: Path) -> None:
    net = Net()
    trained(net, arguments(tmp_path, save_strategy="steps", save_steps=22))
    state = torch.load(tmp_path / "checkpoint-22" / "optimizer.pt", weights_only=True)
    assert {key for s in state["state"].values() for key in s} == {"momentum_buffer"}
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-22" / "model.safetensors")
    assert torch.equal(saved["fc.weight"], net.fc.weight)


def test_a_stop_in_the_middle_of_a_window_saves_clean_weights(tmp_path: Path) -> None:
    """The stop comes after 2 of 4 micro-batches of the first window: nothing has been updated yet."""
    net = Net()
    before = copy.deepcopy(net.state_dict())
    trainer = trained(net, arguments(tmp_path, gradient_accumulation_steps=4), callbacks=[StopAt("on_substep_end", 2)])
    assert not trainer.amp.perturbed  # type: ignore[union-attr]
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    trainer.save_model(str(tmp_path / "saved"))


@pytest.mark.parametrize("failing_pass", [1, 2, 3, 4, 5])
def test_an_exception_in_any_pass_leaves_clean_weights(tmp_path: Path, failing_pass: int) -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())

    def fail(*_: Any) -> None:
        if net.passes == failing_pass - 1:
            raise MemoryError("no memory left")

    net.register_forward_pre_hook(fail)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    if failing_pass <= 4:
        with pytest.raises(MemoryError):
            trained(net, args)
        assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
        assert all(p.grad is None or not p.grad.isnan().any() for p in net.parameters())
    else:
        with pytest.raises(MemoryError):
            trained(net, args)
        assert not torch.equal(net.fc.weight, before["fc.weight"]), "one step was made"


def test_evaluation_in_the_middle_of_a_window_is_refused(tmp_path: Path) -> None:
    class Evaluate(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            trainer.evaluate()

    trainer = InOrder(
        model=Net(),
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=Images(),
        eval_dataset=Images(),
        callbacks=[Evaluate()],
    )
    with pytest.raises(
        RuntimeError, match="cannot evaluate or predict in the middle of a gradient accumulation window"
    ):
        trainer.train()
    assert not trainer.amp.perturbed  # type: ignore[union-attr]
    assert "eval_loss" in trainer.evaluate()


def test_an_overflowing_fp16_ascent_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    """A gradient scaler on the CPU, put where accelerate has it with fp16."""
    net = Net()
    trainer = InOrder(model=net, args=arguments(tmp_path, max_steps=2), train_dataset=Images())
    net.loss_scale = 16.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the scaled loss overflows float32
    trainer.accelerator.scaler = scaler
    seen: list[tuple[float, bool]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append((scaler.get_scale(), torch.equal(net.fc.weight, start)))
            scaler.update(1024.0)

    start = net.fc.weight.detach().clone()
    trainer.add_callback(Watch())
    trainer.train()
    assert seen[0] == (2.0**126, True)
    assert seen[1] == (1024.0, False)


# --- arguments


@pytest.mark.parametrize("optim", ["amp", "amp_adamw_torch", "sgd", "adamw_torch"])
def test_arguments_survive_parsing_json_replace_and_pickle(tmp_path: Path, optim: str) -> None:
    parser = HfArgumentParser(AMPTrainingArguments)
    with_amp = optim.startswith("amp")
    ball = ["--amp_epsilon", "0.2", "--amp_sync_ascent", "false"] if with_amp else []
    command = ["--output_dir", str(tmp_path), "--optim", optim, *ball]
    (args,) = parser.parse_args_into_dataclasses([*command, "--use_cpu", "true"])
    (tmp_path / "args.json").write_text(json.dumps(args.to_dict()))
    duplicates: list[Callable[[], AMPTrainingArguments]] = [
        lambda: args,
        lambda: replace(args, logging_steps=7),
        lambda: pickle.loads(pickle.dumps(args)),
        lambda: copy.deepcopy(args),
        lambda: parser.parse_json_file(tmp_path / "args.json")[0],
    ]
    for duplicate in duplicates:
        again = duplicate()
        assert (again.optim, again.amp_epsilon) == (optim, 0.2 if with_amp else 0.5)
        assert again.amp_sync_ascent != with_amp
        assert again.uses_amp == with_amp


def test_options_of_amp_without_amp_are_an_error(tmp_path: Path) -> None:
    """A script whose optim is a stock one would train without AMP, whatever epsilon it sets."""
    with pytest.raises(ValueError, match=r"amp_epsilon, amp_inner_lr would have no effect: .* optim='amp_adamw_torch'"):
        arguments(tmp_path, optim="adamw_torch", amp_epsilon=0.2, amp_inner_lr=0.3)


def test_a_training_without_amp_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("amp_plugin.doors.trainer.logger.warning", told.append)
    trained(Net(), arguments(tmp_path, optim="sgd"))
    assert [message for message in told if "without Adversarial Model Perturbation" in message] == told[:1]
    told.clear()
    trained(Net(), arguments(tmp_path, optim="amp"))
    assert not told


@pytest.mark.parametrize("optim", ["amq", "amp_adamv", "amp_amp", "amp_"])
def test_an_unknown_optimizer_is_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(
        ValueError, match=rf"optim '{optim}' is unknown(, did.+')?; choose 'amp', a stock name, or 'amp_'"
    ):
        arguments(tmp_path, optim=optim)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"amp_batch_norm": "none"}, "batch_norm must be one of 'clean', 'all', got 'none'"),
        ({"amp_rng": "new"}, "rng must be one of 'same', 'fresh', got 'new'"),
        ({"amp_norm": "l1"}, "norm must be one of 'tensor', 'global', got 'l1'"),
        ({"amp_epsilon": -1.0}, "epsilon must be a finite number >= 0, got -1.0"),
        ({"amp_inner_iter": -1}, "inner_iter must be an integer >= 0, got -1"),
    ],
)
def test_invalid_settings_are_refused_before_training(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(Net(), arguments(tmp_path, **wrong))


@pytest.mark.parametrize("special", [{"params": []}, {"model": None}, {"optimizer_dict": {}}])
def test_optimizers_that_take_over_the_parameters_are_refused(
    tmp_path: Path, special: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stock Trainer returns for GaLore, LOMO and layer-wise optimizers."""
    monkeypatch.setattr(
        Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model: (torch.optim.SGD, special))
    )
    trainer = InOrder(model=Net(), args=arguments(tmp_path, optim="amp_adafactor"), train_dataset=Images())
    with pytest.raises(ValueError, match=r"--optim amp_adafactor.*use e.g. amp \(SGD\)"):
        trainer.create_optimizer()


def test_an_optimizer_that_is_not_amp_is_refused_when_amp_was_asked_for(tmp_path: Path) -> None:
    net = Net()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="the optimizer given to AMPTrainer is not AMP"):
        trained(net, arguments(tmp_path), optimizers=(sgd, None))


def test_stock_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="AMPTrainer needs AMPTrainingArguments, got TrainingArguments"):
        AMPTrainer(model=Net(), args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))


def test_weight_decay_on_all_parameters_as_in_the_paper(tmp_path: Path) -> None:
    for decay_all, expected in ((True, 4), (False, 2)):
        args = arguments(tmp_path, decay_all_parameters=decay_all)
        trainer = InOrder(model=Net(), args=args, train_dataset=Images())
        groups = trainer.create_optimizer().param_groups
        assert [len(g["params"]) for g in groups if g["weight_decay"] > 0] == [expected]


@pytest.mark.parametrize("wrong", [{"amp_batch_norm": "none"}, {"amp_rng": "new"}])
def test_an_unknown_policy_is_refused_by_the_arguments(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        arguments(tmp_path, **wrong)


def test_processes_that_would_each_train_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    AMPTrainingArguments(output_dir=str(tmp_path))  # a cluster's variable alone launches nothing
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun says
    with pytest.raises(ValueError, match=r"2 processes were launched.*--use_cpu true"):
        AMPTrainingArguments(output_dir=str(tmp_path))


def test_optim_args_replace_the_defaults_for_sgd(tmp_path: Path) -> None:
    trainer = InOrder(model=Net(), args=arguments(tmp_path, optim_args="momentum=0.5"), train_dataset=Images())
    group = trainer.create_optimizer().param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.5, False)


@pytest.mark.parametrize(
    ("sign", "host"),
    [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP1; use FSDP2"), ("is_fsdp_xla_enabled", "XLA")],
)
def test_hosts_that_cannot_run_amp_exactly_are_refused(tmp_path: Path, sign: str, host: str) -> None:
    class Elsewhere(AMPTrainer):
        """On that host, as far as the stock Trainer's own sign tells."""

        def _check_host(self) -> None:
            setattr(self, sign, True)
            super()._check_host()

    with pytest.raises(ValueError, match=f"--optim amp does not work exactly with {host}"):
        Elsewhere(model=Net(), args=arguments(tmp_path), train_dataset=Images())
    Elsewhere(model=Net(), args=arguments(tmp_path, optim="sgd"), train_dataset=Images())


def test_the_weights_are_clean_for_callbacks_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        seen: ClassVar[list[bool]] = []

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            self.seen.append(trainer.amp.perturbed)  # type: ignore[union-attr]

    trainer = InOrder(
        model=Net(),
        args=arguments(tmp_path, gradient_accumulation_steps=4),
        train_dataset=Images(),
        callbacks=[StopAt("on_substep_end", 2), Watch],
    )
    trainer.train()
    assert Watch.seen == [False]


def test_an_epoch_stopped_in_the_middle_of_a_window_leaves_nothing_behind(tmp_path: Path) -> None:
    """The first epoch stops in its first window: what follows is as if it had not been."""

    class StopFirstEpoch(TrainerCallback):
        stopped = False

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_epoch_stop = not self.stopped
            self.stopped = True
            return control

    a, b = Net(), Net()
    trained(a, arguments(tmp_path, gradient_accumulation_steps=4), callbacks=[StopFirstEpoch()])
    trained(b, arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_failure_that_the_trainer_survives_starts_again_from_clean_weights(tmp_path: Path) -> None:
    """auto_find_batch_size: out of memory in the middle of a window, then half the batch from the start."""
    net, weights = Net(), []

    def fail_once(*_: Any) -> None:
        if net.training and net.passes in (0, 3):
            weights.append(net.fc.weight.detach().clone())
        if net.passes == 3 and len(weights) == 2:
            net.passes = 0
            raise RuntimeError("CUDA out of memory.")

    net.register_forward_pre_hook(fail_once)
    trained(net, arguments(tmp_path, auto_find_batch_size=True, gradient_accumulation_steps=2, max_steps=1))
    assert not torch.equal(weights[1], weights[0]), "it failed at the perturbed weights"
    assert torch.equal(weights[2], weights[0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_scaler_changes_nothing(tmp_path: Path, accumulation: int) -> None:
    """Powers of two: with a gradient scaler on the CPU the weights are the same to the bit."""
    plain, scaled = Net(), Net()
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
        "amp_epsilon": 10.0,
        "max_grad_norm": 0.0,
    }
    trained(plain, arguments(tmp_path, **settings))
    trainer = InOrder(model=scaled, args=arguments(tmp_path, **settings), train_dataset=Images())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))


def test_an_overflow_in_the_ascent_alone_lowers_the_scale(tmp_path: Path) -> None:
    net = Net()
    before = net.fc.weight.detach().clone()
    net.register_forward_pre_hook(lambda *_: setattr(net, "loss_scale", float("inf") if net.passes == 0 else 1.0))
    trainer = InOrder(model=net, args=arguments(tmp_path, max_steps=1), train_dataset=Images())
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    assert scaler.get_scale() == 512.0
    assert torch.equal(net.fc.weight, before)


def test_every_ascent_but_the_first_is_an_additional_pass(tmp_path: Path) -> None:
    """Two ascents in a vanishing ball: one BatchNorm update a micro-batch, and the dropout masks of SGD."""
    a, b = Net(dropout=0.5, batch_norm=True), Net(dropout=0.5, batch_norm=True)
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2}
    trained(a, arguments(tmp_path, amp_inner_iter=2, amp_epsilon=1e-30, **settings))
    trained(b, arguments(tmp_path, optim="sgd", **settings))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """DDP over gloo; without amp_sync_ascent they differ from one, but the replicas stay equal."""
    for processes in (1, 2):
        run_processes(processes, "two_processes.py", tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for case, (weights, replicas_equal) in two.items():
        assert replicas_equal, case
        if case.startswith("synced"):
            torch.testing.assert_close(weights, one[case][0], rtol=1e-10, atol=1e-12)
        elif case in one:
            assert not torch.allclose(weights, one[case][0]), case


def test_saving_in_the_middle_of_a_window_is_refused(tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            trainer.save_model(str(tmp_path / "saved"))

    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = InOrder(model=Net(), args=args, train_dataset=Images(), callbacks=[Save()])
    with pytest.raises(RuntimeError, match="cannot save in the middle of a gradient accumulation window"):
        trainer.train()
    assert not (tmp_path / "saved").exists()
