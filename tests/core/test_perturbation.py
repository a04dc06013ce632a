from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from amp_plugin.core.bucket import Ascent
from amp_plugin.core.perturbation import Perturbation
from amp_plugin.core.shared_memory import clone_overlapping


def moved(p: Perturbation, theta: Tensor, grad: Tensor, inner_lr: float = 1.0, epsilon: float = 0.5) -> Tensor:
    param = theta.clone()
    p.ascend([Ascent(param, grad.clone(), inner_lr, epsilon)])
    delta = param - theta
    p.restore()
    assert torch.equal(param, theta)
    return delta


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_inside_the_ball_the_step_is_the_raw_gradient_times_inner_lr(norm: str) -> None:
    theta, grad = torch.zeros(3, dtype=torch.float64), torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64)
    torch.testing.assert_close(moved(Perturbation(norm), theta, grad, inner_lr=0.2, epsilon=0.5), 0.2 * grad)


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_outside_the_ball_the_step_is_projected(norm: str) -> None:
    theta, grad = torch.zeros(2, dtype=torch.float64), torch.tensor([30.0, -40.0], dtype=torch.float64)
    torch.testing.assert_close(moved(Perturbation(norm), theta, grad), 0.5 * grad / 50.0)


def test_global_ball_holds_all_tensors_together() -> None:
    params = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
    p = Perturbation("global")
    p.ascend(
        [Ascent(q, torch.full((1,), g, dtype=torch.float64), 1.0, 1.0) for q, g in zip(params, (3.0, 4.0), strict=True)]
    )
    torch.testing.assert_close(torch.cat(params), torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert p.statistics()["clipped"] == 1.0
    assert p.statistics()["perturbation_norm"] == pytest.approx(1.0)


def test_global_ball_measures_each_group_in_its_own_epsilon() -> None:
    """sqrt((d1/e1)^2 + (d2/e2)^2) <= 1: the point (3, 4) with radii (1, 2) is scaled by 1 / sqrt(9 + 4)."""
    a, b = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    Perturbation("global").ascend([Ascent(a, a + 3, 1.0, 1.0), Ascent(b, b + 4, 1.0, 2.0)])
    assert a.item() == pytest.approx(3 / math.sqrt(13))
    assert b.item() == pytest.approx(4 / math.sqrt(13))


def test_statistics_of_the_tensor_balls() -> None:
    a, b = torch.zeros(1), torch.zeros(1)
    p = Perturbation("tensor")
    assert p.statistics() == {}
    p.ascend([Ascent(a, a + 3, 1.0, 0.5), Ascent(b, b + 0.25, 1.0, 0.5)])
    assert p.statistics()["clipped"] == 0.5
    assert p.statistics()["perturbation_norm"] == pytest.approx(math.hypot(0.5, 0.25))


def test_second_step_starts_from_the_first_and_keeps_tensors_without_gradient() -> None:
    a, b = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    c = torch.ones(1, dtype=torch.float64)
    p = Perturbation("tensor")
    p.ascend([Ascent(a, a * 0.1, 1.0, 0.5), Ascent(b, b * 0.2, 1.0, 0.5), Ascent(c, None, 1.0, 0.5)])
    assert c.item() == 1.0
    p.ascend([Ascent(a, a * 0 + 0.1, 1.0, 0.5), Ascent(b, None, 1.0, 0.5), Ascent(c, c * 0.3, 1.0, 0.5)])
    assert [t.item() for t in (a, b, c)] == pytest.approx([1.2, 1.2, 1.3])
    p.restore()
    assert [t.item() for t in (a, b, c)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_restore_is_exact_to_the_bit_and_in_place(dtype: torch.dtype) -> None:
    theta = torch.randn(1000).to(dtype)
    param, address = theta.clone(), None
    address = param.data_ptr()
    p = Perturbation()
    for _ in range(5):
        p.ascend([Ascent(param, torch.randn(1000).to(dtype), 0.7, 0.5)])
        assert not torch.equal(param, theta)
        p.restore()
        assert torch.equal(param, theta)
    assert param.data_ptr() == address


def test_complex_numbers_are_pairs_of_reals() -> None:
    theta = torch.zeros(1, dtype=torch.complex128)
    delta = moved(Perturbation(), theta, torch.tensor([3 + 4j], dtype=torch.complex128))
    torch.testing.assert_close(delta, torch.tensor([0.3 + 0.4j], dtype=torch.complex128))


def test_scalar_parameter() -> None:
    assert moved(Perturbation(), torch.tensor(1.0), torch.tensor(7.0)).item() == 0.5


def test_a_zero_gradient_moves_nothing() -> None:
    perturbation = Perturbation()
    assert moved(perturbation, torch.ones(3), torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert perturbation.was_finite(), "the step is not skipped"


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_non_finite_gradients_leave_every_tensor_alone(norm: str, bad: float, dtype: torch.dtype) -> None:
    params = [torch.ones(4).to(dtype), torch.ones(2).to(dtype)]
    grads = [torch.tensor([1.0, bad, 1.0, 1.0]).to(dtype), torch.ones(2).to(dtype)]
    p = Perturbation(norm)
    p.ascend([Ascent(q, g, 1.0, 0.5) for q, g in zip(params, grads, strict=True)])
    assert [q.tolist() for q in params] == [[1.0] * 4, [1.0] * 2]
    assert not p.was_finite()
    p.ascend([Ascent(q, torch.ones_like(q), 1.0, 0.5) for q in params])
    assert not p.was_finite(), "one bad ascent makes the whole step bad"
    p.restore()
    p.ascend([Ascent(q, torch.ones_like(q), 1.0, 0.5) for q in params])
    assert p.was_finite()


def test_the_norm_of_half_precision_gradients_does_not_overflow() -> None:
    delta = moved(Perturbation(), torch.zeros(100, dtype=torch.float16), torch.full((100,), 1e4, dtype=torch.float16))
    assert delta.float().norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 5e18),  # of all tensors together
        (torch.float32, 1e20),
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 6e4),
        (torch.float64, 1e150),
    ],
)
def test_large_finite_gradients_move_the_weights_to_the_sphere(
    dtype: torch.dtype, size: float, norm: str, steps: int
) -> None:
    """The squares of such entries are infinite in the type of the gradient."""
    grads = [(size * torch.rand(shape, dtype=torch.float64)).to(dtype) for shape in ((30,), (4, 5))]
    params = [torch.zeros_like(g) for g in grads]
    p = Perturbation(norm)
    for _ in range(steps):
        p.ascend([Ascent(q, g.clone(), 1.0, 0.5) for q, g in zip(params, grads, strict=True)])
    assert p.was_finite()
    exact = [g.double() / size for g in grads]  # whose squares are ordinary numbers
    lengths = [torch.cat([g.flatten() for g in exact]).norm()] * 2 if norm == "global" else [g.norm() for g in exact]
    accuracy = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.05)
    for q, g, length in zip(params, exact, lengths, strict=True):
        assert (q.double() - 0.5 * g / length).norm() < accuracy
    assert p.statistics()["perturbation_norm"].item() == pytest.approx(0.5 if norm == "global" else math.sqrt(0.5))


