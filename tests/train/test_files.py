"""Every reader with every damage: one line names the file, what is wrong with it and what to do."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import bert_checkpoint, reviews, timm_checkpoint, vit_checkpoint
from main_job import QUICK
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file, save_file

from amp_plugin.data import DatasetError, load_images, load_texts
from amp_plugin.files import FileError, in_one_line, misfit, read_json, read_text
from amp_plugin.hub import HubError, push_folder
from amp_plugin.models.pretrained_images import image_checkpoint
from amp_plugin.models.pretrained_texts import text_checkpoint
from amp_plugin.report import read_ledger
from amp_plugin.train import job, options
from amp_plugin.train.plain_yaml import plain_yaml, read_plain_yaml
from amp_plugin.train.run_folder import open_run, write_config
from amp_plugin.trainer.resuming import read_trainer_state

RESUME = [*QUICK, "--save_strategy", "epoch", "--resume_from_checkpoint", "last"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders of each kind, to be copied and damaged."""
    root = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setitem(sys.modules, "matplotlib.figure", None)
        job.main([*QUICK, "--save_strategy", "epoch", "--num_train_epochs", "1", "--output_dir", str(root / "run")])
    for make in (timm_checkpoint, vit_checkpoint, bert_checkpoint, reviews):
        make(root / make.__name__)
    lines, images = root / "lines", np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    lines.mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(9)]
        (lines / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        for label, image in zip("ab", images, strict=True):
            (root / "images" / split / label).mkdir(parents=True)
            Image.fromarray(image).save(root / "images" / split / label / "0.png")
    return root


def whole_job(folder: Path, *more: str) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setitem(sys.modules, "matplotlib.figure", None)
        job.main([*RESUME, "--output_dir", str(folder), *more])


def resume_until_the_data(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_task", lambda *_: pytest.fail("the data are read first"))
        job.main([*RESUME, "--num_train_epochs", "1", "--output_dir", str(folder)])


def images_of(folder: Path) -> None:
    load_images(str(folder), image_column="image", label_column="label", cache_dir=folder.with_name("cache"))


def texts_of(folder: Path, label: str = "label") -> None:
    load_texts(str(folder), text_column="text", label_column=label, cache_dir=folder.with_name("cache"))


def fine_tuning_of(folder: Path) -> None:
    image_checkpoint(str(folder)).classifier(["a", "b"])


# Name: the folder, the file in it that is damaged, and what reads it.
READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "run's record": ("run", "run.json", open_run),
    "run's configuration": ("run", "config.json", open_run),
    "run's weights": ("run", "model.safetensors", open_run),
    "run to compare with": (
        *("run", "run.json"),
        lambda f: job.main([*QUICK, "--output_dir", str(f / "new"), "--compare_with", str(f)]),
    ),
    "recipe": ("run", "config.yaml", lambda f: options.parse([str(f / "config.yaml"), "--use_cpu", "true"])),
    "ledger": ("run", "run.json", lambda f: read_ledger(f / "run.json")),
    "ledger to append to": (
        *("run", "run.json"),
        lambda f: job.main([*QUICK, "--output_dir", str(f / "new"), "--ledger", str(f / "run.json")]),
    ),
    "state of the Trainer": ("run", "checkpoint-3/trainer_state.json", resume_until_the_data),
    "weights to resume": ("run", "checkpoint-3/model.safetensors", resume_until_the_data),
    "optimizer to resume": ("run", "checkpoint-3/optimizer.pt", resume_until_the_data),
    "schedule to resume": ("run", "checkpoint-3/scheduler.pt", resume_until_the_data),
    "random numbers to resume": ("run", "checkpoint-3/rng_state.pth", resume_until_the_data),
    "folder to push": ("run", "model.safetensors", lambda f: push_folder(f, "me/mine")),
    "timm's configuration": ("timm_checkpoint", "config.json", fine_tuning_of),
    "timm's weights": ("timm_checkpoint", "model.safetensors", fine_tuning_of),
    "image processor": ("vit_checkpoint", "preprocessor_config.json", fine_tuning_of),
    "weights to fine-tune": ("vit_checkpoint", "model.safetensors", fine_tuning_of),
    "tokenizer": ("bert_checkpoint", "tokenizer.json", lambda f: text_checkpoint(str(f), ["a", "b"])),
    "CSV": ("reviews", "train.csv", lambda f: texts_of(f, "mood")),
    "JSON Lines": ("lines", "train.jsonl", texts_of),
    "image": ("images", "train/a/0.png", images_of),
}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "cut short": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2 + 3]),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "another text": lambda p: p.write_text("good morning\n", encoding="utf-8"),
    "bytes": lambda p: p.write_bytes(bytes(range(256)) * 4),
    "UTF-16": lambda p: p.write_bytes("good mörning".encode("utf-16")),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}
