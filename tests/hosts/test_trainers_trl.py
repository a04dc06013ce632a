"""TRL's Trainers with `AMPMixin` before them, against AMP by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from host_texts import (
    ACCUMULATION,
    MICRO_BATCH,
    ROWS,
    SETTINGS,
    WITH_AMP,
    Recorder,
    distance,
    judged,
    log_likelihood,
    tokenizer,
    words,
)
from language_problems import llama
from problems import assert_same_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

trl = pytest.importorskip("trl", reason="trains with TRL: pip install trl")

from datasets import Dataset, disable_progress_bars  # noqa: E402
from transformers import LlamaForSequenceClassification  # noqa: E402

from amp_plugin import AMP, AMPArguments, AMPMixin, AMPTrainingArguments  # noqa: E402

disable_progress_bars()
WINDOWS = [range(k, k + MICRO_BATCH * ACCUMULATION) for k in range(0, ROWS, MICRO_BATCH * ACCUMULATION)]
Objective = Callable[[nn.Module, list[int]], Tensor]


def with_amp(trainer: Any, config: Any) -> tuple[Any, Any]:
    """Both classes with AMP, as the guide has them."""

    @dataclass
    class MyConfig(config, AMPArguments):  # type: ignore[misc]
        """Their config with AMP."""

    class MyTrainer(AMPMixin, trainer):  # type: ignore[misc]
        """Their trainer with AMP."""

    return MyTrainer, MyConfig


@dataclass
class MySFTConfig(trl.SFTConfig, AMPArguments):  # type: ignore[misc]
    """As :func:`with_amp` makes it, and so that a checkpoint can name it."""


def in_order(trainer: Any) -> Any:
    class InOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    return InOrder


# --- what each trainer minimises, written from the papers


def sft(trainer: Any, start: nn.Module) -> Objective:
    rows = trainer.train_dataset["input_ids"]

    def loss(model: nn.Module, window: list[int]) -> Tensor:
        total = sum((log_likelihood(model, rows[i][:1], rows[i][1:]) for i in window), torch.zeros(()))
        return -total / sum(len(rows[i]) - 1 for i in window)

    return loss


def dpo(trainer: Any, start: nn.Module) -> Objective:
    reference, rows = copy.deepcopy(start).double(), trainer.train_dataset

    def margin(model: nn.Module, row: Any) -> Tensor:
        chosen, rejected = (log_likelihood(model, row["prompt_ids"], row[k]) for k in ("chosen_ids", "rejected_ids"))
        return chosen - rejected

    def loss(model: nn.Module, window: list[int]) -> Tensor:
        margins = [margin(model, rows[i]) - margin(reference, rows[i]).detach() for i in window]
        return -F.logsigmoid(0.1 * torch.stack(margins)).mean()

    return loss


def kto(trainer: Any, start: nn.Module) -> Objective:
    reference, rows = copy.deepcopy(start).double(), trainer.train_dataset

    def ratio(model: nn.Module, row: Any, kind: str) -> Tensor:
        tokens = row["prompt_ids"], row[f"{kind}completion_ids"]
        return log_likelihood(model, *tokens) - log_likelihood(reference, *tokens).detach()

    def loss(model: nn.Module, window: list[int]) -> Tensor:
        losses = []
        for k in range(0, len(window), MICRO_BATCH):
            batch = [rows[i] for i in window[k : k + MICRO_BATCH]]
            kl = torch.stack([ratio(model, row, "KL_") for row in batch]).mean().detach().clamp(min=0)
            signs = [1 if row["label"] else -1 for row in batch]
            losses += [
                1 - torch.sigmoid(0.1 * s * (ratio(model, row, "") - kl)) for s, row in zip(signs, batch, strict=True)
            ]
        return torch.stack(losses).mean()

    return loss


def reward(trainer: Any, start: nn.Module) -> Objective:
    rows = trainer.train_dataset

    def loss(model: nn.Module, window: list[int]) -> Tensor:
        scores = [
            [model(input_ids=torch.tensor([rows[i][k]])).logits[0, 0] for i in window]
            for k in ("chosen_ids", "rejected_ids")
        ]
        return -F.logsigmoid(torch.stack(scores[0]) - torch.stack(scores[1])).mean()

    return loss


def classifier() -> Any:
    config = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


@dataclass
class Host:
    name: str
    objective: Callable[[Any, nn.Module], Objective]
    row: Callable[[int], dict[str, Any]]
    model: Callable[[], Any] = llama
    refers: bool = False  # whether it compares with the model from before the training

    @property
    def classes(self) -> tuple[Any, Any]:
        return in_order(getattr(trl, f"{self.name}Trainer")), getattr(trl, f"{self.name}Config")

    def __call__(self, folder: Path, classes: Any, **settings: Any) -> Any:
        trainer, config = classes
        model = self.model()
        more = {"ref_model": copy.deepcopy(model)} if self.refers else {}
        more |= {name: settings.pop(name) for name in ("optimizers", "peft_config") if name in settings}
        data = Dataset.from_list([self.row(i) for i in range(ROWS)])
        args = config(str(folder), **{**SETTINGS, **settings})
        recorder = Recorder()
        made = trainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=[recorder], **more
        )
        made.steps = recorder.steps
        return made


HOSTS = [
    Host("SFT", sft, lambda i: {"text": words(6, i)}),
    Host(
        "DPO",
        dpo,
        lambda i: {"prompt": words(2, i), "chosen": " " + words(3, i + 50), "rejected": " " + words(2, i + 80)},
        refers=True,
    ),
    Host("Reward", reward, lambda i: {"chosen": words(4, i), "rejected": words(5, i + 50)}, model=classifier),
    Host(
        "KTO",
        kto,
        lambda i: {"prompt": words(2, i), "completion": " " + words(3, i + 50), "label": i % 3 > 0},
        refers=True,
    ),
]
each_host = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)


@each_host
def test_it_is_amp_over_the_window(host: Host, tmp_path: Path) -> None:
    trainer = host(tmp_path, with_amp(*host.classes), **WITH_AMP, decay_all_parameters=True)
    start = host.model()  # not a copy of the trainer's, whose forward is TRL's
    assert_same_parameters(start, trainer.model)
    objective = host.objective(trainer, start)
    trainer.train()
    expected = judged(start, objective, WINDOWS)
    assert distance(judged(start, objective, WINDOWS, epsilon=0.0), expected) > 1e-3, "the perturbation matters"
    assert distance(trainer.steps, expected) < 2e-5


def last_numbers(trainer: Any) -> list[dict[str, float]]:
    """What each log says, but for times."""
    return [{k: v for k, v in r.items() if "time" not in k} for r in trainer.state.log_history if "loss" in r]


@each_host
def test_without_a_ball_it_is_their_trainer_bit_for_bit(host: Host, tmp_path: Path) -> None:
    theirs = host(tmp_path, host.classes, optim="sgd")
    ours = host(tmp_path, with_amp(*host.classes), **{**WITH_AMP, "amp_epsilon": 0.0})
    for trainer in (theirs, ours):
        trainer.train()
    assert distance(ours.steps, theirs.steps) == 0.0
    for mine, plain in zip(last_numbers(ours), last_numbers(theirs), strict=True):
        assert {name: mine[name] for name in plain} == plain


@each_host
@pytest.mark.parametrize("ascent", ["full", "subset(0.5)", "split(0.5)", "momentum"])
def test_what_they_count_is_counted_once(host: Host, ascent: str, tmp_path: Path) -> None:
    theirs = host(tmp_path, host.classes, optim="sgd")
    ours = host(tmp_path, with_amp(*host.classes), **WITH_AMP, amp_ascent=ascent)
    for trainer in (theirs, ours):
        trainer.train()
    logs, plain = last_numbers(ours), last_numbers(theirs)
    assert [r["num_tokens"] for r in logs] == [r["num_tokens"] for r in plain]
    if ascent == "full":  # at theta, as the loss: in the first step theta is the same
        assert {name: logs[0][name] for name in plain[0] if name != "grad_norm"} == pytest.approx(
            {name: value for name, value in plain[0].items() if name != "grad_norm"}, rel=1e-6
        )


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_in_sft(bf16: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="trains LoRA adapters: pip install peft")
    host = HOSTS[0]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    trainer = host(
        tmp_path, with_amp(*host.classes), peft_config=lora, bf16=bf16, decay_all_parameters=True, **WITH_AMP
    )
    start = peft.get_peft_model(host.model(), lora)
    start.load_state_dict({n: p.clone() for n, p in trainer.model.state_dict().items()})
    objective = host.objective(trainer, start)
    trainer.train()
    expected = judged(start, objective, WINDOWS)
    assert all("lora" in name for name in expected[0])
    matters = distance(judged(start, objective, WINDOWS, epsilon=0.0), expected)
    assert matters > 1e-2, "the perturbation matters"
    assert distance(trainer.steps, expected) < (0.5 * matters if bf16 else 2e-5)


def test_sft_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    host = HOSTS[0]
    settings = {**WITH_AMP, "save_strategy": "steps", "save_steps": 1}
    classes = with_amp(*host.classes)[0], MySFTConfig
    straight = host(tmp_path, classes, **settings)
    straight.train()
    resumed = host(tmp_path, classes, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert distance(resumed.steps, straight.steps[1:]) == 0.0


# --- what generates


def distinct_words(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def generating(folder: Path, name: str, *, amp: bool, **settings: Any) -> Any:
    """A Trainer that generates texts and rates them; with what it generated, and where the weights were then."""
    trainer, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    trainer, config = with_amp(trainer, config) if amp else (trainer, config)
    own = {
        "num_generations": 2,
        "max_completion_length": 4,
        "steps_per_generation": 2 * ACCUMULATION,
        "max_steps": 4,
        "beta": 0.0,
    }
    args = config(str(folder), **{**SETTINGS, **own, **(WITH_AMP if amp else {"optim": "sgd"}), **settings})
    recorder = Recorder()
    made = trainer(
        model=llama(),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": words(3, i)} for i in range(16)]),
        processing_class=tokenizer(),
        reward_funcs=distinct_words,
        callbacks=[recorder],
    )
    made.steps, made.rounds = recorder.steps, []
    generate = made._generate_and_score_completions

    def watched(inputs: Any) -> Any:
        theta = copy.deepcopy(made.model.state_dict())
        outputs = generate(inputs)
        made.rounds.append((made.state.global_step, theta, len(inputs)))
        return outputs

    made._generate_and_score_completions = watched
    return made


@pytest.mark.parametrize(("name", "ascent"), [("GRPO", "full"), ("GRPO", "every(2)"), ("RLOO", "full")])
def test_texts_are_generated_at_theta_and_as_often_as_without_amp(name: str, ascent: str, tmp_path: Path) -> None:
    theirs = generating(tmp_path, name, amp=False)
    ours = generating(tmp_path, name, amp=True, amp_ascent=ascent)
    starts = copy.deepcopy(ours.model.state_dict())
    for trainer in (theirs, ours):
        trainer.train()
    assert [(step, count) for step, _, count in ours.rounds] == [(step, count) for step, _, count in theirs.rounds]
    assert [step for step, *_ in ours.rounds] == [0, 2], "a round is for two steps"
    points = [starts, *ours.steps]
    for step, theta, _ in ours.rounds:
        assert all(torch.equal(theta[n], p) for n, p in points[step].items() if n in theta)
    assert [r["amp_passes"] for r in last_numbers(ours)] == ([2.0] * 4 if ascent == "full" else [2.0, 1.0, 2.0, 1.0])
    assert distance(ours.steps, theirs.steps) > 1e-3, "the perturbation matters"


def test_grpo_is_amp_over_the_texts_that_it_generated(tmp_path: Path) -> None:
    trainer = generating(tmp_path, "GRPO", amp=True, decay_all_parameters=True, loss_type="grpo")
    batches: list[Any] = []
    prepare = trainer._prepare_inputs.__func__

    class Watches(type(trainer)):  # type: ignore[misc]
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = prepare(self, inputs)
            batches.append(prepared)
            return prepared

    trainer.__class__ = Watches
    trainer.train()
    assert len(batches) == 4 * ACCUMULATION, "each micro-batch is prepared once"

    def loss(model: nn.Module, window: list[int]) -> Tensor:
        losses = []
        for batch in (batches[k] for k in window):
            for i, advantage in enumerate(batch["advantages"]):
                prompt, mask = batch["prompt_ids"][i], batch["completion_mask"][i].bool()
                prompt, completion = prompt[batch["prompt_mask"][i].bool()], batch["completion_ids"][i]
                tokens = torch.cat([prompt, completion])[None]
                scores = F.log_softmax(model(input_ids=tokens).logits[0, :-1], -1)
                likelihoods = scores.gather(-1, tokens[0, 1:, None])[-len(completion) :, 0][mask]
                old = batch["old_per_token_logps"][i][mask] if "old_per_token_logps" in batch else likelihoods.detach()
                ratio = (likelihoods - old).exp()
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                losses.append(-surrogate.mean())
        return torch.stack(losses).mean()

    windows = [range(k, k + ACCUMULATION) for k in range(0, len(batches), ACCUMULATION)]
    expected = judged(llama(), loss, windows)
    assert distance(judged(llama(), loss, windows, epsilon=0.0), expected) > 1e-3, "the perturbation matters"
    assert distance(trainer.steps, expected) < 2e-5


@pytest.mark.parametrize("ascent", ["momentum", "subset(0.5)"])
def test_a_policy_that_would_generate_at_perturbed_weights_is_refused(ascent: str, tmp_path: Path) -> None:
    trainer = generating(tmp_path, "GRPO", amp=True, amp_ascent=ascent)
    with pytest.raises(ValueError, match=r"would see perturbed weights .* use amp_ascent='full'"):
        trainer.train()
    assert not trainer.amp.perturbed


def test_a_coefficient_that_adapts_in_every_pass_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_adaptive_entropy"):
        generating(tmp_path, "GRPO", amp=True, use_adaptive_entropy=True, entropy_coef=0.01)


def test_a_trainer_that_generates_in_its_step_is_refused(tmp_path: Path) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="this TRL has no GKD")
    trainer, config = with_amp(gkd.GKDTrainer, gkd.GKDConfig)
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    talk = [
        {"messages": [{"role": r, "content": words(3, 2 * i + k)} for k, r in enumerate(("user", "assistant"))]}
        for i in range(ROWS)
    ]
    made = trainer(
        model=llama(),
        teacher_model=llama(),
        args=config(str(tmp_path), lmbda=1.0, max_new_tokens=4, **{**SETTINGS, **WITH_AMP}),
        train_dataset=Dataset.from_list(talk),
        processing_class=chat,
    )
    generates = made.model.generate
    with pytest.raises(RuntimeError, match=r"MyTrainer generates in its training_step .* _prepare_inputs"):
        made.train()
    assert made.model.generate == generates
    assert not made.amp.perturbed


# --- the stock route, and what was silent once


@pytest.mark.parametrize("host", HOSTS[:3], ids=lambda host: host.name)
def test_the_stock_route_is_an_error_that_names_the_mixin(host: Host, tmp_path: Path) -> None:
    model = host.model()
    trainer = host(tmp_path, host.classes, optimizers=(None, None))
    trainer.optimizer = AMP(trainer.model.parameters(), lr=0.1, epsilon=0.1)
    before = copy.deepcopy(trainer.model)
    with pytest.raises((RuntimeError, TypeError), match=r"class MyTrainer\(amp_plugin.AMPMixin, TheirTrainer\)"):
        trainer.train()
    assert_same_parameters(trainer.model, before)
    assert_same_parameters(trainer.model, model)


def test_their_config_with_the_defaults_of_amptrainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"SFTConfig with amp_plugin\.AMPArguments"):
        type("Both", (trl.SFTConfig, AMPTrainingArguments), {})


def test_amps_options_beside_another_optimizer_are_refused(tmp_path: Path) -> None:
    _, config = with_amp(trl.SFTTrainer, trl.SFTConfig)
    with pytest.raises(ValueError, match=r"amp_epsilon would have no effect: optim is 'adamw_torch'"):
        config(str(tmp_path), optim="adamw_torch", amp_epsilon=0.1, use_cpu=True, bf16=False)
