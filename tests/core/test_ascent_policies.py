"""Every ascent policy through every door: trajectory, passes, resume, clean weights, refusals, and two processes."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ascent_doors import BALL, DOORS, LOOPS, SGD, CountingNet, Seen, make, samples_of, train, train_with_trainer
from ascent_reference import RULES, STEPS, Batch, descent_of, policy_trajectory, stale
from exactness_problem import Net
from passes import OWNS_BATCH, PAGE, POLICIES, seen_of, table, takes_part, windows_of
from torch import nn
from torch.nn import functional as F

from amp_plugin import AMP, LossModule, attach
from amp_plugin.core.policies import Every, Subset, make_policy


def reference(policy: tuple[str, str | None], windows: list[list[Batch]], each: bool = False) -> Any:
    rule, on = RULES[policy][0], descent_of(policy[0])
    return policy_trajectory(Net(), F.cross_entropy, windows, rule, **SGD, **BALL, each=each, descent_on=on)


def assert_close(weights: list[dict[str, torch.Tensor]], want: Any) -> None:
    assert len(weights) == len(want)
    for step, (got, (theta, _)) in enumerate(zip(weights, want, strict=True)):
        for name, tensor in theta.items():
            torch.testing.assert_close(
                got[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, at=(step, name): f"{at}: {m}"
            )


@pytest.mark.filterwarnings("ignore:AMP. ascent=")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_trajectory_and_passes(door: str, policy: tuple[str, str | None], micro_batches: int) -> None:
    """The weights after each of 20 steps, and the samples that went forward and backward in it."""
    windows = windows_of(micro_batches)
    if takes_part(policy[0]) and door in OWNS_BATCH:
        with pytest.raises(ValueError, match=r"a closure or a bare ascend\(\) keeps it.*attach.*amp_backward"):
            train(door, *policy, windows)
        return
    seen = seen_of(door, policy, micro_batches)
    want = reference(policy, windows, each=door == "attach")
    assert_close(seen.weights, want)
    passes = RULES[policy][1]
    expected = [2.0 if ascended else 1.0 for _, ascended in want] if passes is None else list(map(passes, range(STEPS)))
    if door == "ascend" and policy != ("full", None):
        expected = [2.0] * STEPS  # it makes a pass that nobody asks for, and says so
    assert seen.forwards == seen.backwards == seen.passes == expected
    if door == "AMPTrainer":
        assert [log["amp_passes"] for log in seen.logs if "loss" in log] == expected
        assert seen.flos == sum(expected) * samples_of(windows) * 6 * 3 * 8 * 8


@pytest.mark.filterwarnings("ignore:AMP. ascent=")
def test_the_table_is_what_is_counted() -> None:
    assert PAGE.read_text() == table() + "\n"


def test_stale_keeps_the_gradient_although_sgd_writes_into_it() -> None:
    """As torch's foreach one, which is CUDA's default, does with Nesterov momentum and no weight decay."""
    windows, rates = windows_of(1), {**SGD, "weight_decay": 0.0}
    net, amp = make("stale", None, weight_decay=0.0, foreach=True)
    step, seen = LOOPS["closure"](net, amp), Seen()
    for window in windows:
        step(window)
        seen.add(net, amp, samples_of(windows))
    assert_close(seen.weights, policy_trajectory(Net(), F.cross_entropy, windows, stale, **rates, **BALL))


def test_adaptive_has_something_to_decide() -> None:
    ascended = [a for _, a in reference(("adaptive(-1.4)", None), windows_of(1))]
    assert 4 < sum(ascended[2:]) < STEPS - 4


RESUMED = ["every(3)", "stale", "momentum", "adaptive(-1.4)", "stale, every(2)", "window(5, 12), subset(0.5)"]
AT = 9  # after which step; in the middle of a cycle of every(3)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("ascent", RESUMED)
def test_resume_is_exact_to_the_bit(ascent: str, optimizer: str) -> None:
    """The state goes through a file as any checkpoint does; the first part of the training saves in every step."""
    base = {"base_optimizer": optimizer, "momentum": None, "nesterov": None} if optimizer == "AdamW" else {}
    windows = windows_of(1)
    net, amp = make(ascent, None, **base)
    step = LOOPS["attach"](net, amp)
    for window in windows:
        step(window)
    again, second = make(ascent, None, **base)
    for part in (windows[:AT], windows[AT:]):
        step = LOOPS["attach"](again, second)
        for window in part:
            step(window)
            file = io.BytesIO()
            torch.save((again.state_dict(), second.state_dict()), file)
        again, second = make(ascent, None, **base)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        again.load_state_dict(weights)
        second.load_state_dict(state)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("ascent", ["every(3)", "stale", "adaptive(-1.4)"])
def test_a_copy_and_a_pickle_go_on_as_the_original(ascent: str) -> None:
    windows = windows_of(1)
    net, amp = make(ascent, "norm")
    step = LOOPS["passes"](net, amp)
    for window in windows[:AT]:
        step(window)
    copied = copy.deepcopy((net, amp))
    pickled = pickle.loads(pickle.dumps((net, amp)))
    for window in windows[AT:]:
        step(window)
    for twin, optimizer in (copied, pickled):
        assert str(optimizer.policy) == str(amp.policy)
        step = LOOPS["passes"](twin, optimizer)
        for window in windows[AT:]:
            step(window)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("ascent", ["stale", "adaptive(-1.4)", "window(0.25, 0.6)"])
def test_amp_trainer_resumes_to_the_bit(ascent: str, tmp_path: Path) -> None:
    windows = windows_of(2)
    saves = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": AT}
    through = train_with_trainer(ascent, None, windows, **saves)
    resumed = train_with_trainer(ascent, None, windows, resume=str(tmp_path / f"checkpoint-{AT}"), **saves)
    assert len(resumed.weights) == STEPS - AT
    for name, tensor in through.weights[-1].items():
        assert torch.equal(resumed.weights[-1][name], tensor), name
    assert through.passes[AT:] == resumed.passes
    if "window" in ascent:
        assert through.passes == [2.0 if 5 <= t < 12 else 1.0 for t in range(STEPS)]


@pytest.mark.parametrize("ascent", ["full", "every(3)", "stale", "momentum", "adaptive"])
def test_a_checkpoint_from_before_there_were_policies_loads(ascent: str) -> None:
    net = CountingNet()
    sgd = torch.optim.SGD(net.parameters(), **SGD)
    net(*windows_of(1)[0][0])["loss"].backward()
    sgd.step()
    amp = AMP(net.parameters(), **BALL, **SGD, ascent=ascent)
    amp.load_state_dict(sgd.state_dict())
    assert all(amp.param_groups[0][name] == value for name, value in amp.policy.state.items())
    assert amp.ascends == (ascent not in ("stale", "momentum")), "these take it for a first step"
    step = LOOPS["closure"](net, amp)
    for window in windows_of(1)[:3]:
        step(window)


@pytest.mark.parametrize("door", ["closure", "passes", "attach", "amp_backward"])
@pytest.mark.parametrize("policy", [p for p in POLICIES if "adaptive" not in p[0]], ids=str)
def test_an_interrupt_in_any_pass_finds_clean_weights(door: str, policy: tuple[str, str | None]) -> None:
    if takes_part(policy[0]) and door in OWNS_BATCH:
        return
    windows = windows_of(1)
    net, amp = make(*policy)
    step = LOOPS[door](net, amp)
    for window in windows[:7]:  # so that every policy with steps to choose ascends next
        step(window)
    theta = [p.detach().clone() for p in net.parameters()]
    for k in range(2):
        net.calls, net.fails_in = 0, k
        try:
            step(windows[7])
        except KeyboardInterrupt:
            amp.restore()  # what a loop that drives the passes itself has to do; elsewhere there is nothing to do
        else:
            assert (k, net.calls) == (1, 1), "a step of one pass"
            break
        assert not amp.perturbed
        assert all(p.requires_grad for p in net.parameters())
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), theta, strict=True))


def test_leaving_the_passes_early_puts_the_weights_back() -> None:
    net, amp = make("full", "norm", inner_iter=2)
    theta = [p.detach().clone() for p in net.parameters()]
    for part in amp.ascent_passes(windows_of(1)[0]):
        if amp.perturbed:
            break
        net(*part[0])["loss"].backward()
    assert not amp.perturbed
    assert all(p.requires_grad and torch.equal(p, q) for p, q in zip(net.parameters(), theta, strict=True))


@pytest.mark.parametrize("ascent", ["full", "every(1)", "window(0, 9)", "adaptive"])
def test_a_step_that_should_have_ascended_is_refused(ascent: str) -> None:
    net, amp = make(ascent, None)
    net(*windows_of(1)[0][0])["loss"].backward()
    with pytest.raises(RuntimeError, match="would train without the perturbation"):
        amp.step()


def test_stale_is_refused_where_the_displacement_was_left_out() -> None:
    net, amp = make("stale", None)
    for k in range(2):  # the first step has none
        net(*windows_of(1)[k][0])["loss"].backward()
        if k == 0:
            amp.step()
            amp.zero_grad()
    with pytest.raises(RuntimeError, match=r"ascent_passes\(\)"):
        amp.step()


@pytest.mark.parametrize(
    ("ascent", "message"),
    [
        ("evry(2)", r"'evry' is unknown, did you mean 'every'"),
        ("every", r"every takes \(k\), got every"),
        ("every(2, 3)", r"every takes \(k\), got every\(2, 3\)"),
        ("every(0)", r"a whole number of steps k >= 1, got 0"),
        ("every(1.5)", r"a whole number of steps k >= 1, got 1.5"),
        ("stale(1)", r"stale takes no arguments, got stale\(1\)"),
        ("subset(50)", r"a fraction of the batch in \(0, 1\], got 50"),
        ("window(0.5, 100)", "give two of a kind"),
        ("window(9, 3)", "is empty"),
        ("adaptive(0, 1)", r"decay must be in \[0, 1\)"),
        ("every(k)", "cannot be read; use one of 'full'"),
        ("every(2) of subset(0.5)", "separated by commas"),
        ("", "cannot be read"),
        ("()", "cannot be read"),
        ("__import__('os')", "'__import__' is unknown"),
        ("every(2), every(3)", "each policy can be given once"),
        ("full, every(2)", "stands alone"),
        ("stale, momentum", "one direction only, stale or momentum"),
        ("stale, subset(0.5)", "stale makes no ascent pass"),
    ],
)
def test_what_cannot_be_meant_is_refused(ascent: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ascent, None)


def test_policies_may_be_objects_and_are_not_shared() -> None:
    policy = make_policy("every(2), subset(0.5)")
    assert policy.policies == (Every(2), Subset(0.5))  # type: ignore[attr-defined]
    assert str(policy) == "every(2), subset(0.5)"
    assert AMP(CountingNet().parameters(), ascent=policy).policy is not policy
    with pytest.raises(TypeError, match="ascent must be a string such as 'full'"):
        make(2, None)  # type: ignore[arg-type]


def test_one_direction_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match=r"ascent='stale' has one direction: inner_iter must be 1, got 2"):
        make("stale", None, inner_iter=2)


def test_fractions_of_a_training_need_its_length() -> None:
    net, amp = make("window(0.25, 0.6)", None)
    step = LOOPS["closure"](net, amp)
    with pytest.raises(ValueError, match=r"set optimizer.total_steps, or give whole numbers"):
        step(windows_of(1)[0])
    amp.total_steps = STEPS
    passes = []
    for window in windows_of(1):
        step(window)
        passes.append(amp.passes)
    assert passes == [2.0 if 5 <= t < 12 else 1.0 for t in range(STEPS)]


@pytest.mark.parametrize("policy", ["window(20, 30)", "window(0.51, 0.52)", "window(0.99, 1.0)"])
def test_a_window_without_a_step_of_the_training_is_no_training_with_amp(policy: str) -> None:
    net, amp = make(policy, None)
    amp.total_steps = STEPS
    with pytest.raises(ValueError, match="contains no step of a training of 20: nothing would be perturbed"):
        LOOPS["closure"](net, amp)(windows_of(1)[0])


@pytest.mark.parametrize("policy", ["every(8), window(9, 15)", "window(0.9, 1.0), every(17)"])
def test_a_window_that_every_kth_step_misses_is_no_training_with_amp(policy: str) -> None:
    net, amp = make(policy, None)
    amp.total_steps = STEPS
    with pytest.raises(ValueError, match="none of its steps is in its window; nothing would be perturbed"):
        LOOPS["closure"](net, amp)(windows_of(1)[0])
    net, amp = make("every(8), window(9, 17)", None)
    LOOPS["closure"](net, amp)(windows_of(1)[0])


def test_a_ball_without_any_gradient_is_told() -> None:
    """Others have one, so a loop that does not prune them would go on as if it trained with AMP."""
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    amp = AMP(model.named_parameters(), lr=0.1, parameters="idle")
    model["used"](torch.ones(1, 3)).sum().backward()
    with pytest.warns(RuntimeWarning, match="a pass left no gradient to ascend along"):
        amp.ascend()


def test_momentum_without_a_momentum() -> None:
    net, amp = make("momentum", None, momentum=0.0, nesterov=False)
    step = LOOPS["closure"](net, amp)
    step(windows_of(1)[0])
    with pytest.raises(RuntimeError, match="SGD keeps nothing to ascend along; momentum needs"):
        step(windows_of(1)[1])


@pytest.mark.parametrize("base", ["adopt", "laprop", "novograd"])
def test_momentum_along_something_else_than_gradients(base: str) -> None:
    p = nn.Parameter(torch.ones(2, 3))
    amp = AMP([p], lr=0.01, base_optimizer=base, ascent="momentum")
    amp.step(lambda: p.sum().backward())
    with pytest.raises(RuntimeError, match=r"keeps nothing to ascend along; .* whose exp_avg is of gradients"):
        amp.step(lambda: p.sum().backward())


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("ascent", ["full", "stale", "momentum"])
def test_maximising_the_worst_direction_is_downhill(ascent: str, base: str) -> None:
    """With a constant gradient of 3 each goes along its negative."""
    p = nn.Parameter(torch.zeros(1))
    extra = {"momentum": 0.5} if base == "SGD" else {}
    amp = AMP([p], 1e-3, 10.0, 0.1, base_optimizer=base, ascent=ascent, maximize=True, **extra)  # type: ignore[arg-type]
    for step in range(3):
        for _ in amp.ascent_passes():
            (3 * p).sum().backward()
        (3 * p).sum().backward()
        if step:
            moved = amp.statistics()["perturbation_norm"].item()
            assert p.item() < 0, "SGD and AdamW go uphill from 0, so only the perturbation can lead below"
            assert 0.005 < moved <= 0.3 + 1e-6
        amp.step()
        amp.zero_grad()


@pytest.mark.parametrize("ascent", ["full", "stale", "momentum"])
def test_what_is_not_trained_any_more_is_not_perturbed(ascent: str) -> None:
    """A frozen layer and, for the gradient of the step before, a head that was not used in it."""
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    amp = AMP(model.parameters(), 0.1, epsilon=1.0, inner_lr=1.0, momentum=0.9, ascent=ascent)

    def backward(used: int = 2) -> None:
        x = torch.ones(2, 3)
        for layer in list(model)[:used]:
            x = layer(x)
        x.square().mean().backward()

    def step(used: int = 2) -> list[bool]:
        """Which layers are displaced where the descent's gradient is taken."""
        theta = [layer.weight.detach().clone() for layer in model]
        for _ in amp.ascent_passes():
            backward(used)
        moved = [not torch.equal(t, layer.weight) for t, layer in zip(theta, model, strict=True)]
        backward(used)
        amp.step()
        amp.zero_grad()
        return moved

    step()
    assert step() == [True, True]
    if ascent == "stale":
        assert step(used=1) == [True, True]
        assert step() == [True, False], "the second had no gradient in the step before"
        assert step() == [True, True]
    model[0].requires_grad_(False)
    assert step() == [False, True]
    assert step() == [False, True]