# These are other folders, or none; a ledger may be empty, or end in half a line, which a killed process has left, and a
# table may end anywhere.
MEANT = {
    *((reader, "a folder") for reader in ("CSV", "JSON Lines", "image")),
    *((reader, "empty") for reader in ("ledger", "ledger to append to")),
    *((reader, "cut short") for reader in ("ledger", "ledger to append to", "CSV", "recipe")),
}
_RARE = ("zeros", "bytes", "UTF-16")
TABLE = [
    pytest.param(reader, damage, id=f"{reader} - {damage}", marks=[pytest.mark.slow] if damage in _RARE else [])
    for reader in READERS
    for damage in DAMAGES
    if (reader, damage) not in MEANT
]


def one_line(read: Callable[[], object]) -> str:
    """Return what the user is told; whatever is no mistake of the user's would be a traceback."""
    with pytest.raises((ValueError, HubError)) as caught:
        read()
    said = str(caught.value)
    assert said
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("reader", "damage"), TABLE)
def test_a_damaged_file_is_named_in_one_line(
    reader: str, damage: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, name, read = READERS[reader]
    folder = Path(shutil.copytree(sources / kind, tmp_path / "copy"))
    DAMAGES[damage](folder / name)
    said = one_line(lambda: read(folder))
    named = Path(name).name.replace("train.csv", ".csv")  # the first is taken for whole, and the second one differs
    assert (
        named in said
        or "must have the same columns" in said
        or f"{folder.name}' lacks" in said
        or "no file named" in said
    )
    assert "Failed to" not in capsys.readouterr().err, "what Datasets logs"


def test_a_whole_file_is_read(sources: Path, tmp_path: Path) -> None:
    for kind, _, read in READERS.values():
        if read not in (resume_until_the_data, open_run) and kind != "run":
            read(Path(shutil.copytree(sources / kind, tmp_path / kind, dirs_exist_ok=True)))


@pytest.mark.parametrize("value", [None, "text", -1, [], {}, [1], {"a": 1}, float("inf"), True])
def test_a_value_of_another_type_is_told_at_any_key(sources: Path, tmp_path: Path, value: Any) -> None:
    """Every key of the state, of the settings and of the metrics: none ends in a traceback."""
    state = json.loads((sources / "run" / "checkpoint-3" / "trainer_state.json").read_text(encoding="utf-8"))
    for key in state:
        (tmp_path / "trainer_state.json").write_text(json.dumps({**state, key: value}), encoding="utf-8")
        with contextlib.suppress(FileError):
            read_trainer_state(tmp_path)
    record = json.loads((sources / "run" / "run.json").read_text(encoding="utf-8"))
    for part in ("settings", "metrics"):
        for key in record[part]:
            changed = {**record, part: {**record[part], key: value}}
            (tmp_path / "run.json").write_text(json.dumps(changed), encoding="utf-8")
            with contextlib.suppress(FileError):
                read_ledger(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("global_step",), "three", "global_step is 'three'"),
        (("epoch",), None, "epoch is None"),
        (("log_history",), {"a": 1}, "log_history is {'a': 1}"),
        (("log_history", 0), {"eval_error": "low"}, "eval_error is 'low'"),
        (("stateful_callbacks",), [], "stateful_callbacks is []"),
        (("stateful_callbacks", "RunSettings"), 3, "RunSettings is 3"),
        (("stateful_callbacks", "RunSettings", "args"), "x", "TypeError"),
        (("stateful_callbacks", "RunSettings", "args", "settings"), 3, "settings is 3"),
        (("of_a_later_version",), 3, "of_a_later_version"),
        ((), [1], "TypeError"),
    ],
)
def test_a_state_of_other_types_is_told_before_the_data(
    sources: Path, tmp_path: Path, keys: tuple[Any, ...], value: Any, told: str
) -> None:
    folder = Path(shutil.copytree(sources / "run", tmp_path / "copy"))
    path = folder / "checkpoint-3" / "trainer_state.json"
    whole: Any = {"": json.loads(path.read_text(encoding="utf-8"))}
    holder = whole
    for key in ("", *keys)[:-1]:
        holder = holder[key]
    holder[("", *keys)[-1]] = value
    path.write_text(json.dumps(whole[""]), encoding="utf-8")
    said = one_line(lambda: resume_until_the_data(folder))
    assert said.startswith(f"{str(path)!r} is damaged (")
    assert told in said
    assert said.endswith("; resume from an earlier checkpoint, or start anew")


