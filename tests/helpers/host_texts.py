"""Words, a tokenizer and a judge for the trainers of language models: nothing comes from the Hub."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from language_problems import VOCABULARY
from reference import Step, Tensors, amp_trajectory
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, TrainerCallback

MICRO_BATCH, ACCUMULATION, STEPS = 2, 2, 3
ROWS = MICRO_BATCH * ACCUMULATION * STEPS
DESCENT: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True}
BALL: dict[str, Any] = {"epsilon": 0.1, "inner_lr": 0.3}
SETTINGS: dict[str, Any] = {
    "optim_args": "momentum=0.9,nesterov=True",
    "learning_rate": DESCENT["lr"],
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "max_grad_norm": 0.5,
    "max_steps": STEPS,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
WITH_AMP: dict[str, Any] = {"optim": "amp", **{f"amp_{name}": value for name, value in BALL.items()}}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the words that :func:`words` draws from."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def words(count: int, seed: int) -> str:
    """Random words; how many are drawn is `count` or one more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (count + seed % 2,), generator=generator)
    return " ".join(f"w{int(token)}" for token in tokens)


def log_likelihood(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Sum of the log-probabilities of a completion's tokens."""
    tokens = torch.tensor([[*prompt, *completion]])
    scores = F.log_softmax(model(input_ids=tokens).logits[0, :-1], -1)
    return scores.gather(-1, tokens[0, 1:, None])[-len(completion) :].sum()


class Recorder(TrainerCallback):
    """The parameters that are trained, after each step."""

    def __init__(self) -> None:
        self.steps: list[Tensors] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


class _Judged(nn.Module):
    def __init__(self, model: nn.Module, objective: Callable[[nn.Module, list[int]], Tensor]) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, numbers: Tensor) -> Tensor:
        return self.objective(self.model, numbers.tolist())


def judged(
    model: nn.Module,
    objective: Callable[[nn.Module, list[int]], Tensor],
    windows: Sequence[Sequence[int]],
    epsilon: float = BALL["epsilon"],
    inner_lr: float = BALL["inner_lr"],
) -> list[Tensors]:
    """The parameters after each step of AMP in float64.

    Args:
        model: what is trained, as it is before the training.
        objective: the mean loss of a window of examples, which are given by their numbers.
        windows: numbers of the examples of each step.
    """
    batches = [(torch.tensor(list(window)), torch.zeros(())) for window in windows]
    steps: list[Step] = amp_trajectory(
        _Judged(copy.deepcopy(model), objective),
        lambda loss, _: loss,
        batches,
        **DESCENT,
        epsilon=epsilon,
        inner_lr=inner_lr,
        clip_norm=SETTINGS["max_grad_norm"],
    )
    return [{name.removeprefix("model."): p for name, p in step.params.items()} for step in steps]


def distance(a: Sequence[Tensors], b: Sequence[Tensors]) -> float:
    """Largest relative difference of a parameter, over the steps of two trainings."""
    assert len(a) == len(b)
    assert all(p.keys() == q.keys() for p, q in zip(a, b, strict=True))
    pairs = [(p[name].double(), q[name].double()) for p, q in zip(a, b, strict=True) for name in p]
    return max(((p - q).norm() / q.norm()).item() for p, q in pairs)
