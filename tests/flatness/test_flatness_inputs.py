"""What the flatness command says of inputs that cannot be meant, and what a failure on the way leaves."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from endings import error_of
from torch import nn
from torch.utils.data import DataLoader

from amp_plugin.command import run_command
from amp_plugin.flatness.measures import Measures, MeasureSettings
from amp_plugin.train.run_folder import open_run

command = importlib.import_module("amp_plugin.flatness.__main__")
LIGHT = ["--measures", "sharpness", "line", "plane", "--line_points", "3", "--plane_points", "3", "--steps", "1"]


def flatness(*arguments: object) -> None:
    run_command(lambda: command.run([str(a) for a in arguments]), ())


def refusal(*arguments: object) -> str:
    return error_of(lambda: flatness(*arguments))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Two folders that open as runs of a tiny network, without a training."""
    pytest.importorskip("matplotlib", reason="draws pictures")
    batch = {"pixel_values": torch.randn(8, 3, 2, 2), "labels": torch.arange(8) % 2}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 2)

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Any:
            logits = self.layer(pixel_values.flatten(1))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Train(list[int]):
        split = SimpleNamespace(kind="images")

    def open_tiny(folder: Path, **_: object) -> Any:
        settings = {"amp_epsilon": 0.1, "amp_norm": "tensor", "optim": "amp"}
        loader = DataLoader([0], collate_fn=lambda _: batch)
        return SimpleNamespace(
            folder=folder,
            settings=settings,
            metrics={"eval_error": 50.0},
            task=SimpleNamespace(model=Net(), train=Train(range(8)), dataset="tiny"),
            training_batches=lambda examples, batch_size: loader,
        )

    monkeypatch.setattr(command, "open_run", open_tiny)
    monkeypatch.setattr(command, "plot_landscapes", lambda scapes, path, title: path.write_bytes(b"a picture"))
    monkeypatch.chdir(tmp_path)
    return ["sgd", "amp"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *(([f"--{o}", n], f"--{o}: ") for o in ("images", "batch_size", "steps") for n in ("", "0", "-1", "x", "1.5")),
        *(([f"--{o}", n], f"--{o}: ") for o in ("eigenvalues", "products") for n in ("0", "-1", "nan")),
        *((["--probes", n], "--probes: must be at least 2") for n in ("0", "1", "-1")),
        *(([f"--{o}", n], f"--{o}: ") for o in ("span", "epsilon") for n in ("", "0", "-1", "nan", "inf", "x")),
        *((["--seed", n], "--seed: ") for n in ("-1", "99999999999", "x")),
        *((["--line_points", n], "--line_points: ") for n in ("0", "1", "9999999", "x")),
        *((["--plane_points", n], "--plane_points: ") for n in ("0", "-3", "10001")),
        (["--plane_points", "4"], "points must be odd"),
        (["--eigenvalues", "9", "--products", "8"], "products must be at least as many as eigenvalues"),
        (["--names", "a"], "--names: give 2 different names"),
        (["--names", "a", "b", "c"], "--names: give 2 different names"),
        (["--names", "a", "a"], "--names: a is given twice"),
        (["--measures", "flat"], "--measures: invalid choice: 'flat'"),
        (["--measures"], "--measures: expected at least one argument"),
        (["--norm", "l2"], "--norm: invalid choice: 'l2'"),
        (["--output_dir", ""], "--output_dir: '' is no path"),
        (["--data_root", ""], "--data_root: '' is no path"),
        (["--output_dir", "file"], "cannot write to 'file': it is a file"),
        (["--output_dir", "file/x"], "cannot write to 'file/x'"),
        (["--epsilom", "1"], "no option '--epsilom', did you mean '--epsilon'"),
        (["sgd", "--images", "1"], "folders: sgd is given twice"),
    ],
)
def test_options_are_checked_before_a_run_is_opened(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="draws pictures")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    late = {"points must be odd", "products must be at least as many as eigenvalues"}
    if said in late:
        with pytest.raises(ValueError, match=said):
            MeasureSettings(epsilon=1.0, **{o[2:]: int(n) for o, n in zip(*[iter(arguments)] * 2, strict=True)})
        return
    monkeypatch.setattr(command, "open_run", lambda *_, **__: pytest.fail("a run is opened"))
    assert said in refusal("sgd", *(["amp"] if arguments[0] != "sgd" else []), *arguments, *LIGHT[:2])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epsilon": "0.1"}, "epsilon must be a number"),
        ({"epsilon": math.nan}, "epsilon must be above 0"),
        ({"epsilon": 1.0, "norm": "l2"}, "norm must be one of tensor, global, got 'l2'"),
    ],
)
def test_what_a_run_records_is_checked_too(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MeasureSettings(**settings)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "3", '{"settings": {"seed": 1}}', '{"settings": [], "metrics": {}}', "[" * 100_000),
        *('{"settings": {"seed": 1}, "metrics": {}}', '{"settings": {"seed": 1}, "metrics": {"eval_error": "low"}}'),
    ],
)
def test_a_damaged_record_of_a_run_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json' is (not the record of a run|damaged)"):
        open_run(tmp_path)


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("cannot be drawn")