def test_stale_after_a_time_without_a_ball() -> None:
    """A schedule that begins at epsilon 0, or comes back from it: nothing old is ascended along."""
    p = nn.Parameter(torch.zeros(1))
    amp = AMP([p], 0.0, epsilon=0.0, inner_lr=0.1, ascent="stale")
    moved = []
    for step, epsilon in enumerate([0.0, 0.0, 10.0, 10.0, 0.0, 10.0, 10.0]):
        amp.param_groups[0]["epsilon"] = epsilon
        for _ in amp.ascent_passes():
            raise AssertionError("stale makes no pass")
        moved.append(round(p.item(), 6))
        ((step + 1.0) * p).sum().backward()
        amp.step()
        amp.zero_grad()
    assert moved == [0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.6]


def test_stale_without_any_gradient_is_told() -> None:
    used, idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    amp = AMP([("used", used), ("idle", idle)], lr=0.1, parameters="idle", ascent="stale")
    used.sum().backward()
    with pytest.warns(RuntimeWarning, match="no gradient was left for the next step to ascend along"):
        amp.step()


def test_a_ball_whose_parameters_were_replaced() -> None:
    """As hosts do that shard them."""
    model = nn.Linear(3, 2)
    amp = AMP(model.named_parameters(), lr=0.1, parameters="weight")
    model.weight = nn.Parameter(model.weight.detach().clone())
    amp.param_groups[0]["params"][0] = model.weight
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameters='weight' chose have been replaced .*name_parameters"):
        amp.ascend()
    amp.name_parameters(model)
    theta = model.weight.detach().clone()
    amp.ascend()
    assert not torch.equal(theta, model.weight)
    amp.restore()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("nrom", r"matches none of the 6 parameters, did you mean 'norm'; their names are body.0.weight, body.0.bias,"),
        (r"^head\.", "matches none of the 6 parameters"),
        ("(", "is no regular expression"),
        (lambda name, p: False, "matches none of the 6 parameters"),
    ],
)
def test_parameters_that_are_not_there(parameters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("full", parameters)
    net = CountingNet()
    amp = AMP(net.parameters(), **BALL, **SGD, parameters=parameters)
    with pytest.raises(ValueError, match=message):
        attach(amp, net)
    with pytest.raises(ValueError, match=message):
        train_with_trainer("full", parameters, windows_of(1))


@pytest.mark.parametrize(
    ("parameters", "moved"),
    [
        ("norm", {"body.1.weight", "body.1.bias"}),
        (r"^body\.5\.", {"body.5.weight", "body.5.bias"}),
        (lambda name, p: p.dim() > 1, {"body.0.weight", "body.5.weight"}),
    ],
)
def test_only_the_chosen_parameters_are_perturbed(parameters: Any, moved: set[str]) -> None:
    """And nothing is computed for the others in the ascent pass."""
    net = CountingNet()
    amp = AMP(net.parameters(), **BALL, **SGD, parameters=parameters)
    with pytest.raises(RuntimeError, match=r"optimizer.name_parameters\(model\)"):
        LOOPS["closure"](net, amp)(windows_of(1)[0])
    amp.name_parameters(net)
    theta = {name: p.detach().clone() for name, p in net.named_parameters()}
    window = windows_of(1)[0]
    for part in amp.ascent_passes(window):
        net(*part[0])["loss"].backward()
        assert {name for name, p in net.named_parameters() if p.grad is not None} == moved
    assert {name for name, p in net.named_parameters() if not torch.equal(p, theta[name])} == moved
    amp.restore()
    amp.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match=r"optimizer.name_parameters\(model\)"):
        LOOPS["closure"](net, amp)(window)


