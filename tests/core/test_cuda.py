"""AMP with torch alone on a CUDA device: eager, captured, compiled, with NCCL; against float64 on the CPU.

`AMP_PLUGIN_TEST_DEVICE=cpu pytest -m cuda` tries the tests themselves on a CPU, see `device_trainings`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_trainings import (
    DEVICE,
    MARKS,
    PRECISIONS,
    STEPS,
    Step,
    Training,
    assert_a_nan_changes_nothing,
    assert_ends_as_the_reference,
    assert_overflows_lower_the_scale,
    batches,
    by_ascend,
    by_ascent_passes,
    by_attach,
    by_closure,
    distance,
    own_settings,
)
from exactness_problem import Net
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from amp_plugin import CapturedStep, ExtraPasses
from amp_plugin.core import captured_call
from amp_plugin.core.norms import norms_of

pytestmark = MARKS
DOORS: dict[str, Callable[[Training], Step]] = {
    "closure": by_closure,
    "ascend": by_ascend,
    "ascent_passes": by_ascent_passes,
}
CELLS = [(door, precision) for door in DOORS for precision in PRECISIONS if (door, precision) != ("closure", "fp16")]
CAPTURED = pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    with own_settings():
        yield


@pytest.fixture(autouse=True)
def _captures_succeed(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """A step that could not be captured would be trained as it is, and rightly so."""
    yield
    assert not [str(w.message) for w in recwarn if "cannot be captured" in str(w.message)]


@CAPTURED
@pytest.mark.parametrize(("door", "precision"), CELLS)
def test_a_training_ends_where_the_reference_does(door: str, precision: str, captured: bool) -> None:
    training = Training(precision, captured=captured)
    assert_ends_as_the_reference(training, training.run(DOORS[door](training)))


def test_a_training_without_the_perturbation_does_not() -> None:
    training = Training("fp64", perturbed=False)
    training.run(by_closure(training))
    assert distance(training.net) > 2 * max(precision.bound for precision in PRECISIONS.values())


@pytest.mark.parametrize(
    ("door", "precision", "captured"),
    [("closure", "bf16", True), ("ascend", "fp32", False), ("ascend", "fp16", True)],
)
def test_a_compiled_net_ends_where_the_reference_does(door: str, precision: str, captured: bool) -> None:
    training = Training(precision, captured=captured, compiled="default")
    assert_ends_as_the_reference(training, training.run(DOORS[door](training), warm_up=3))


@pytest.mark.parametrize("door", ["closure", "ascend"])
def test_compiled_code_with_graphs_of_its_own(door: str) -> None:
    training = Training("fp32", compiled="reduce-overhead")
    assert_ends_as_the_reference(training, training.run(DOORS[door](training)))


# --- captured steps


@CAPTURED
@pytest.mark.parametrize("door", ["closure", "ascend"])
def test_a_step_with_a_nan_changes_nothing_and_is_counted(door: str, captured: bool) -> None:
    training = Training("fp32", captured=captured)
    assert_a_nan_changes_nothing(training, DOORS[door](training), captured)


@CAPTURED
def test_a_gradient_scaler_skips_what_overflows_and_lowers_its_scale(captured: bool) -> None:
    training = Training("fp16", captured=captured)
    training.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
    assert_overflows_lower_the_scale(training, by_ascend(training), captured)


def test_a_schedule_reaches_a_captured_step() -> None:
    ends = []
    for captured in (False, True):
        training = Training("fp64", captured=captured)
        (group,) = training.optimizer.param_groups
        step: Step = by_closure(training)
        if captured:
            step = CapturedStep(step, training.optimizer, warm_up=1)
        for k, batch in enumerate(batches()):
            if captured:
                group["lr"].fill_(2.0 ** -(k + 3))
            else:
                group["lr"] = 2.0 ** -(k + 3)
            training.load(*batch)
            step()
        ends.append(training.held())
    for eager, replayed in zip(*ends, strict=True):
        torch.testing.assert_close(eager, replayed, rtol=1e-10, atol=1e-12)


def test_captured_steps_side_by_side_are_those_they_are_alone() -> None:
    """Each on a stream of its own, begun and replayed while the others are at work."""
    trainings = [Training("fp64", captured=True) for _ in range(3)]
    streams = [torch.cuda.Stream() if DEVICE.type == "cuda" else None for _ in trainings]
    steps = [CapturedStep(by_ascend(training), training.optimizer, warm_up=2) for training in trainings]
    losses: list[list[Tensor]] = [[] for _ in trainings]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for k in range(STEPS):
        for first, (training, stream, step) in enumerate(zip(trainings, streams, steps, strict=True)):
            with torch.cuda.stream(stream):
                training.load(*batches(first)[k])
                losses[first].append(step().clone())
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for first, training in enumerate(trainings):
        assert_ends_as_the_reference(training, [loss.item() for loss in losses[first]], first)


def refuse_values(step: Callable[[], Any], stream: Any) -> Any:
    """What a capture on a CPU would be: one that fails where the host is to read a value."""
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_reads_a_value_is_told_and_made_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the broken capture is left in torch: stream, random numbers, memory; and the next step is captured."""
    monkeypatch.setitem(captured_call.RECORDERS, "cpu", refuse_values)
    stream = torch.cuda.current_stream() if DEVICE.type == "cuda" else None
    training = Training("fp32", captured=True)
    step = by_ascend(training)

    def reading() -> Tensor:
        loss = step()
        assert loss.item() > 0
        return loss

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = training.run(reading)
    (message,) = [str(w.message) for w in told if "cannot be captured" in str(w.message)]
    assert "not permitted when stream is capturing" in message
    assert_ends_as_the_reference(training, losses)
    if DEVICE.type == "cuda":
        assert torch.cuda.current_stream() == stream
    ones = torch.ones(1000, device=DEVICE)
    first, second = F.dropout(ones), F.dropout(ones)
    assert not torch.equal(first, second)
    monkeypatch.undo()
    training = Training("fp32", captured=True)
    assert_ends_as_the_reference(training, training.run(by_ascend(training)))


class NetWithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss: dict[str, Tensor] = self.inner(F.dropout(images, 0.5, self.training), labels)
        return loss


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a step on a CPU is not captured, and draws what it likes")
def test_passes_of_a_captured_step_that_draw_the_same_random_numbers_are_refused() -> None:
    training = Training("fp32", captured=True, net=NetWithDropout())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training.run(by_ascend(training))
    (message,) = [str(w.message) for w in told if "cannot be captured" in str(w.message)]
    assert "take rng='fresh'" in message


def test_a_captured_step_draws_new_random_numbers_each_time() -> None:
    training = Training("fp32", captured=True, net=NetWithDropout(), rng="fresh")
    training.optimizer.param_groups[0]["lr"].zero_()
    step = CapturedStep(by_ascend(training), training.optimizer, warm_up=1)
    training.load(*batches()[0])
    losses = [step().item() for _ in range(5)]
    assert len(set(losses)) == 5


# --- norms


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_exact_and_do_not_overflow(dtype: torch.dtype) -> None:
    """Of many tensors, small and large, in one batched kernel; in float64, but on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).to(dtype) for n in [1, 7, 300_000, *[50] * 300]]
    tensors.append(torch.full((4,), torch.finfo(dtype).max / 4 if dtype is not torch.float64 else 1e150, dtype=dtype))
    found = norms_of([t.to(DEVICE) for t in tensors])
    expected = torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])
    assert DEVICE.type == "cpu" or found.dtype is torch.float64
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=0.0)


# --- one process of a group


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with own_settings():
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # there may be no other network
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # as torch's notes on captured steps with DDP have it
        store: Path = tmp_path_factory.mktemp("group") / "store"
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def distributed(net: nn.Module) -> nn.Module:
    """With SyncBatchNorm, where that may be, and DDP, made on a stream that a capture may follow."""
    if DEVICE.type == "cpu":
        return DistributedDataParallel(net)
    with torch.cuda.stream(torch.cuda.Stream()):
        return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net))


@CAPTURED
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("door", ["closure", "ascend"])
def test_ddp_ends_where_the_reference_does(door: str, captured: bool) -> None:
    """A step is captured when DDP has settled."""
    training = Training("fp64", captured=captured)
    training.model = distributed(training.net)
    training.passes = ExtraPasses(training.model)
    step: Step = DOORS[door](training)
    assert_ends_as_the_reference(training, training.run(step, warm_up=STEPS - 3))


@pytest.mark.usefixtures("group")
def test_ddp_attached_ends_where_the_reference_does() -> None:
    training = Training("fp64")
    training.model = distributed(training.net)
    assert_ends_as_the_reference(training, training.run(by_attach(training)))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("door", ["closure", "attach"])
def test_fully_shard_ends_where_the_reference_does(door: str) -> None:
    net = Net().to(DEVICE, torch.float64)
    fully_shard(net, mesh=init_device_mesh(DEVICE.type, (1,)))
    training = Training("fp64", net=net)
    losses = training.run(by_closure(training) if door == "closure" else by_attach(training))
    training.net = Net().to(torch.float64)
    state = net.state_dict().items()
    training.net.load_state_dict({name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state})
    assert_ends_as_the_reference(training, losses)


@pytest.mark.usefixtures("group")
def test_fully_shard_refuses_channels_last_weights() -> None:
    """Torch's own rule, which the guide tells; where this fails, the guide has to change."""
    net = Net().to(DEVICE).to(memory_format=torch.channels_last)
    with pytest.raises(NotImplementedError, match="contiguous"):
        fully_shard(net, mesh=init_device_mesh(DEVICE.type, (1,)))