def interrupt(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


def recorded() -> dict[str, Any]:
    return dict(json.loads(Path("flatness/flatness.json").read_text())["models"])


def test_pictures_that_fail_lose_no_measure(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("flatness").mkdir()
    Path("flatness/landscape.png").write_text("an earlier command's")
    monkeypatch.setattr(command, "plot_landscapes", fail)
    with pytest.raises(SystemExit) as left:
        flatness(*opened, *LIGHT)
    assert str(left.value.code).splitlines() == [
        "error: flatness/landscape_line.png failed: RuntimeError: cannot be drawn",
        "error: flatness/landscape.png failed: RuntimeError: cannot be drawn",
        "error: the other results are in flatness",
    ]
    page = Path("flatness/flatness.md").read_text()
    assert "| **sharpness (nats)** |" in page
    assert "![" not in page
    assert page in capsys.readouterr().out
    assert list(recorded()["amp"]) == ["evaluation", "weight_norm", "sharpness", "line", "plane"]
    assert not list(Path("flatness").glob("*.png"))


def test_one_picture_that_fails_leaves_the_other(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    draw = command.plot_landscapes

    def only_planes(scapes: Any, path: Path, title: str) -> None:
        return fail() if "line" in path.name else draw(scapes, path, title)

    monkeypatch.setattr(command, "plot_landscapes", only_planes)
    with pytest.raises(SystemExit, match=r"landscape_line.png failed"):
        flatness(*opened, *LIGHT)
    assert "![loss landscape](landscape.png)" in Path("flatness/flatness.md").read_text()
    assert [path.name for path in Path("flatness").glob("*.png")] == ["landscape.png"]


@pytest.mark.parametrize("measure", ["epsilon_sharpness", "loss_landscape"])
def test_a_measure_that_fails_leaves_the_others(
    measure: str, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"amp_plugin.flatness.measures.{measure}", fail)
    with pytest.raises(SystemExit, match=r"error: sgd: the measure \w+ failed: RuntimeError: cannot be drawn"):
        flatness(*opened, *LIGHT)
    left = {"epsilon_sharpness": ["line", "plane"], "loss_landscape": ["sharpness"]}[measure]
    assert list(recorded()["sgd"]) == ["evaluation", "weight_norm", *left]
    assert "| training loss (nats) |" in Path("flatness/flatness.md").read_text()


def test_a_model_that_fails_leaves_the_other(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = command.measure
    calls: list[int] = []

    def second(*arguments: Any) -> Measures:
        calls.append(1)
        return made(*arguments) if len(calls) == 2 else fail()

    monkeypatch.setattr(command, "measure", second)
    with pytest.raises(SystemExit, match=r"error: sgd failed: RuntimeError"):
        flatness(*opened, *LIGHT)
    assert list(recorded()) == ["amp"]
    assert "| amp |" in Path("flatness/flatness.md").read_text()
    monkeypatch.setattr(command, "measure", fail)
    with pytest.raises(SystemExit, match=r"error: sgd failed[^|]*\nerror: amp failed"):
        flatness(*opened, *LIGHT)


def test_an_interruption_keeps_what_was_measured(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Callable[..., Any]] = [command.measure, interrupt]
    monkeypatch.setattr(command, "measure", lambda *arguments: made.pop(0)(*arguments))
    with pytest.raises(SystemExit) as left:
        flatness(*opened, *LIGHT)
    assert left.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted: what was measured is in flatness/flatness.json"
    assert list(recorded()) == ["sgd"]


@pytest.mark.skipif(sys.platform == "win32", reason="opens no folder as a file")
@pytest.mark.parametrize("name", ["flatness.json", "flatness.md", "landscape.png"])
def test_a_result_that_cannot_be_written_leaves_the_others(name: str, opened: list[str]) -> None:
    Path("flatness", name).mkdir(parents=True)
    with pytest.raises(SystemExit, match=rf"error: could not save {name} in 'flatness'") as left:
        flatness(*opened, *LIGHT)
    assert str(left.value.code).endswith("\nerror: the other results are in flatness")
    others = {"flatness.json", "flatness.md", "landscape.png", "landscape_line.png"} - {name}
    assert all(Path("flatness", other).is_file() for other in others)