def test_samples_have_to_be_told_from_other_dimensions() -> None:
    def subset_of(*inputs: Any) -> Any:
        model = nn.Linear(3, 2)
        module = LossModule(lambda x, *_: model(x), F.cross_entropy)  # type: ignore[arg-type]
        module.inner = model
        attach(AMP(model.parameters(), ascent="subset(0.3)"), module)
        return module(*inputs)

    x, y = torch.randn(10, 3), torch.randint(2, (10,))
    subset_of(x, torch.tensor(1.0), "label", {"n": [x, x]}, y)
    with pytest.raises(ValueError, match=r"got shapes \(10, 3\), \(2,\), \(10,\)"):
        subset_of(x, torch.ones(2), y)


def test_a_loss_over_the_whole_batch_is_refused_on_a_part() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor, num_items_in_batch: int) -> torch.Tensor:
            return (x @ self.w).square().sum() / num_items_in_batch

    module = Sum()
    attach(AMP(module.parameters(), ascent="subset(0.5)"), module)
    with pytest.raises(ValueError, match=r"num_items_in_batch.*AMPTrainer"):
        module(torch.randn(4, 3), num_items_in_batch=4)


def test_attachment_tells_which_losses_it_knows() -> None:
    net, amp = make("every(2)", None)
    attachment = attach(amp, net)
    known = []
    for (batch,) in windows_of(1)[:2]:
        loss = net(*batch)["loss"]
        assert attachment.loss is not None
        assert loss.item() == attachment.loss.item()
        loss.backward()
        amp.step()
        amp.zero_grad()
        known.append((attachment.loss is not None, attachment.amp_loss is not None))
    assert known == [(True, True), (True, False)]
