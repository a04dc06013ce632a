"""Decode the images of a Hugging Face data set once, into a cached and memory-mapped array.

A cache file is a NumPy ``.npy`` file followed by the CRC-32 of its pixels. The file is written beside its place and
moved there when complete, so a reader finds a whole file or none.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from amp_plugin.data.splits import DatasetError
from amp_plugin.files import in_one_line

if TYPE_CHECKING:
    import datasets

Images = npt.NDArray[np.uint8]

_CRC_BYTES = 4


def decoded_images(
    dataset: datasets.Dataset, column: str, *, where: str, image_size: int | None, cache_dir: Path
) -> Images:
    """Return the images of a column, uint8 (N, H, W, 3), RGB, read-only, from the cache if they are there.

    Height and width become ``image_size`` (bicubic, ignoring the aspect ratio), unless it is None. ``where`` names the
    data set and the split in messages.
    """
    key = hashlib.sha256(repr((dataset._fingerprint, column, image_size)).encode()).hexdigest()[:32]
    path = cache_dir / f"{key}.npy"
    images = _read(path)  # without the lock, because the cache may be a read-only folder
    if images is not None:
        return images
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # one process decodes, the others wait for it
            images = _read(path)
            if images is None:
                _write(path, len(dataset), _decode(dataset, column, where, image_size))
                images = _read(path)
    except OSError as error:
        raise DatasetError(
            f"{where}: cannot keep the decoded images in {cache_dir} ({error}); pass a writable cache_dir"
            " with enough space"
        ) from error
    if images is None:
        raise DatasetError(f"{where}: {path} is not what was just written to it; pass another cache_dir")
    return images


def _read(path: Path) -> Images | None:
    """Map a cache file; return None if it is absent, cut short or damaged."""
    try:
        images = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(-_CRC_BYTES, os.SEEK_END)
            crc = int.from_bytes(file.read(), "little")
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(images) if crc == zlib.crc32(images.data) else None


def _write(path: Path, rows: int, images: Iterator[Images]) -> None:
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file:
            crc = 0
            for index, image in enumerate(images):
                if index == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *image.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(image.data)
                crc = zlib.crc32(image.data, crc)
            file.write(crc.to_bytes(_CRC_BYTES, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _decode(dataset: datasets.Dataset, column: str, where: str, image_size: int | None) -> Iterator[Images]:
    """Yield the images (H, W, 3) in order, all of one size."""
    import datasets

    encoded = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    shape: tuple[int, ...] | None = None
    for row, example in enumerate(encoded):
        file = (example[column] or {}).get("path")
        here = f"{where}, row {row}" + (f" ({file})" if file else "")
        try:
            image = _rgb(example[column], image_size)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            raise DatasetError(
                f"{here}: cannot decode column {column!r} ({type(error).__name__}: {in_one_line(str(error))});"
                " repair or remove that row"
            ) from error
        shape = shape or image.shape
        if image.shape != shape:
            raise DatasetError(
                f"{here}: the image is {image.shape[0]} x {image.shape[1]}, those before it are"
                f" {shape[0]} x {shape[1]} (height x width); pass image_size to resize them all"
            )
        yield image


def _rgb(encoded: dict[str, Any], image_size: int | None) -> Images:
    import datasets
    from PIL import Image

    image = datasets.Image().decode_example(encoded)
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel; convert it to 8 bits first")
    image = image.convert("RGB")
    if image_size is not None:
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(image, dtype=np.uint8)