def test_a_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    for text in ("[" * 10**5, '{"a":' * 10**5):
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
        assert "nested too deeply" in one_line(lambda: read_json(tmp_path / "run.json", "no"))
        assert "run.json, line 1, is not a run" in one_line(lambda: read_ledger(tmp_path / "run.json"))


# --- what a checkpoint holds


class Evil:
    """Make a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def with_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            evil = name.endswith("data.pkl")
            archive.writestr(name, pickle.dumps(Evil(path.with_name("evil")), protocol=2) if evil else content)


def changed(*keys: Any, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        whole: Any = {"": torch.load(path, weights_only=False)}
        holder = whole
        for key in ("", *keys)[:-1]:
            holder = holder[key]
        holder[("", *keys)[-1]] = value
        torch.save(whole[""], path)

    return change


def other_weights(path: Path) -> None:
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("optimizer.pt", with_code, "it holds more than numbers and tensors"),
        ("scheduler.pt", with_code, "it holds more than numbers and tensors"),
        ("rng_state.pth", with_code, "it holds more than numbers and tensors"),
        ("optimizer.pt", changed(value=None), "is damaged (AttributeError"),
        ("optimizer.pt", changed("state", 3, value="x"), "the state of a parameter is a str"),
        ("optimizer.pt", changed("state", 3, "momentum_buffer", value=torch.ones(2)), "momentum_buffer is (2,) where"),
        ("optimizer.pt", changed("param_groups", 0, "lr", value="x"), "lr is a str"),
        ("optimizer.pt", changed("param_groups", 0, value={}), "KeyError: 'params'"),
        ("scheduler.pt", changed(value=[1]), "the schedule is a list"),
        ("scheduler.pt", changed("gamma", value=None), "gamma is a NoneType"),
        ("scheduler.pt", changed("_last_lr", value=[]), "_last_lr has 0 entries, not 2"),
        ("scheduler.pt", changed("last_epoch", value=torch.zeros(2)), "last_epoch is not one number"),
        ("rng_state.pth", changed(value={}), "KeyError: 'python'"),
        ("rng_state.pth", changed("cpu", value=torch.ones(2)), "RNG state must be a torch.ByteTensor"),
        ("model.safetensors", other_weights, "its weights are of another network, timm_model."),
        ("config.json", lambda p: p.write_bytes(b"{"), "is damaged (Expecting property name"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_of_something_else_is_told_before_the_first_step(
    name: str, damage: Callable[[Path], None], told: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(sources / "run", tmp_path / "copy"))
    damage(folder / "checkpoint-3" / name)
    monkeypatch.setattr("amp_plugin.AMPTrainer.training_step", lambda *_: pytest.fail("it is trained"))
    said = one_line(lambda: whole_job(folder))
    assert told in said
    assert f"{folder / 'checkpoint-3'}" in said
    assert said.endswith("; resume from an earlier checkpoint, or start anew")
    assert not (folder / "checkpoint-3" / "evil").exists()


def test_a_checkpoint_with_code_is_not_run_and_nobody_is_asked(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked"))
    for kind, name, read in (
        ("vit_checkpoint", "config.json", fine_tuning_of),
        ("bert_checkpoint", "config.json", lambda f: text_checkpoint(str(f), ["a", "b"])),
    ):
        folder = Path(shutil.copytree(sources / kind, tmp_path / kind))
        (folder / "mine.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
        whole = json.loads((folder / name).read_text(encoding="utf-8"))
        classes = ("AutoConfig", "AutoModelForImageClassification", "AutoModelForSequenceClassification")
        whole |= {"model_type": "mine", "auto_map": dict.fromkeys(classes, "mine.Mine")}
        (folder / name).write_text(json.dumps(whole), encoding="utf-8")
        assert "contains custom code" in one_line(lambda read=read, folder=folder: read(folder))


def test_every_checkpoint_is_loaded_without_its_code() -> None:
    """A `from_pretrained` that does not say it may ask the user, who is not there."""
    calls = [c for path in (ROOT / "amp_plugin").rglob("*.py") for c in calls_of(path, "from_pretrained")]
    assert len(calls) >= 5
    for place, call in calls:
        said = {keyword.arg for keyword in call.keywords}
        made = isinstance(call.args[0], ast.Constant)  # of no file
        assert made or "trust_remote_code" in said or None in said, place


# --- data


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{oops\n", "has a line 3 that is no JSON"),
        (b"[1, 2]\n", "has a line 3 that is no JSON object"),
        (b"[" * 5000 + b"\n", "has a line 3 that is no JSON"),
        (b"\0\0\n", "is damaged: line 3 holds bytes that are zero"),
        (b'{"text": "unfinished\n', "has a line 3 that is no JSON"),
    ],
)
def test_a_bad_line_is_named(sources: Path, tmp_path: Path, line: bytes, told: str) -> None:
    folder = Path(shutil.copytree(sources / "lines", tmp_path / "copy"))
    lines = (folder / "test.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "test.jsonl").write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    said = one_line(lambda: texts_of(folder))
    assert f"{str(folder / 'test.jsonl')!r} {told}" in said


def test_latin_1_is_named_with_its_line(sources: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources / "reviews", tmp_path / "copy"))
    lines = (folder / "test.csv").read_bytes().splitlines(keepends=True)
    (folder / "test.csv").write_bytes(b"".join([*lines[:4], "schön,pos,5\n".encode("latin-1"), *lines[4:]]))
    said = one_line(lambda: texts_of(folder, "mood"))
    assert "test.csv' is no text in UTF-8: line 5 has the byte 0xf6; save the file as UTF-8" in said
    lines = (sources / "lines" / "train.jsonl").read_bytes().replace(b"text 3", b"text \xf6")
    shutil.copytree(sources / "lines", tmp_path / "lines")
    (tmp_path / "lines" / "train.jsonl").write_bytes(lines)
    assert "row 3: column 'text' holds no text in UTF-8" in one_line(lambda: texts_of(tmp_path / "lines"))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("a,b,c,d,e\n", "test.csv' cannot be read (ParserError: Error tokenizing data. C error: Expected 3 fields in"),
        ("x,,5\n", "1 labels of column 'mood' are missing, the first in row 3"),
    ],
)
def test_a_bad_row_is_named(sources: Path, tmp_path: Path, row: str, told: str) -> None:
    folder = Path(shutil.copytree(sources / "reviews", tmp_path / "copy"))
    lines = (folder / "test.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "test.csv").write_text("".join([*lines[:4], row, *lines[4:]]), encoding="utf-8")
    assert told in one_line(lambda: texts_of(folder, "mood"))


def test_columns_that_differ_between_files_are_named(sources: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources / "reviews", tmp_path / "copy"))
    (folder / "test.csv").write_text("text,humour\na,b\n", encoding="utf-8")
    said = one_line(lambda: texts_of(folder, "mood"))
    assert "files must have the same columns" in said
    assert all(name in said for name in ("humour", "mood", "stars"))  # in words of older datasets too


def test_a_cache_that_was_cut_short_is_named(sources: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources / "lines", tmp_path / "copy"))
    texts_of(folder)
    for path in folder.with_name("cache").rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:50])
    assert "is damaged (" in (said := one_line(lambda: texts_of(folder)))
    assert "delete it, and it is made anew" in said


def test_an_image_is_named_by_its_file(sources: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources / "images", tmp_path / "copy"))
    path = folder / "train" / "b" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError, match=rf"split 'train', row 1 \({path}\): cannot decode column 'image'"):
        images_of(folder)


# --- recipes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", 10), ("-007", -7), ("0x1F", 31), ("0b1", "0b1"), ("1_000", "1_000"), ("0o17", "0o17")),
        *(("1:30", "1:30"), ("1:30.5", "1:30.5"), ("190:20:30", "190:20:30"), ("2024-01-02", "2024-01-02")),
        *(("1e-3", 0.001), ("1E5", 1e5), ("1.5e3", 1500.0), (".5", 0.5), ("5.", 5.0), ("-.inf", float("-inf"))),
        *(("true", True), ("no", False), ("~", None), ("0", 0), ("1.2.3", "1.2.3"), ("e3", "e3"), ("-", [None])),
    ],
)
def test_a_number_in_a_recipe_is_what_is_written(text: str, value: Any) -> None:
    read = read_plain_yaml(f"a: [{text}]\n") if text != "-" else {"a": read_plain_yaml("- \n")}
    assert read["a"] == ([value] if text != "-" else value)
    assert type(read["a"][0]) is type([value][0]) or text == "-"


@pytest.mark.parametrize(
    "text", ["010", "1:30", "1e-3", "1e5", "0x1F", "no", "null", "2024-01-02", "*a", "a: b", "ä", "="]
)
def test_a_text_in_a_config_is_read_again(text: str, tmp_path: Path) -> None:
    assert read_plain_yaml(plain_yaml({"a": text, text: 1})) == {"a": text, text: 1}
    parsed = options.parse([*QUICK, f"--label_column={text}", "--image_column", text])
    write_config(tmp_path / "config.yaml", *parsed)
    again = options.parse([str(tmp_path / "config.yaml"), "--use_cpu", "true"])
    assert (again[0].label_column, again[0].image_column) == (text, text)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("seed: 1\n".encode("utf-16"), "is no text in UTF-8 (byte 0 is 0xff); give a recipe in YAML"),
        ("# schön\nseed: 1\n".encode("latin-1"), "is no text in UTF-8 (byte 5 is 0xf6)"),
        (b"seed: \x01\n", "is not YAML: unacceptable character #x0001"),
        (b"seed: !!bool maybe\n", "is not YAML: KeyError"),
        (b"seed: !!int many\n", "is not YAML: "),
        (b"model_kwargs: !!map 3\n", "is not YAML: "),
        (b"seed: [1\n", "is not YAML: "),
        (b"a\n", "must be a mapping of options to values"),
        (b"", "must be a mapping of options to values"),
        (b"1: 2\n", "no option '--1'"),
        (b"seed: 1:30\n", "invalid int value: '1:30'"),
    ],
)
def test_a_recipe_that_is_none_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    said = one_line(lambda: options.parse([str(tmp_path / "mine.yaml"), "--use_cpu", "true"]))
    assert told in said
    assert "mine.yaml" in said
    assert "is a folder, not a file" in one_line(lambda: options.parse([str(tmp_path)]))


def test_a_mark_at_the_beginning_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\n")
    assert options.parse([str(tmp_path / "mine.yaml"), "--use_cpu", "true"])[2].seed == 7


# --- words


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied"), "cannot be read (Permission denied)"),
        (OSError(5, "Input/output error"), "cannot be read (Input/output error)"),
        (FileNotFoundError(2, "No such file"), "is not there"),
    ],
)
def test_what_the_system_refuses_is_told(
    error: OSError, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "read_text", fail)
    assert one_line(lambda: read_text(tmp_path / "a", "mend it")) == f"{str(tmp_path / 'a')!r} {told}; mend it"


def test_types() -> None:
    assert misfit({"a": 1, "b": None}, {"a": float, "b": str | None, "c": int}) == ""
    assert misfit({"a": True}, {"a": float}) == "a is True"
    assert misfit({"a": 10**400}, {"a": float}).startswith("a is 1000")
    assert in_one_line(KeyError("x")) == "KeyError: 'x'"
    assert in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line("word " * 100)) < 210


@functools.cache
def calls_in(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def calls_of(path: Path, *names: str) -> list[tuple[str, ast.Call]]:
    """Return the calls of functions or methods of these names in a file, with their place."""
    found = []
    for node in calls_in(path):
        if (getattr(node.func, "attr", "") or getattr(node.func, "id", "")) in names:
            found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_text_is_read_and_written_in_utf_8() -> None:
    """Otherwise the encoding is that of the machine, and a file of another machine is damaged here."""
    paths = [path for room in ("amp_plugin", "recipes") for path in (ROOT / room).rglob("*.py")]
    calls = [call for path in paths for call in calls_of(path, "read_text", "write_text", "open", "fdopen")]
    assert len(calls) > 20
    for place, call in calls:
        words = [ast.unparse(word) for word in (*call.args, *(k.value for k in call.keywords))]
        low_level = ast.unparse(call.func) in ("os.open", "Image.open", "read_text", "write_text", "os.fdopen")
        low_level |= any(len(word) < 6 and "b" in word and "'" in word for word in words)  # the mode of bytes
        assert low_level or any(keyword.arg == "encoding" for keyword in call.keywords), place