def test_a_gradient_that_no_factor_brings_into_the_ball_counts_as_infinite() -> None:
    """In float32 epsilon / norm is 0 here, so that the weights would silently stay at theta."""
    p, theta = Perturbation(), torch.ones(100)
    assert moved(p, theta, torch.full((100,), 3e38), epsilon=1e-8).tolist() == [0.0] * 100
    assert not p.was_finite()


def test_autocast_sees_the_moved_weights() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(2, 4)
    p = Perturbation()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        p.ascend([Ascent(layer.weight, torch.ones(4, 4), 1.0, 8.0)])
        displaced = layer(x)
        p.restore()
        after = layer(x)
    assert not torch.equal(before, displaced)
    assert torch.equal(before, after)


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match=r"norm must be one of 'tensor', 'global', got 'l1'"):
        Perturbation("l1")  # type: ignore[arg-type]


def test_each_group_steps_with_its_own_inner_lr() -> None:
    a, b = torch.zeros(1), torch.zeros(1)
    Perturbation().ascend([Ascent(a, a + 1, 0.1, 0.5), Ascent(b, b + 1, 0.2, 0.5)])
    assert [a.item(), b.item()] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_every_step_is_inner_lr_long(norm: str) -> None:
    a, b = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    p = Perturbation(norm)
    for _ in range(3):
        p.ascend([Ascent(a, a * 0 + 0.2, 0.5, 10.0), Ascent(b, b * 0 - 0.2, 0.25, 20.0)])
    assert [a.item(), b.item()] == pytest.approx([1.3, 0.85])


@pytest.mark.parametrize("bad_one", [0, 1, 2])
@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_one_bad_gradient_stops_parameters_of_every_dtype_and_radius(norm: str, bad_one: int) -> None:
    params = [torch.ones(3), torch.ones(3).bfloat16(), torch.ones(3)]
    grads = [torch.full_like(q, math.inf if i == bad_one else 1.0) for i, q in enumerate(params)]
    p = Perturbation(norm)
    p.ascend([Ascent(q, g, 1.0, r) for q, g, r in zip(params, grads, (0.5, 0.5, 0.25), strict=True)])
    assert [q.tolist() for q in params] == [[1.0] * 3] * 3
    assert not p.was_finite()


