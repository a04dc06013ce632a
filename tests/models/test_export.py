"""Tests that the networks leave Python and eager mode with the outputs that they have there."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import SMALL, every_small, images, small
from torch import nn
from torch.ao.quantization import disable_fake_quant, get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TorchScript.*", "ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*(observer|quantiz).*:UserWarning"),
]


def settled(name: str, **kwargs: Any) -> Any:
    """Return a network in evaluation mode whose running statistics are not the initial ones."""
    model = small(name, drop_rate=0.1, conv_drop_rate=0.1, **kwargs)
    model(images(batch_size=8))
    return model.eval()


def traced(model: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(model)


@every_small
@pytest.mark.parametrize("prepare", [lambda model: model, traced], ids=["as it is", "traced by fx"])
def test_torchscript(name: str, prepare: Callable[[nn.Module], nn.Module]) -> None:
    model = settled(name, scriptable=True)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(prepare(model)), file)
    script = torch.jit.load(io.BytesIO(file.getvalue()))
    for x in (images(), images(batch_size=1, size=(45, 38))):
        assert torch.equal(script(x), model(x))
    assert script.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["preactresnet18", "preactresnet50", "wrn28_10"])
def test_torchscript_of_a_network_as_released(name: str) -> None:
    model = settled(name, as_released=True, scriptable=True)
    assert torch.equal(torch.jit.script(model)(images()), model(images()))
    assert not torch.allclose(model(images()), settled(name)(images()))


@every_small
def test_torchscript_trains(name: str) -> None:
    """Gradients and running statistics are those of the model; a request to recompute the stages is passed over."""
    model = small(name)
    script = torch.jit.script(small(name))
    recomputing = small(name)
    recomputing.set_grad_checkpointing()
    recomputing = torch.jit.script(recomputing)
    for each in (model, script, recomputing):
        each(images()).square().sum().backward()
    for each in (script, recomputing):
        for (key, p), q in zip(model.named_parameters(), each.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=key)
        for (key, p), q in zip(model.named_buffers(), each.buffers(), strict=True):
            torch.testing.assert_close(q, p, msg=key)


@every_small
def test_torch_export_of_any_batch_size(name: str) -> None:
    model = settled(name)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch_size in (2, 5):
        x = images(batch_size)
        assert torch.equal(program.module()(x), model(x))


@every_small
def test_onnx(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime computes the logits of an ONNX file")
    pytest.importorskip("onnxscript", reason="torch.onnx.export writes with onnxscript")
    model, file = settled(name), io.BytesIO()
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (images(),), file, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = runtime.InferenceSession(file.getvalue())
    for batch_size in (2, 5):
        x = images(batch_size)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-5)


@every_small
def test_observers_keep_the_outputs(name: str) -> None:
    model, x = settled(name), images()
    expected = model(x)
    observed = prepare_fx(pickle.loads(pickle.dumps(model)), get_default_qconfig_mapping(), (x,))
    torch.testing.assert_close(observed(x), expected, rtol=1e-4, atol=1e-5)
    quantised = convert_fx(observed)(x)
    assert (quantised - expected).norm() < 0.3 * expected.norm()


@every_small
def test_quantisation_aware_training(name: str) -> None:
    plain, x = small(name), images()
    aware = prepare_qat_fx(small(name), get_default_qat_qconfig_mapping(), (x,))
    aware(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in aware.parameters())
    aware.apply(disable_fake_quant)
    torch.testing.assert_close(aware(x), plain(x), rtol=1e-4, atol=1e-4)


@every_small
def test_pickle(name: str) -> None:
    model, x = settled(name), images()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("name", [name for name in SMALL if name != "cifar_vgg16"])
def test_stochastic_depth_survives_fx_and_torchscript(name: str) -> None:
    model = small(name, drop_path_rate=0.5)
    script = torch.jit.script(small(name, drop_path_rate=0.5))
    x = images()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(script(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(traced(model.eval())(x), model(x), rtol=0, atol=0)
