"""fastai, with AMPCallback."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import host_problem as problem
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from amp_plugin import AMP

pytest.importorskip("fastai", reason="needs fastai")

import fastai.callback.fp16
import fastai.callback.schedule  # adds lr_find
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper

from amp_plugin.doors.fastai import AMPCallback

ROUNDING = 1e-5  # fastai's Recorder works in float32 alone
ARGS = {name: value for name, value in problem.SGD_ARGS.items() if name != "lr"}


class Keep(Callback):
    """Keeps weights after each step, losses, and what a callback drew."""

    def before_fit(self) -> None:
        self.points: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def after_step(self) -> None:
        self.points.append(problem.weights(self.learn.model))

    def after_batch(self) -> None:
        if self.learn.training:
            self.losses.append(self.learn.loss.item())


def learner(optimizer: Any = None, *, cbs: Any = (), amp: Any = True) -> Learner:
    data = problem.batches(torch.float32)
    dls = DataLoaders(DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))
    dls.n_inp = 1
    optimizer = optimizer or partial(AMP, **ARGS, **problem.BALL)
    return Learner(
        dls,
        problem.net(torch.float32),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=optimizer),
        lr=problem.SGD_ARGS["lr"],
        cbs=[*([AMPCallback()] if amp else []), Keep(), *cbs],
    )


def fit(learn: Learner, epochs: int = 1) -> dict[str, Tensor]:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)
    return problem.weights(learn.model)


def test_it_arrives_where_the_reference_does() -> None:
    learn = learner()
    problem.assert_arrived(fit(learn), problem.reference()[-1], within=ROUNDING)
    assert "_do_one_batch" not in vars(learn)
    x, y = problem.batches(torch.float32)[0]
    assert learn.keep.losses[0] == nn.functional.cross_entropy(problem.net(torch.float32)(x), y).item()


def test_without_epsilon_it_is_the_base_optimizer() -> None:
    plain = fit(learner(partial(SGD, **ARGS), amp=False))
    problem.assert_same_bits(fit(learner(partial(AMP, **ARGS, epsilon=0.0))), plain)
    problem.assert_same_bits(plain, problem.plainly(dtype=torch.float32))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_accumulates_and_clips(accumulate: int) -> None:
    found = fit(learner(cbs=[GradientAccumulation(8 * accumulate), GradientClip(0.5)]))
    problem.assert_arrived(found, problem.reference(accumulate=accumulate, clip_norm=0.5)[-1], within=ROUNDING)


def test_it_knows_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fastai's callback has CUDA's autocast; here it gets that of the CPU."""
    monkeypatch.setattr(fastai.callback.fp16, "autocast", lambda _, dtype: torch.autocast("cpu", dtype=dtype))
    found = fit(learner().to_bf16())
    problem.assert_arrived(found, problem.in_bf16(), within=1e-6)


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, half, rest = learner(), learner(), learner()
    fit(half)
    half.save(tmp_path / "half")
    rest.create_opt()
    rest.load(tmp_path / "half")
    problem.assert_same_bits(fit(rest), fit(whole, 2))


def test_all_passes_see_what_other_callbacks_do() -> None:
    """MixUp's loss looks at what it drew for the batch."""
    torch.manual_seed(0)
    learn = learner(cbs=[MixUp(), GradientAccumulation(16)])
    learn.loss_func = CrossEntropyLossFlat()
    drawn: list[Any] = []

    class Draws(Callback):
        order = 99

        def before_batch(self) -> None:
            if self.learn.training:
                drawn.append((self.learn.xb[0], self.learn.mix_up.yb1[0], self.learn.yb[0], self.learn.mix_up.lam))

    learn.add_cb(Draws())
    found = fit(learn)
    ce = partial(nn.functional.cross_entropy, reduction="none")
    model = problem.net(torch.float32)
    optimizer = SGD(model.parameters(), **problem.SGD_ARGS)

    def loss_at(point: nn.Module, mixed: Any) -> Tensor:
        x, y1, y, lam = mixed
        return torch.lerp(ce(point(x), y1), ce(point(x), y), lam).mean()

    for i, mixed in enumerate(drawn, 1):
        problem.set_gradients_of_amp(model, lambda point, mixed=mixed: loss_at(point, mixed), share=0.5)
        if i % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    problem.assert_arrived(found, problem.weights(model), within=ROUNDING)


def test_lr_find_leaves_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it saves them
    learn = learner()
    before = problem.weights(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=4, show_plot=False)
    problem.assert_same_bits(problem.weights(learn.model), before)


def test_an_interrupt_leaves_the_weights_at_theta() -> None:
    class Stops(Callback):
        calls = 0

        def after_pred(self) -> None:
            Stops.calls += self.learn.training
            if Stops.calls == 2:  # at theta + delta of the first step
                raise KeyboardInterrupt

    learn = learner(cbs=[Stops()])
    with pytest.raises(KeyboardInterrupt):
        fit(learn)
    problem.assert_same_bits(problem.weights(learn.model), problem.weights(problem.net(torch.float32)))


def test_an_optimizer_that_is_not_amp_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"opt_func=partial\(OptimWrapper, opt=AMP\)"):
        fit(learner(partial(SGD, **ARGS)))


def test_without_the_callback_it_does_not_train() -> None:
    with pytest.raises(RuntimeError, match="without a closure needs 1 ascent"):
        fit(learner(amp=False))
