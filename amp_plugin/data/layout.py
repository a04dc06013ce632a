"""Check that Hugging Face Datasets has taken from a folder what lies in it: it leaves files out without a word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amp_plugin.data.splits import DatasetError

if TYPE_CHECKING:
    import datasets

# Programs put folders of these names, with images in them, into the user's folders.
_NOT_THE_USERS = ("__MACOSX", ".AppleDouble", ".ipynb_checkpoints", ".thumbnails", ".Trash")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # tell the labels, instead of folders


def check_layout(name: str, builder: datasets.DatasetBuilder, splits: Sequence[str]) -> None:
    """Check that the splits share no file, and that each folder of images is a class.

    Raises:
        DatasetError: They do, or it is not.
    """
    files = {split: [str(file) for file in (builder.config.data_files or {}).get(split, [])] for split in splits}
    first, *others = files
    for other in others:
        if shared := sorted({*files[first]} & {*files[other]}):
            raise DatasetError(
                f"data set {name!r}: {shared[0]!r} is in split {first!r} and in split {other!r}, since its path has the"
                " words of both splits in it; rename the folders or files such that it has one"
            )
    extensions = tuple(getattr(builder, "EXTENSIONS", ()))  # of a folder of images
    if not extensions or any(os.path.basename(file) in _METADATA for of_split in files.values() for file in of_split):
        return
    images = {split: [f for f in of_split if f.lower().endswith(extensions)] for split, of_split in files.items()}
    loaded = {file for of_split in images.values() for file in of_split if os.path.isabs(file)}
    for path in _left_out(Path(str(builder.base_path)), loaded, extensions):
        raise DatasetError(f"data set {name!r}: {_why_left_out(path, extensions)}")
    _check_classes(name, images)


def check_class_names(files: Iterable[tuple[str, str]], column: str) -> None:
    """Check that the files, each after what messages call its split, number the classes of a column alike.

    Datasets would read the numbers of all files by the names in the first, or by those in the data set's card.

    Raises:
        DatasetError: Two files have other names, or other places for them.
    """
    first, names = "", None
    for where, file in files:
        told = _told_class_names(file, column)
        if told is None or told == names:
            continue
        if names is not None:
            theirs, ours = (", ".join(map(str, n[:10])) + (", ..." if len(n) > 10 else "") for n in (told, names))
            raise DatasetError(
                f"{where}: the classes of column {column!r} are {theirs} in {file!r}, and {ours} in {first!r}: the same"
                " number would mean another class; write all files with the same classes in the same order"
            )
        first, names = file, told


def _left_out(root: Path, loaded: set[str], extensions: tuple[str, ...]) -> Iterator[str]:
    """Yield the folders and images on the disk that nothing was loaded from."""
    classes = {os.path.dirname(file) for file in loaded}
    names = {os.path.basename(folder) for folder in classes}
    kept = classes | {str(parent) for folder in classes for parent in Path(folder).parents}
    within = {folder for folder in kept if root in Path(folder).parents}
    for folder in sorted(within | {os.path.dirname(folder) for folder in classes}):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            hidden = entry.name.startswith((".", "__"))
            if entry.is_dir() and entry.path not in kept and entry.name not in _NOT_THE_USERS:
                # Folders of anything may lie beside those of the splits; one split may lack a class of another.
                empty_may_be = hidden or folder not in within or entry.name in names
                if (images := _folder_of_images(entry.path, extensions)) or not empty_may_be:
                    yield images or entry.path
            is_image = not hidden and entry.name.lower().endswith(extensions) and entry.is_file()
            if is_image and folder in classes and entry.path not in loaded:
                yield entry.path


def _folder_of_images(folder: str, extensions: tuple[str, ...]) -> str | None:
    """Return the first folder, of this one and those within, that images lie in."""
    return next((f for f, _, files in os.walk(folder) if any(i.lower().endswith(extensions) for i in files)), None)


def _why_left_out(path: str, extensions: tuple[str, ...]) -> str:
    if os.path.isfile(path):
        return f"datasets leaves out the image {path!r}, whose name it cannot take; rename it"
    if _folder_of_images(path, extensions) is None:
        return f"the folder {path!r} holds no image, so it would be no class; put images into it, or remove it"
    hidden = os.path.basename(path).startswith((".", "__"))
    reason = "is hidden" if hidden else "is a link" if os.path.islink(path) else "has a name that it cannot take"
    return f"datasets leaves out the images in the folder {path!r}, which {reason}; rename the folder, or move it away"


def _check_classes(name: str, images: Mapping[str, Sequence[str]]) -> None:
    """Check that the folders of the images, first of those to train on, tell classes."""
    train = next(iter(images))
    lay_out = f"lay the images out as SPLIT/CLASS/IMAGE, or tell their labels in SPLIT/{_METADATA[0]} (file_name,label)"
    names = {os.path.basename(os.path.dirname(image)) for image in images[train]}
    if len(names) == 1:
        raise DatasetError(
            f"data set {name!r}, split {train!r}: there is one class only, {names.pop()!r}, which is the folder that"
            f" all images lie in; a classifier needs two; {lay_out}"
        )
    folders = sorted({os.path.dirname(image) for of_split in images.values() for image in of_split})
    depths = {folder.replace("\\", "/").count("/"): folder for folder in folders}
    if len(depths) > 1:
        deep, flat = depths[max(depths)], depths[min(depths)]
        why = "a backslash counts as a level, and " if "\\" in deep else ""
        raise DatasetError(
            f"data set {name!r}: the images in {deep!r} lie deeper than those in {flat!r} ({why}datasets then takes no"
            f" folder for a class); {lay_out}"
        )


def _told_class_names(file: str, column: str) -> list[Any] | None:
    """Read the names of the classes that a Parquet or Arrow file on this disk holds for a column, if it does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.endswith(".parquet"):
            schema = pq.read_schema(file)
        elif file.endswith(".arrow"):
            with pa.memory_map(file) as source:
                schema = pa.ipc.open_stream(source).schema
        else:
            return None
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return list(told["names"]) if told["_type"] == "ClassLabel" else None
    except (OSError, ValueError, LookupError, TypeError):  # datasets has read the file, and tells nothing of this
        return None
