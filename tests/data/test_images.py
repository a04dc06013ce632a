from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from PIL import Image
from repository import ROOT

from amp_plugin.data import DatasetError, DatasetSettings, ImageData, ImageSplit, TextSplit, decode, load_images
from amp_plugin.data.draws import NOISE_STREAM, SELECTION_STREAM
from amp_plugin.data.settings import measured_settings

CLASSES = ["cat", "dog", "owl"]
NAMED = datasets.ClassLabel(names=CLASSES)

Write = Callable[..., str]
Load = Callable[..., ImageData]


def random_images(n: int, seed: int = 0, size: tuple[int, int] = (6, 8)) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def stacked(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes one split of a folder: images (or encoded ones) and labels, in named columns."""

    def write_split(
        split: str,
        images: list[Any],
        labels: list[Any],
        *,
        label: Any = NAMED,
        image: Any = None,
        names: tuple[str, str] = ("picture", "kind"),
    ) -> str:
        features = datasets.Features({names[0]: image or datasets.Image(), names[1]: label})
        table = datasets.Dataset.from_dict(dict(zip(names, (images, labels), strict=True)), features=features)
        folder = tmp_path / "pets"
        folder.mkdir(exist_ok=True)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        return str(folder)

    return write_split


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_pets(name: str, **kwargs: Any) -> ImageData:
        defaults = {"image_column": "picture", "label_column": "kind", "cache_dir": tmp_path / "cache"}
        return load_images(name, **(defaults | kwargs))

    return load_pets


@pytest.fixture
def pets(write: Write) -> str:
    write("train", random_images(6), [0, 1, 2, 0, 1, 2])
    return write("test", random_images(3, seed=1), [2, 1, 0])


def arrays(tmp_path: Path) -> list[Path]:
    """List the cached arrays, oldest first."""
    found = (tmp_path / "cache" / "amp_plugin").glob("*.npy")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


# --- what load_images gives ---------------------------------------------------------------------------------


def test_any_data_set_with_its_columns(pets: str, load: Load) -> None:
    data = load(pets)
    assert data.name == pets
    assert data.class_names == tuple(CLASSES)
    assert data.num_classes == 3
    np.testing.assert_array_equal(data.train.images, stacked(random_images(6)))
    np.testing.assert_array_equal(data.test.images, stacked(random_images(3, seed=1)))
    np.testing.assert_array_equal(data.train.labels, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(data.test.labels, [2, 1, 0])
    assert data.train.labels.dtype == np.int64


def test_plain_integers_as_labels_are_named_after_themselves(write: Write, load: Load) -> None:
    write("train", random_images(3), [1, 0, 2], label=datasets.Value("int8"))
    folder = write("test", random_images(2), [2, 0], label=datasets.Value("int8"))
    data = load(folder)
    assert data.class_names == ("0", "1", "2")
    assert data.train.labels.dtype == np.int64


def test_other_split_names(write: Write, load: Load) -> None:
    write("train", random_images(2), [0, 1])
    folder = write("validation", random_images(2, seed=5), [1, 1])
    np.testing.assert_array_equal(load(folder, test_split="validation").test.images, stacked(random_images(2, seed=5)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str, write: Write, load: Load) -> None:
    images = [image.convert(mode) for image in random_images(3)]
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "TIFF")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    write("train", encoded, [0, 1, 2])
    folder = write("test", encoded, [0, 1, 2])
    expected = stacked([image.convert("RGB") for image in images])
    np.testing.assert_array_equal(load(folder).train.images, expected)


def test_resizes_when_asked(write: Write, load: Load) -> None:
    mixed = random_images(2) + random_images(1, size=(9, 5))
    write("train", mixed, [0, 1, 2])
    folder = write("test", random_images(1), [0])
    data = load(folder, image_size=4)
    expected = stacked([image.resize((4, 4), Image.Resampling.BICUBIC) for image in mixed])
    np.testing.assert_array_equal(data.train.images, expected)
    assert data.test.images.shape == (1, 4, 4, 3)


def test_a_mirror_with_the_configuration_as_a_folder(tmp_path: Path, data_root: Path) -> None:
    data = load_images("svhn", data_root=data_root, cache_dir=tmp_path)
    assert data.train.images.shape == (554, 32, 32, 3)
    assert data.class_names == tuple("0123456789")
    assert data.settings.autoaugment == "svhn"


def test_a_mirror_whose_card_names_the_configurations(tmp_path: Path, write: Write) -> None:
    names = ("image", "label")
    write("train", random_images(3), [0, 1, 2], names=names)
    folder = Path(write("test", random_images(3), [0, 1, 2], names=names))
    (tmp_path / "ufldl-stanford").mkdir()
    mirror = folder.rename(tmp_path / "ufldl-stanford" / "svhn")
    splits = "".join(f"  - split: {split}\n    path: {split}-*\n" for split in ("train", "test"))
    (mirror / "README.md").write_text(f"---\nconfigs:\n- config_name: cropped_digits\n  data_files:\n{splits}---\n")
    data = load_images("svhn", data_root=tmp_path, cache_dir=tmp_path / "cache")
    assert data.train.images.shape == (3, 6, 8, 3)


def test_a_column_of_a_known_data_set_can_be_overruled(tmp_path: Path, write: Write) -> None:
    names = ("img", "coarse_label")
    write("train", random_images(3), [0, 1, 2], names=names)
    folder = Path(write("test", random_images(3), [0, 1, 2], names=names))
    (tmp_path / "uoft-cs").mkdir()
    folder.rename(tmp_path / "uoft-cs" / "cifar100")
    with pytest.raises(DatasetError, match="no column 'fine_label', only img, coarse_label"):
        load_images("cifar100", data_root=tmp_path, cache_dir=tmp_path / "cache")
    data = load_images("cifar100", data_root=tmp_path, label_column="coarse_label", cache_dir=tmp_path / "cache")
    assert data.class_names == tuple(CLASSES)


# --- settings -----------------------------------------------------------------------------------------------


def test_an_unknown_data_set_gets_its_own_statistics(pets: str, load: Load) -> None:
    settings = load(pets).settings
    pixels = stacked(random_images(6)) / 255
    np.testing.assert_allclose(settings.mean, pixels.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(settings.std, pixels.std(axis=(0, 1, 2)))
    assert (settings.pad, settings.flip, settings.cutout_length) == (4, True, 3)


def test_statistics_are_exact_over_several_chunks() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 2, 3), dtype=np.uint8)
    settings = measured_settings(images)
    np.testing.assert_allclose(settings.mean, (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(settings.std, (images / 255).std(axis=(0, 1, 2)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean", (125.3, 123.0, 113.9)),
        ("std", (0.2, 0.0, 0.2)),
        ("pad", -1),
        ("fill", 256),
        ("cutout_length", 0),
    ],
)
def test_settings_that_cannot_be_meant(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must .*got"):
        DatasetSettings(**({"mean": (0.5,) * 3, "std": (0.2,) * 3} | {field: value}))


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifra10",
            "'cifra10' is unknown, did you mean 'cifar10'; known are cifar10, cifar100, svhn, cifar10_s",
        ),
        ("zzz", "'zzz' is unknown; known are cifar10, .* give image_column and label_column"),
    ],
)
def test_unknown_name(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        load_images(name, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_column": "img"}, r"split 'train' has no column 'img', only picture, kind; .* image_column"),
        (
            {"label_column": "label"},
            r"split 'train' has no column 'label', only picture, kind; .* label_column",
        ),
        ({"image_column": "kind"}, r"column 'kind' holds ClassLabel.*, not images"),
        ({"label_column": "picture"}, r"column 'picture' holds Image.*, not class indices"),
        ({"train_split": "learn"}, r"split 'learn' is missing, there are .*train.*; .* train_split"),
        ({"test_split": "exam"}, r"split 'exam' is missing, there are .*test.*; .* test_split"),
        (
            {"config_name": "big"},
            r"load_dataset\(.*, 'big'\) fails, ValueError: .*check the name, config_name",
        ),
        ({"image_size": 0}, r"image_size must be positive, got 0"),
    ],
)
def test_arguments_that_do_not_fit(pets: str, load: Load, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        load(pets, **kwargs)
    assert f"data set {pets!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (
            datasets.Value("float32"),
            [0.0, 1.0, 2.0],
            r"Value\('float32'\), not class indices or names; .*class_encode",
        ),
        (datasets.Value("bool"), [True, False, True], r"Value\('bool'\), not class indices"),
        (datasets.Array2D((1, 1), "int32"), [[[0]], [[1]], [[2]]], r"Array2D.*, not class indices"),
        (datasets.Value("int64"), [1, 2, 3], r"run from 1 to 3, 3 different; they must be 0 to K - 1"),
        (datasets.Value("int64"), [0, 2, 2], r"run from 0 to 2, 2 different; they must be 0 to K - 1"),
        (datasets.Value("int64"), [0, -1, 1], r"run from -1 to 1, 3 different"),
        (datasets.Value("int64"), [0, None, 1], r"1 labels of column 'kind' are missing"),
        (NAMED, [0, -1, 2], r"split 'train', row 1: label -1 of column 'kind' lies outside 0 to 2"),
    ],
)
def test_labels_that_are_no_class_indices(
    write: Write, load: Load, feature: Any, labels: list[Any], message: str
) -> None:
    write("train", random_images(3), labels, label=feature)
    folder = write("test", random_images(3), labels, label=feature)
    with pytest.raises(DatasetError, match=message):
        load(folder)


def test_labels_by_name_are_numbered_in_alphabetical_order(write: Write, load: Load) -> None:
    write("train", random_images(3), ["owl", "cat", "owl"], label=datasets.Value("string"))
    folder = write("test", random_images(2), ["owl", "cat"], label=datasets.Value("string"))
    data = load(folder)
    assert data.class_names == ("cat", "owl")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([1, 0, 1], [1, 0])
    write("test", random_images(2), ["owl", "dog"], label=datasets.Value("string"))
    with pytest.raises(DatasetError, match=r"split 'test', row 1: label dog .* lies outside cat, owl"):
        load(folder)


def test_a_test_label_that_training_does_not_have(write: Write, load: Load) -> None:
    write("train", random_images(2), [0, 1], label=datasets.Value("int64"))
    folder = write("test", random_images(3), [1, 0, 2], label=datasets.Value("int64"))
    with pytest.raises(DatasetError, match=r"split 'test', row 2: label 2 .* lies outside 0 to 1"):
        load(folder)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damaged",
    [
        {"bytes": b"not an image", "path": None},
        {"bytes": encoded(random_images(1, size=(64, 64))[0])[:3000], "path": None},
        {"bytes": encoded(Image.fromarray(np.full((6, 8), 40000, dtype=np.uint16))), "path": None},
        None,
    ],
    ids=["garbage", "truncated", "16 bits", "missing"],
)
def test_a_damaged_image(write: Write, load: Load, damaged: Any) -> None:
    good = [{"bytes": encoded(image), "path": None} for image in random_images(2)]
    write("train", good, [0, 1])
    folder = write("test", [*good, damaged, good[0]], [0, 1, 1, 0])
    with pytest.raises(DatasetError, match=r"pets', split 'test', row 2: cannot decode column 'picture' \(.*repair"):
        load(folder)


def test_images_of_different_sizes(write: Write, load: Load) -> None:
    write("train", random_images(2) + random_images(1, size=(8, 6)), [0, 1, 2])
    folder = write("test", random_images(1), [0])
    with pytest.raises(
        DatasetError, match=r"'train', row 2: the image is 8 x 6, those before it are 6 x 8 .*image_size"
    ):
        load(folder)


def test_splits_of_different_sizes(write: Write, load: Load) -> None:
    write("train", random_images(2), [0, 1])
    folder = write("test", random_images(1, size=(8, 6)), [0])
    with pytest.raises(DatasetError, match=r"\(6, 8\) in split 'train' and \(8, 6\) in split 'test'.*image_size"):
        load(folder)


def test_an_empty_split(write: Write, load: Load) -> None:
    write("train", random_images(2), [0, 1])
    write("test", [], [])
    folder = write("validation", random_images(2), [1, 0])
    with pytest.raises(DatasetError, match=r"split 'test' is empty, there are .*train"):
        load(folder)
    assert len(load(folder, test_split="validation").test) == 2  # the empty split harms nobody who does not want it


def test_no_such_folder_in_the_mirror(tmp_path: Path) -> None:
    message = r"'cifar10': there is no folder .*uoft-cs.cifar10; give a --data_root DIR .*--dataset cifar10_sample"
    with pytest.raises(DatasetError, match=message):
        load_images("cifar10", data_root=tmp_path, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["./pets", "../pets", "/nowhere/pets", "~/pets", "data/animals/pets"])
def test_a_path_to_nowhere_is_not_looked_for_on_the_hub(load: Load, name: str) -> None:
    with pytest.raises(DatasetError, match=rf"^data set '{re.escape(name)}': there is no folder /.*pets$"):
        load(name)


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"'cifar10': datasets.load_dataset\(.*\) fails, .*check"):
        load_images("cifar10", data_root=tmp_path, cache_dir=tmp_path / "cache")


def test_offline_mode_says_so(tmp_path: Path) -> None:
    message = r"'svhn': the Hugging Face Hub cannot be reached \(OfflineMode.*--data_root DIR.*cifar10_sample"
    with pytest.raises(DatasetError, match=message):
        load_images("svhn", cache_dir=tmp_path)


def test_an_unreachable_hub_is_one_message(tmp_path: Path) -> None:
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    script = (
        "import sys; from amp_plugin.data import load_images;"
        " assert sys.modules.keys().isdisjoint({'datasets', 'evaluate', 'transformers'});"
        " load_images('cifar10')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | hub,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "DatasetError: data set 'cifar10': the Hugging Face Hub cannot be reached" in result.stderr
    assert result.stderr.count("Traceback") == 1
    assert "Retry" not in result.stderr


def test_a_hub_that_does_not_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise HFValidationError("answered, but no")

    def fail(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")

    monkeypatch.setattr(HfApi, "dataset_info", answer)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(DatasetError, match=r"'a/b': .* fails, DatasetNotFoundError: .*check the name, config_name"):
        load_images("a/b", image_column="x", label_column="y", cache_dir=tmp_path)


def test_an_unreachable_hub_leaves_what_was_downloaded(tmp_path: Path, write: Write) -> None:
    names = ("img", "label")
    write("train", random_images(3), [0, 1, 2], names=names)
    folder = Path(write("test", random_images(3), [0, 1, 2], names=names)).rename(tmp_path / "cifar10")
    datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    # A download from the Hub leaves a folder that differs in the name of the repository alone.
    (tmp_path / "cache" / "cifar10").rename(tmp_path / "cache" / "uoft-cs___cifar10")
    data = load_images("cifar10", cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(data.train.images, stacked(random_images(3)))


# --- the cache ----------------------------------------------------------------------------------------------


def test_decodes_once(pets: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(pets)
    monkeypatch.setattr(decode, "_rgb", lambda *_: pytest.fail("decoded again"))
    second = load(pets)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert isinstance(second.train.images.base, np.memmap)
    assert not second.train.images.flags.writeable


def test_new_files_are_decoded_anew(pets: str, write: Write, load: Load) -> None:
    load(pets)
    write("train", random_images(6, seed=9), [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(load(pets).train.images, stacked(random_images(6, seed=9)))


def test_another_size_is_another_array(pets: str, load: Load) -> None:
    assert load(pets).train.images.shape == (6, 6, 8, 3)
    assert load(pets, image_size=5).train.images.shape == (6, 5, 5, 3)
    assert load(pets).train.images.shape == (6, 6, 8, 3)


def flip_a_pixel(content: bytes) -> bytes:
    middle = len(content) - 50
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"something else altogether",
        lambda content: content + b"more",
        flip_a_pixel,
    ],
    ids=["last byte lost", "half lost", "empty", "garbage", "longer", "one bit"],
)
def test_a_damaged_cache_is_rebuilt(damage: Callable[[bytes], bytes], pets: str, load: Load, tmp_path: Path) -> None:
    load(pets)
    for path in arrays(tmp_path):
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert path.read_bytes() != whole
    np.testing.assert_array_equal(load(pets).train.images, stacked(random_images(6)))
    assert path.read_bytes() == whole


def test_an_interrupted_decoding_leaves_nothing(
    pets: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(encoded: dict[str, Any], image_size: int | None) -> np.ndarray:
        calls.append(encoded)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return np.zeros((6, 8, 3), dtype=np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_rgb", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(pets)
    assert [path.suffix for path in (tmp_path / "cache" / "amp_plugin").iterdir() if path.suffix != ".lock"] == []
    np.testing.assert_array_equal(load(pets).train.images, stacked(random_images(6)))


def test_the_array_takes_its_place_when_it_is_whole(
    pets: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(pets)
    (path, *_) = arrays(tmp_path)
    whole = path.read_bytes()
    path.unlink()

    def refuse(source: Path, target: Path) -> None:
        assert source.read_bytes() == whole
        assert (source.parent, target) == (path.parent, path)
        raise OSError("the moment before")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(DatasetError, match="the moment before"):
            load(pets)
    assert not path.exists()
    load(pets)
    assert path.read_bytes() == whole


@pytest.fixture
def rows(pets: str, tmp_path: Path) -> datasets.Dataset:
    return datasets.load_dataset(pets, split="train", cache_dir=str(tmp_path / "cache"))


def forked(target: Callable[..., None], *args: Any) -> Any:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs a system that forks")
    process = multiprocessing.get_context("fork").Process(target=target, args=args)  # type: ignore[attr-defined]
    process.start()
    return process


def test_a_killed_process_does_no_harm(rows: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = partial(decode.decoded_images, rows, "picture", where="pets", image_size=None, cache_dir=tmp_path)
    written = []
    whole = decode._rgb

    def die_at_the_fourth(*args: Any) -> np.ndarray:
        written.append(args)
        if len(written) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_rgb", die_at_the_fourth)
        killed = forked(decoded)
        killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.npy"))
    np.testing.assert_array_equal(decoded(), stacked(random_images(6)))
    assert not list(tmp_path.glob("*.unfinished"))


def test_processes_at_once_decode_once(rows: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = partial(decode.decoded_images, rows, "picture", where="pets", image_size=None, cache_dir=tmp_path)
    count = tmp_path / "count"
    whole = decode._rgb

    def slow(*args: Any) -> np.ndarray:
        with count.open("a") as file:
            file.write("x")
        time.sleep(0.05)
        return whole(*args)

    def save(number: int) -> None:
        np.save(tmp_path / f"seen{number}", decoded())

    monkeypatch.setattr(decode, "_rgb", slow)
    processes = [forked(save, number) for number in range(3)]
    for number, process in enumerate(processes):
        process.join(60)
        assert process.exitcode == 0
        np.testing.assert_array_equal(np.load(tmp_path / f"seen{number}.npy"), stacked(random_images(6)))
    assert count.read_text() == "x" * 6


def test_a_cache_that_cannot_be_written(pets: str, tmp_path: Path, load: Load) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "amp_plugin").write_text("a file where the folder should be")
    with pytest.raises(DatasetError, match=r"'train': cannot keep the decoded images in .*pass a writable cache_dir"):
        load(pets)


# --- parts of a split ---------------------------------------------------------------------------------------


@pytest.fixture
def uneven() -> ImageSplit:
    """Make classes of 10, 20 and 30 images; the first pixel of an image is its number."""
    labels = np.repeat([0, 1, 2], [10, 20, 30])[np.random.default_rng(0).permutation(60)].astype(np.int64)
    images = np.zeros((60, 2, 2, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(60)
    return ImageSplit(images, labels)


def numbers(split: ImageSplit) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("n", [1, 3, 20, 30, 32])
def test_a_subset_is_balanced_and_keeps_labels_with_images(uneven: ImageSplit, n: int) -> None:
    subset = uneven.subset(n, seed=3)
    assert len(subset) == len(set(numbers(subset))) == n
    counts = np.bincount(subset.labels, minlength=3)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(subset.labels, uneven.labels[numbers(subset)])


def test_a_subset_depends_on_the_seed_alone(uneven: ImageSplit) -> None:
    assert numbers(uneven.subset(12, seed=1)) == numbers(uneven.subset(12, seed=1))
    assert numbers(uneven.subset(12, seed=1)) != numbers(uneven.subset(12, seed=2))


def test_every_image_has_its_chance(uneven: ImageSplit) -> None:
    drawn = {number for seed in range(60) for number in numbers(uneven.subset(15, seed=seed))}
    assert drawn == set(range(60))


def test_held_out_images_are_not_trained_on(uneven: ImageSplit) -> None:
    rest, held_out = uneven.split(9, seed=4)
    assert numbers(held_out) == numbers(uneven.subset(9, seed=4))
    assert sorted(numbers(rest) + numbers(held_out)) == list(range(60))
    np.testing.assert_array_equal(rest.labels, uneven.labels[numbers(rest)])


@pytest.mark.parametrize("n", [33, 45, 60])
def test_too_few_images_of_a_class(uneven: ImageSplit, n: int) -> None:
    with pytest.raises(DatasetError, match=r"class 0 has only 10; ask for at most 30"):
        uneven.subset(n)


def test_too_few_images_for_the_remainder() -> None:
    labels = np.repeat([0, 1, 2], [2, 2, 9]).astype(np.int64)
    split = ImageSplit(np.zeros((13, 1, 1, 3), dtype=np.uint8), labels)
    assert np.bincount(split.subset(7).labels).tolist() == [2, 2, 3]
    with pytest.raises(DatasetError, match=r"needs 2.66667 of every class, but class 0 has only 2; .* most 6"):
        split.subset(8)


@pytest.mark.parametrize("n", [0, -1, 61])
def test_a_subset_larger_than_the_split(uneven: ImageSplit, n: int) -> None:
    with pytest.raises(DatasetError, match=f"cannot take {n} of 60 images"):
        uneven.subset(n)


def test_holding_everything_out(uneven: ImageSplit) -> None:
    with pytest.raises(DatasetError, match="holding out all 60 images leaves none"):
        uneven.split(60)


def labelled(n: int, classes: int) -> ImageSplit:
    return ImageSplit(np.zeros((n, 1, 1, 3), np.uint8), np.arange(n, dtype=np.int64) % classes)


@pytest.mark.parametrize(("fraction", "changed"), [(0.2, 200), (0.4, 401), (0.999, 1001), (0.0, 0), (0.001, 1)])
def test_label_noise_changes_exactly_so_many_labels(fraction: float, changed: int) -> None:
    split = labelled(1002, 10)
    noisy = split.with_label_noise(fraction, 10, seed=3)
    assert (noisy.labels != split.labels).sum() == changed
    assert noisy.labels.dtype == np.int64
    assert set(noisy.labels) <= set(range(10))
    assert noisy.images is split.images
    assert split.labels.tolist() == [i % 10 for i in range(1002)], "the split itself stays"


def test_label_noise_is_even_over_examples_and_over_the_other_classes() -> None:
    """Counts of 40,000 changes lie within five standard deviations of those of even chances."""
    split = labelled(100_000, 5)
    noisy = split.with_label_noise(0.4, 5, seed=7)
    changed = noisy.labels != split.labels
    moved = np.bincount(5 * split.labels[changed] + noisy.labels[changed], minlength=25).reshape(5, 5)
    assert moved.diagonal().sum() == 0
    others = moved[~np.eye(5, dtype=bool)]
    np.testing.assert_allclose(others, 2000, atol=5 * 2000**0.5)
    np.testing.assert_allclose(changed.reshape(10, -1).sum(axis=1), 4000, atol=5 * 4000**0.5)


def test_label_noise_depends_on_the_seed_alone_and_on_no_other_draw() -> None:
    split = labelled(500, 10)
    noise = split.with_label_noise(0.2, 10, seed=1).labels
    np.random.default_rng(0).normal(size=9)
    np.testing.assert_array_equal(split.with_label_noise(0.2, 10, seed=1).labels, noise)
    assert (split.with_label_noise(0.2, 10, seed=2).labels != noise).any()
    more = split.with_label_noise(0.4, 10, seed=1).labels
    changed = noise != split.labels
    assert (more[changed] == noise[changed]).all(), "more noise adds to it"
    chosen = np.zeros(500, bool)
    chosen[split.subset_indices(100, seed=1)] = True
    assert 5 < (chosen & changed).sum() < 35, "chosen examples are neither preferred nor spared"
    assert NOISE_STREAM not in (SELECTION_STREAM, *range(10_000)), "which are the choice's stream, and the epochs'"


def test_label_noise_that_changes_nothing_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"label noise of 0\.001 changes no label of 100 images; ask for more"):
        labelled(100, 10).with_label_noise(0.001, 10, seed=1)
    texts = TextSplit(np.array([["a"], ["b"]], dtype=object), np.array([0, 1]))
    assert texts.with_label_noise(0.5, 2, seed=0).labels.tolist() in ([0, 0], [1, 1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2, np.int64), r"images must be uint8 \(N, H, W, 3\)"),
        (np.zeros((2, 4, 4, 3)), np.zeros(2, np.int64), r"images must be uint8 .* float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64), r"labels must be int64 \(2,\).*\(3,\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), r"labels must be int64 .* float64"),
    ],
)
def test_a_split_of_other_arrays(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSplit(images, labels)


# --- the bundled sample and the real thing ------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return load_images("cifar10_sample", cache_dir=tmp_path_factory.mktemp("sample"))


def test_the_sample_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("used the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("used the network"))
    data = load_images("cifar10_sample", data_root="/elsewhere", cache_dir=tmp_path)
    assert data.train.images.shape == (2000, 32, 32, 3)
    assert data.test.images.shape == (500, 32, 32, 3)


def test_the_sample_is_balanced_and_small(sample: ImageData) -> None:
    np.testing.assert_array_equal(np.bincount(sample.train.labels), np.full(10, 200))
    np.testing.assert_array_equal(np.bincount(sample.test.labels), np.full(10, 50))
    assert sample.class_names[3] == "cat"
    folder = ROOT / "amp_plugin" / "data" / "sample"
    assert sum(path.stat().st_size for path in folder.rglob("*.parquet")) < 6e6


def digests(split: ImageSplit) -> list[tuple[bytes, int]]:
    return [
        (hashlib.sha256(image.tobytes()).digest(), int(label))
        for image, label in zip(split.images, split.labels, strict=True)
    ]


@pytest.mark.slow
def test_the_real_cifar10(data_root: Path, tmp_path: Path, sample: ImageData) -> None:
    data = load_images("cifar10", data_root=data_root, cache_dir=tmp_path)
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(data.train.labels), np.full(10, 5000))

    measured = measured_settings(data.train.images)
    np.testing.assert_allclose(np.multiply(measured.mean, 255), [125.3, 123.0, 113.9], atol=0.051)
    np.testing.assert_allclose(np.multiply(measured.std, 255), [63.0, 62.1, 66.7], atol=0.051)
    np.testing.assert_allclose(data.settings.mean, measured.mean, atol=0.051 / 255)
    np.testing.assert_allclose(data.settings.std, measured.std, atol=0.051 / 255)

    for part, whole in ((sample.train, data.train), (sample.test, data.test)):
        chosen = digests(part)
        assert len(set(chosen)) == len(part)
        assert set(chosen) <= set(digests(whole))


def test_a_cache_that_cannot_be_written_names_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DatasetError, match=r"the cache .*cache cannot be written to \(Not a directory\); set HF_HOME to"
    ):
        load_images("cifar10_sample", cache_dir=tmp_path / "file" / "cache")


# --- fingerprints


def test_a_fingerprint_tells_of_every_example_label_and_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 2, 3), dtype=np.uint8)
    labels = np.arange(2500) % 3
    first = ImageSplit(images, labels).fingerprint()
    assert ImageSplit(images.copy(), labels.copy()).fingerprint() == first
    others = []
    for row in (0, 1023, 1024, 2499):
        changed, relabelled = images.copy(), labels.copy()
        changed[row, 1, 0, 2] ^= 1
        relabelled[row] = (relabelled[row] + 1) % 3
        others += [ImageSplit(changed, labels), ImageSplit(images, relabelled)]
    others += [ImageSplit(images[::-1], labels), ImageSplit(images[:-1], labels[:-1])]
    others += [ImageSplit(images.reshape(2500, 4, 1, 3), labels)]
    assert len({first, *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_a_fingerprint_of_texts_tells_where_one_ends() -> None:
    labels = np.array([0, 1])
    splits = [
        TextSplit(np.array(texts, dtype=object), labels)
        for texts in (
            [["ab"], ["c"]],
            [["a"], ["bc"]],
            [["ab", "c"], ["", ""]],
            [["a", "bc"], ["", ""]],
            [["é\ud800"], [""]],
        )
    ]
    assert len({split.fingerprint() for split in splits}) == len(splits)