def test_an_ascent_without_gradients_forgets_the_last_ones_overflow() -> None:
    q = torch.ones(1)
    p = Perturbation()
    p.ascend([Ascent(q, q * math.nan, 1.0, 0.5)])
    p.restore()
    p.ascend([Ascent(q, None, 1.0, 0.5)])
    assert p.was_finite()


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.repeat(2)])
def test_a_parameter_that_changed_its_type_or_shape_gets_a_new_backup(change: object) -> None:
    q = torch.nn.Parameter(torch.full((2,), 1 / 3))
    p = Perturbation()
    for _ in range(2):
        p.ascend([Ascent(q, torch.ones_like(q), 1.0, 0.5)])
        p.restore()
        q.data = change(q.data)  # type: ignore[operator]
        theta = q.detach().clone().add_(1e-12)
        q.data.copy_(theta)
    p.ascend([Ascent(q, torch.ones_like(q), 1.0, 0.5)])
    p.restore()
    assert torch.equal(q, theta)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_of_an_ascent_that_was_not_finite_tell_that_nothing_moved(bad: float) -> None:
    q, p = torch.ones(2), Perturbation()
    p.ascend([Ascent(q, torch.tensor([1.0, bad]), 1.0, 0.5)])
    assert {k: v.item() for k, v in p.statistics().items()} == {"perturbation_norm": 0.0, "clipped": 0.0}


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_gradients_may_be_wider_than_their_weights(norm: str) -> None:
    """As with `grad_dtype`; mixed, and with shapes that one dtype cannot be read as the other in."""
    params = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((3,), (), (5,))]
    grads = [torch.ones(3), torch.ones(()), torch.ones(5, dtype=torch.bfloat16)]
    p = Perturbation(norm)
    for _ in range(2):
        p.ascend([Ascent(q, g.clone(), 0.25, 8.0) for q, g in zip(params, grads, strict=True)])
    assert [q.tolist() for q in params] == [[0.5] * 3, 0.5, [0.5] * 5]
    p.restore()
    assert not any(q.any() for q in params)


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("size", [4, 8])
def test_a_gradient_that_parameters_share_counts_once_for_each(norm: Any, size: int) -> None:
    """Autograd gives both the same memory, or one a part of the other's, if they are added through views."""
    moved = []
    for shared in (True, False):
        p, q = torch.ones(4, requires_grad=True), torch.zeros(size, requires_grad=True)
        (torch.cat([p, torch.ones(size - 4)])[None] + q[None]).square().sum().backward()
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.untyped_storage().data_ptr() == q.grad.untyped_storage().data_ptr()
        if not shared:
            p.grad, q.grad = p.grad.clone(), q.grad.clone()
        Perturbation(norm).ascend([Ascent(t, t.grad, 1.0, 0.4) for t in (p, q)])
        moved.append(torch.cat([p, q]).detach())
    assert torch.equal(*moved)
    assert moved[0][:4].min() > 1.05, "they have moved"


def test_memory_that_overlaps_at_an_offset_is_parted() -> None:
    memory = torch.arange(8.0)
    first, second = [memory[:4], memory[4:]], [memory[2:6], torch.empty(0)]
    clone_overlapping([first, second])
    tensors = first + second
    torch._foreach_mul_(tensors, 2)
    assert [t.tolist() for t in tensors] == [[0, 2, 4, 6], [8, 10, 12, 14], [4, 6, 8, 10], []]
    disjoint = [memory[:4], memory[4:]]
    clone_overlapping([disjoint])
    assert disjoint[1].data_ptr() == memory[4:].data_ptr(), "memory that is not shared is not copied"


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 3)])
def test_an_expanded_gradient(shape: tuple[int, ...]) -> None:
    """Its entries are one number in memory, which an in-place kernel would change several times."""
    moved = []
    for grad in (torch.ones(()).expand(shape), torch.ones(shape)):
        p = torch.zeros(shape)
        Perturbation().ascend([Ascent(p, grad, 1.0, 0.4)])
        moved.append(p)
    assert torch.equal(*moved)
    torch.testing.assert_close(moved[0].norm(), torch.tensor(0.4))


def test_a_lazily_conjugated_gradient() -> None:
    p = torch.tensor([1 + 1j, 2.0], requires_grad=True)
    (p.conj() * torch.tensor([3 + 4j, 0.0])).real.sum().backward()
    assert p.grad is not None
    expected = (p + 0.1 * p.grad.resolve_conj()).detach()
    Perturbation().ascend([Ascent(p, p.grad, 0.1, 10.0)])
    torch.testing.assert_close(p.detach(), expected)
