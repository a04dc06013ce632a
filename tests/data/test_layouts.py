"""Test what users have on their disks: each layout is loaded whole, or one line names the data set and what to do."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from image_folders import SPLITS, picture, write_folder
from PIL import Image

from amp_plugin.data import DatasetError, ImageData, load_images, load_texts
from amp_plugin.data.settings import measured_settings

Make = Callable[[Path], object]
MakeRows = Callable[[], Dataset]


def load(folder: Path, **options: Any) -> ImageData:
    given = {"image_column": "image", "label_column": "label", "cache_dir": folder.parent / "cache"}
    return load_images(str(folder), **(given | options))


def refused(load_it: Callable[[], object], folder: Path) -> str:
    """Return why a data set is refused, after its name and in one line; its folder is called ROOT."""
    with pytest.raises(DatasetError) as raised:
        load_it()
    said = str(raised.value)
    assert said.startswith(f"data set {str(folder)!r}")
    assert "\n" not in said
    return said.removeprefix(f"data set {str(folder)!r}").replace(str(folder), "ROOT")


# --- folders of images


def with_class(name: str, *, images: int = 1, split: str = "train") -> Make:
    """Make a folder of cats and dogs, and of another class in one split."""

    def make(folder: Path) -> None:
        write_folder(folder)
        write_folder(folder, {split: [name]}, images)

    return make


def with_link(folder: Path) -> None:
    write_folder(folder)
    elsewhere = write_folder(folder.parent / "elsewhere", {"owls": [""]})
    (folder / "train" / "owl").symlink_to(Path(elsewhere) / "owls")


def with_notes_for_a_class(folder: Path) -> None:
    with_class("owl", images=0)(folder)
    (folder / "train" / "owl" / "notes.txt").write_text("no image")


def with_an_image_of_two_lines(folder: Path) -> None:
    write_folder(folder)
    picture(9).save(folder / "train" / "cat" / "a\nb.png")


def without_classes(folder: Path) -> None:
    write_folder(folder, [""])


def split_in_class(folder: Path) -> None:
    write_folder(folder, {"cat": SPLITS, "dog": SPLITS})


def csv_of_paths(folder: Path) -> None:
    write_folder(folder, {"images": [""]})
    for split in SPLITS:
        (folder / f"{split}.csv").write_text("image,label\nimages/0.png,0\nimages/1.png,1\n")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            with_class("a\nb"),
            r": datasets leaves out the images in the folder 'ROOT/train/a\nb', which has a name that",
        ),
        (with_class("a::b"), ": datasets leaves out the images in the folder 'ROOT/train/a::b', which has a name that"),
        (with_class("group/a\nb"), r": datasets leaves out the images in the folder 'ROOT/train/group/a\nb', which"),
        (
            with_class(".net"),
            ": datasets leaves out the images in the folder 'ROOT/train/.net', which is hidden; rename",
        ),
        (with_class("__main"), ": datasets leaves out the images in the folder 'ROOT/train/__main', which is hidden"),
        (with_link, ": datasets leaves out the images in the folder 'ROOT/train/owl', which is a link; rename the"),
        (
            with_an_image_of_two_lines,
            r": datasets leaves out the image 'ROOT/train/cat/a\nb.png', whose name it cannot",
        ),
        (with_class("owl", images=0), ": the folder 'ROOT/train/owl' holds no image, so it would be no class; put"),
        (with_notes_for_a_class, ": the folder 'ROOT/train/owl' holds no image, so it would be no class"),
        (with_class("test"), ": 'ROOT/train/test/0.png' is in split 'train' and in split 'test', since its path has"),
        (with_class("pre-test"), ": 'ROOT/train/pre-test/0.png' is in split 'train' and in split 'test'"),
        (with_class("train", split="test"), ": 'ROOT/test/train/0.png' is in split 'train' and in split 'test'"),
        (
            with_class("birds/owl"),
            ": the images in 'ROOT/train/birds/owl' lie deeper than those in 'ROOT/train/dog' (da",
        ),
        (
            with_class("a\\b"),
            r": the images in 'ROOT/train/a\\b' lie deeper than those in 'ROOT/train/dog' (a backslash",
        ),
        (with_class("owl", split="test"), ", split 'test', row 8: class owl of column 'label' does not occur in the"),
        (lambda folder: write_folder(folder, ["cat"]), ", split 'train': there is one class only, 'cat', which is the"),
        (lambda folder: write_folder(folder, ["cat"], 1), ", split 'train': there is one class only, 'cat', which is"),
        (
            lambda folder: write_folder(folder, {"train": ["cat"], "test": ["cat", "dog"]}),
            ", split 'train': there is one class only, 'cat', which is the folder that all images lie in; a classifier"
            " needs two; lay the images out as SPLIT/CLASS/IMAGE, or tell their labels in SPLIT/metadata.csv (",
        ),
        (without_classes, ", split 'train': there is one class only, 'train', which is the folder that all images lie"),
        (split_in_class, ", split 'train': there is one class only, 'train', which is the folder that all images lie"),
        (csv_of_paths, ", split 'train': column 'image' holds Value("),
    ],
)
def test_a_folder_of_images_is_loaded_whole_or_not_at_all(tmp_path: Path, make: Make, said: str) -> None:
    make(tmp_path / "pets")
    told = refused(lambda: load(tmp_path / "pets"), tmp_path / "pets")
    assert told.startswith(said)


def with_folders_of_programs(folder: Path) -> None:
    write_folder(folder)
    for name in (".ipynb_checkpoints", "__MACOSX", ".thumbnails", ".cache", "__pycache__"):
        (folder / "train" / name).mkdir()
    picture(9).save(folder / "train" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "train" / "cat" / "Thumbs.db").write_text("no image")
    (folder / "train" / "cat" / "._0.png").write_text("no image")
    (folder / "README.md").write_text("Pets.\n")


def with_other_folders(folder: Path) -> None:
    write_folder(folder)
    write_folder(folder, {"docs": [], "raw": ["a\nb"]})
    (folder / "docs").mkdir()


def with_an_empty_test_folder(folder: Path) -> None:
    write_folder(folder, {"train": ["cat", "dog"], "test": ["cat"]})
    (folder / "test" / "dog").mkdir()


@pytest.mark.parametrize(
    ("make", "classes", "trained"),
    [
        (write_folder, ("cat", "dog"), [4, 4]),
        (with_folders_of_programs, ("cat", "dog"), [4, 4]),
        (with_other_folders, ("cat", "dog"), [4, 4]),
        (with_an_empty_test_folder, ("cat", "dog"), [4, 4]),
        (with_class("owl"), ("cat", "dog", "owl"), [4, 4, 1]),
        (lambda f: write_folder(f, ["d[o]g", "a*b", "é", " x", "{y}", "$z^$"]), None, [4] * 6),
        (lambda f: write_folder(f, ["animals/cat", "animals/dog", "things/car"]), ("car", "cat", "dog"), [4, 4, 4]),
    ],
)
def test_folders_that_are_loaded(tmp_path: Path, make: Make, classes: Any, trained: list[int]) -> None:
    make(tmp_path / "pets")
    data = load(tmp_path / "pets")
    assert classes in (None, data.class_names)
    assert np.bincount(data.train.labels).tolist() == trained


def test_a_folder_without_splits(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    write_folder(tmp_path, {"pets": ["cat", "dog"]})
    (pets / "docs").mkdir()  # which is no class
    assert load(pets, test_split="train").class_names == ("cat", "dog")
    write_folder(tmp_path, {"pets": ["a::b"]})
    said = refused(lambda: load(pets, test_split="train"), pets)
    assert said.startswith(
        ": datasets leaves out the images in the folder 'ROOT/a::b', which has a name that it cannot"
    )


def test_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_class("a\nb")(tmp_path / "pets")
    (tmp_path / "link").symlink_to(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    for name in ("pets", "./pets", "link", "pets/../pets"):
        with pytest.raises(DatasetError, match=r"leaves out the images in the folder '.*/train/a\\nb'"):
            load_images(name, image_column="image", label_column="label", cache_dir=tmp_path / "cache")


def test_labels_in_a_file_beside_the_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", [""])
    for split in SPLITS:
        rows = "".join(f"{i}.png,{i % 2},{i / 2}\n" for i in range(4))
        (tmp_path / "pets" / split / "metadata.csv").write_text(f"file_name,label,weight\n{rows}")
    assert load(tmp_path / "pets").train.labels.tolist() == [0, 1, 0, 1]
    said = refused(lambda: load(tmp_path / "pets", label_column="weight"), tmp_path / "pets")
    assert said.startswith(", split 'train': column 'weight' holds Value('float64'), not class indices or names; name")


def test_a_script_is_not_run(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    (tmp_path / "pets" / "pets.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "scripts are no longer supported" in refused(lambda: load(tmp_path / "pets"), tmp_path / "pets")
    assert not (tmp_path / "ran").exists()


# --- files of rows

NAMES = ClassLabel(names=["a", "b", "c"])


def rows(labels: Any = None, label: Any = NAMES, images: list[Any] | None = None, **more: Any) -> Dataset:
    labels = [0, 1, 2] if labels is None else labels
    columns = {"image": images or [picture(i) for i in range(len(labels))], "label": labels}
    return Dataset.from_dict(columns, Features({"image": more.get("image") or datasets.Image(), "label": label}))


def write_rows(folder: Path, train: Dataset, test: Dataset) -> Path:
    for split, of_split in zip(SPLITS, (train, test), strict=True):
        of_split.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


WHOLE = Value("int64")
BOTH = List(NAMES)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (
            partial(rows, [0] * 3, WHOLE),
            partial(rows, [0] * 3, WHOLE),
            ", split 'train': column 'label' has one class only, 0; a classi",
        ),
        (
            partial(rows, [1] * 3),
            partial(rows, [1]),
            ", split 'train': column 'label' has one class only, b; a classifier needs two",
        ),
        (partial(rows, [0]), partial(rows), ", split 'train': column 'label' has one class only, a"),
        (
            partial(rows, [0, 1]),
            partial(rows),
            ", split 'test', row 2: class c of column 'label' does not occur in the split to train",
        ),
        (
            partial(rows),
            partial(rows, [-1] * 3),
            ", split 'test': all labels of column 'label' are -1, which stands for no label; name",
        ),
        (
            partial(rows, [-1] * 3),
            partial(rows),
            ", split 'train': all labels of column 'label' are -1, which stands for no label",
        ),
        (
            partial(rows, [0, 1, -1]),
            partial(rows),
            ", split 'train', row 2: label -1 of column 'label' lies outside 0 to 2; drop",
        ),
        (
            partial(rows, [None] * 3, WHOLE),
            partial(rows),
            ", split 'train': all labels of column 'label' are missing; name another",
        ),
        (
            partial(rows),
            lambda: rows().remove_columns("label"),
            ", split 'test': all labels of column 'label' are missing; name",
        ),
        (
            partial(rows),
            partial(rows, label=ClassLabel(names=["c", "b", "a"])),
            ", split 'test': the classes of column 'label' are c, b, a in 'ROOT/data/test-00000-of-00001.parquet', and"
            " a, b, c in 'ROOT/data/train-00000-of-00001.parquet': the same number would mean another class; write all",
        ),
        (
            partial(rows),
            partial(rows, [0, 1], ClassLabel(names=["a", "b"])),
            ", split 'test': the classes of column 'label' are a, b in",
        ),
        (partial(rows, [[0, 1]] * 3, BOTH), partial(rows, [[0]], BOTH), ", split 'train': column 'label' holds List("),
        (
            partial(rows, images=["0.png"] * 3, image=Value("string")),
            partial(rows, images=["0.png"] * 3, image=Value("string")),
            ", split 'train': column 'image' holds Value('string'), not images; name a datasets.Image column with"
            " image_column, or cast it; where these are paths, call the file metadata.csv and the column file_name",
        ),
        (
            partial(rows, images=[Image.new("RGB", (8, 8))] * 3),
            partial(rows),
            ", split 'train': all training images are of one and the same colour, which tells no classes apart; look",
        ),
    ],
)
def test_rows_that_nothing_can_be_learned_from(tmp_path: Path, train: MakeRows, test: MakeRows, said: str) -> None:
    folder = write_rows(tmp_path / "pets", train(), test())
    assert refused(lambda: load(folder), folder).startswith(said)


def test_saved_data_sets_that_number_their_classes_otherwise(tmp_path: Path) -> None:
    DatasetDict(train=rows(), test=rows()).save_to_disk(str(tmp_path / "same"))
    if "_fingerprint" in datasets.load_dataset(str(tmp_path / "same"), split="train").column_names:
        pytest.skip("this version of datasets takes what describes a saved data set for its rows")
    assert load(tmp_path / "same").class_names == ("a", "b", "c")
    other = rows(label=ClassLabel(names=["c", "b", "a"]))
    DatasetDict(train=rows(), test=other).save_to_disk(str(tmp_path / "other"))
    said = refused(lambda: load(tmp_path / "other"), tmp_path / "other")
    assert said.startswith(", split 'test': the classes of column 'label' are c, b, a in 'ROOT/test/data-00000-of-0000")


def test_a_card_may_name_the_classes_otherwise(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "pets", rows(), rows())
    names = "".join(f"\n          '{number}': {name}" for number, name in enumerate(("cat", "dog", "owl")))
    features = (
        f"\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n        names:{names}"
    )
    (folder / "README.md").write_text(f"---\ndataset_info:\n  features:{features}\n---\n")
    assert load(folder).class_names == ("cat", "dog", "owl")


def test_bytes_of_image_files_are_images(tmp_path: Path) -> None:
    encoded = []
    for seed in range(3):
        file = io.BytesIO()
        picture(seed).save(file, "PNG")
        encoded.append(file.getvalue())
    expected = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    as_bytes = rows(images=encoded, image=Value("binary"))
    struct = {"bytes": Value("binary"), "path": Value("string")}
    as_struct = rows(images=[{"bytes": file, "path": "0.png"} for file in encoded], image=struct)
    for name, of_split in (("bytes", as_bytes), ("struct", as_struct)):
        data = load(write_rows(tmp_path / name, of_split, of_split))
        np.testing.assert_array_equal(data.train.images, expected)


def test_several_columns_of_images_and_of_labels(tmp_path: Path) -> None:
    features = Features({name: datasets.Image() for name in ("left", "right")} | {"coarse": NAMES, "fine": WHOLE})
    left, right = [picture(i) for i in range(4)], [picture(i, (4, 6)) for i in range(4)]
    both = Dataset.from_dict({"left": left, "right": right, "coarse": [0, 1, 0, 1], "fine": [3, 2, 1, 0]}, features)
    folder = write_rows(tmp_path / "pets", both, both)
    data = load(folder, image_column="right", label_column="fine")
    assert (data.train.images.shape, data.train.labels.tolist()) == ((4, 4, 6, 3), [3, 2, 1, 0])
    assert load(folder, image_column="left", label_column="coarse").class_names == ("a", "b", "c")
    said = refused(lambda: load(folder), folder)
    assert said == (
        ", split 'train' has no column 'image', only left, right, coarse, fine; name the right one with image_column"
    )


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ("a,0\nb,0\n", "a,0\n", ", split 'train': column 'label' has one class only, 0; a classifier needs two"),
        ("a,x\nb,x\n", "a,x\n", ", split 'train': column 'label' has one class only, x; a classifier needs two"),
        ("a,0\nb,1\n", "a,-1\n", ", split 'test': all labels of column 'label' are -1, which stands for no label"),
        (
            "a,0\nb,9223372036854775808\n",
            "a,0\n",
            ", split 'train': label 9223372036854775808 of column 'label' is too",
        ),
        (
            "a,0\nb,1\nc,\n",
            "a,0\n",
            ", split 'train': 1 labels of column 'label' are missing, the first in row 2; drop",
        ),
        ("a,0\nb,1\n", "a,\n", ", split 'test': all labels of column 'label' are missing; name another split or"),
    ],
)
def test_texts_that_nothing_can_be_learned_from(tmp_path: Path, train: str, test: str, said: str) -> None:
    (tmp_path / "pets").mkdir()
    for split, of_split in zip(SPLITS, (train, test), strict=True):
        (tmp_path / "pets" / f"{split}.csv").write_text(f"text,label\n{of_split}")
    texts = tmp_path / "pets"
    told = refused(lambda: load_texts(str(texts), text_column="text", cache_dir=tmp_path / "cache"), texts)
    assert told.startswith(said)


# --- channels


def test_a_channel_that_is_the_same_everywhere_becomes_zero(tmp_path: Path) -> None:
    images = np.stack([np.asarray(picture(i)) for i in range(4)])
    images[..., 1] = 77  # whose variance, as a difference of two sums, would not be 0 to the last bit
    settings = measured_settings(images)
    assert settings.std[1] == 1
    assert settings.mean[1] == pytest.approx(77 / 255)
    np.testing.assert_allclose(settings.std[::2], (images / 255).std(axis=(0, 1, 2))[::2])
    with pytest.raises(ValueError, match="all training images are of one and the same colour"):
        measured_settings(np.full((2, 4, 4, 3), 9, np.uint8))
