"""Images as they lie in folders, tables and archives: found and looked at, without torch.

An image is kept as it was found, a file or the bytes of one, until a client needs it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data import packaged
from fedlora_app.data.tables import TEST_SPLITS, Part, Table, read_local, read_splits
from fedlora_app.discretion import DataError, NoDataError

COLUMNS = ("image", "img", "file_name", "filename", "file", "path", "pixels")
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
IDX = {"train": "train", "test": "t10k"}  # as MNIST and its like name their files
MOST_PIXELS = 89_478_485  # Pillow warns from here on: a few bytes can claim to be as many
PIXEL_COLUMNS = 50  # a csv of more columns is one of pixels


@dataclass(frozen=True)
class Picture:
    """One image: its file, its file's bytes, or its pixels.

    Parameters
    ----------
    source : Path, bytes or uint8 ndarray, shape (height, width) or (height, width, 3)
    place : str
        What errors call it.
    """

    source: Any
    place: str

    def state(self) -> list[object]:
        """Return what tells this image from any other, or from its file at another time."""
        if isinstance(self.source, Path):
            about = self.source.stat()
            return [str(self.source), about.st_size, about.st_mtime_ns]
        data = self.source if isinstance(self.source, bytes) else self.source.tobytes()
        return [hashlib.sha256(data).hexdigest(), *getattr(self.source, "shape", ())]

    def open(self, *, whole: bool = True) -> Any:
        """Return the image of Pillow, turned as its camera was held.

        Parameters
        ----------
        whole : bool (default: True)
            Whether its pixels are read; else only what it says of itself at its beginning.

        Raises
        ------
        DataError
            If it is none, is cut, or claims more than ``MOST_PIXELS``.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        if isinstance(self.source, np.ndarray):
            return Image.fromarray(self.source)
        data = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(data)
                if image.width * image.height > MOST_PIXELS:
                    self._fail(
                        f"expected at most {MOST_PIXELS:,} pixels",
                        f"{image.width} × {image.height}",
                        "make it smaller",
                    )
                if not whole:
                    return image
                image.load()
            return ImageOps.exif_transpose(image)
        except FileNotFoundError as error:
            raise NoDataError(
                self.place, "expected an image here: not there", remedy="correct its path"
            ) from error
        except Image.DecompressionBombError as error:
            self._fail(f"expected at most {MOST_PIXELS:,} pixels", "more", "make it smaller", error)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            self._fail(
                "expected an image that can be read", str(error), "replace or remove it", error
            )

    def _fail(self, kind: str, got: str, remedy: str, cause: BaseException | None = None) -> Any:
        raise DataError(self.place, kind, got, remedy) from cause

    def __repr__(self) -> str:
        if isinstance(self.source, Path):  # the same data may lie elsewhere on another node
            return f"Picture({self.source.name!r}, {self.source.stat().st_size})"
        raw = self.source if isinstance(self.source, bytes) else self.source.tobytes()
        return f"Picture({raw!r})"


def image_splits(name: str, column: str) -> dict[str, Table]:
    """Return the splits of a data set of images.

    Parameters
    ----------
    name : str
        A packaged data set (``packaged:mnist-5k``); a folder with a folder for each class, or with
        ``train`` and perhaps ``test`` of these; a csv or jsonl of paths and labels, a parquet file
        or a folder of ``Dataset.save_to_disk`` with a column of images; idx files as MNIST has
        them; a csv of pixels, labels first or last; or a Hugging Face data set id.
    column : str
        Of the images, or ``auto``.

    Raises
    ------
    FileNotFoundError or ValueError
        If there are no such data, or they are not what is expected.
    """
    path = Path(name).expanduser()
    if name.startswith(packaged.PREFIX):
        return packaged_splits(name)
    splits = local_splits(path) if path.exists() else read_splits(name)
    return {split: _located(table, column) for split, table in splits.items()}


def loose(name: str, column: str) -> Table:
    """Return images that need no label: of a folder, one image, or a table as of ``image_splits``.

    Of a folder all images are taken, those of its folders too.
    """
    path = Path(name).expanduser()
    alone = path.is_file() and path.suffix.lower() in ENDINGS
    if not alone and not (
        path.is_dir() and any(f.suffix.lower() in ENDINGS for f in path.iterdir())
    ):
        return image_splits(name, column)["train"]
    found = [path] if alone else _images_in(path)
    names = [file.relative_to(path.parent if alone else path).as_posix() for file in found]
    return Table({"image": found}, parts=(Part(path, "image", names),))


def packaged_splits(name: str, split: str = "") -> dict[str, Table]:
    """Return ``train`` and ``test`` of a packaged data set, or the ``pretraining`` part alone.

    Of every class a fifth tests, and a fifth is for the packaged model alone.
    """
    file = packaged.image_file(name)
    whole = read_pixels(file)
    labels = np.array(whole.columns["label"])
    parts: dict[str, list[int]] = {"pretraining": [], "test": [], "train": []}
    for label in np.unique(labels):
        rows = np.random.default_rng(int(label)).permutation(np.flatnonzero(labels == label))
        fifth = len(rows) // 5
        parts["pretraining"] += rows[:fifth].tolist()
        parts["test"] += rows[fifth : 2 * fifth].tolist()
        parts["train"] += rows[2 * fifth :].tolist()
    wanted = [split] if split else ["train", "test"]
    return {part: _taken(whole, sorted(parts[part])) for part in wanted}


def local_splits(path: Path) -> dict[str, Table]:
    """Return the splits of a file or folder; one file, or a folder of classes, is ``train``."""
    if path.is_file():
        if _is_idx(path):
            raise DataError(
                path, "expected the folder of the idx files", path.name, "name that instead"
            )
        return {"train": _read_table(path)}
    if idx := _idx_files(path):
        return {split: _read_idx(*files) for split, files in idx.items()}
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    split_folders = {f.name.lower(): f for f in folders}
    if "train" in split_folders and any(f.is_dir() for f in split_folders["train"].iterdir()):
        known = ("train", *TEST_SPLITS)
        return {s: read_classes(split_folders[s]) for s in known if s in split_folders}
    if any(_images_in(folder) for folder in folders):
        return {"train": read_classes(path)}
    return read_local(path)


def read_classes(path: Path) -> Table:
    """Return the images of a folder with a folder for each class.

    Raises
    ------
    DataError
        If the folder of a class holds no image.
    """
    images: list[Path] = []
    labels: list[str] = []
    for folder in sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")):
        found = _images_in(folder)
        if not found:
            raise DataError(
                folder,
                f"expected images ({', '.join(sorted(ENDINGS))}) in the folder of a class",
                "none",
                "add some, or remove the folder",
            )
        images += found
        labels += [folder.name] * len(found)
    names = [file.relative_to(path).as_posix() for file in images]
    return Table({"image": images, "label": labels}, parts=(Part(path, "image", names),))


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file())


def _read_table(path: Path) -> Table:
    if path.name.lower().endswith((".csv", ".csv.gz")):
        with _opened(path) as file:
            first = file.readline()
        if first.count(b",") >= PIXEL_COLUMNS:
            return read_pixels(path)
    return read_local(path)["train"]


def read_pixels(path: Path) -> Table:
    """Return the images of a csv with a row of pixels and a label for each, label first or last.

    Raises
    ------
    DataError
        If that is not what it holds.
    """
    with _opened(path) as file:
        first = file.readline().strip()
    header = not all(cell.strip().strip(b'"').isdigit() for cell in first.split(b","))
    try:
        with _opened(path) as file:
            values = np.loadtxt(file, delimiter=",", skiprows=int(header), dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise DataError(
            path, "expected rows of whole numbers, 0 to 255", str(error), "write it as such"
        ) from error
    names = first.decode("utf-8", "replace").lower().split(",")
    if header:
        first_says, last_says = ("label" in names[i] or "class" in names[i] for i in (0, -1))
    else:
        first_says, last_says = (_like_labels(values[:, i]) for i in (0, -1))
    if first_says == last_says:
        raise DataError(
            path,
            "expected the label of each row of pixels in the first or the last column",
            "both may be" if first_says else "neither can be",
            "write a header that calls it label",
        )
    last = last_says
    labels, pixels = (values[:, -1], values[:, :-1]) if last else (values[:, 0], values[:, 1:])
    side = int(pixels.shape[1] ** 0.5)
    if side * side != pixels.shape[1] or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(
            path,
            "expected square images of pixels 0 to 255, and a label first or last",
            f"{pixels.shape[1]} numbers from {pixels.min()} to {pixels.max()}",
            "write it as such",
        )
    numbers = range(1 + header, 1 + header + len(values))
    squares = pixels.astype(np.uint8).reshape(-1, side, side)
    return Table(
        {"image": list(squares), "label": labels.tolist()}, parts=(Part(path, "line", numbers),)
    )


def _like_labels(column: NDArray[np.int64]) -> bool:
    """Tell whether numbers are those of classes: all of 0 (or 1) to the largest occur."""
    found = np.unique(column)
    whole = len(found) == found[-1] - found[0] + 1 and found[0] in (0, 1)
    return bool(whole and 1 < len(found) <= max(2, len(column) // 2))


def _is_idx(path: Path) -> bool:
    return "-idx" in path.name and "ubyte" in path.name


def _idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return images and labels of each split, where idx files lie here."""
    found = {}
    for split, prefix in IDX.items():
        pair = [
            next(iter(sorted(folder.glob(f"{prefix}-{kind}?idx*-ubyte*"))), None)
            for kind in ("images", "labels")
        ]
        if pair[0] and pair[1]:
            found[split] = (pair[0], pair[1])
    return found if "train" in found else {}


def _read_idx(images: Path, labels: Path) -> Table:
    pixels, values = _idx_array(images, 3), _idx_array(labels, 1)
    if len(pixels) != len(values):
        raise DataError(
            labels, f"expected a label for each of {len(pixels)} images", str(len(values)),
            "fetch both files again",
        )  # fmt: skip
    return Table(
        {"image": list(pixels), "label": values.tolist()},
        parts=(Part(images, "image", range(1, len(pixels) + 1)),),
    )


def _idx_array(path: Path, axes: int) -> NDArray[np.uint8]:
    with _opened(path) as file:
        data = file.read()
    start = 4 + 4 * axes
    shape = np.frombuffer(data[4:start].ljust(4 * axes, b"\0"), ">u4").astype(int)
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) - start != int(np.prod(shape)):
        raise DataError(
            path,
            f"expected an idx file of bytes with {axes} axes",
            f"{len(data)} bytes that begin with {data[:4].hex()}",
            "is it cut off? fetch it again",
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _taken(table: Table, rows: list[int]) -> Table:
    columns = {name: [values[i] for i in rows] for name, values in table.columns.items()}
    (part,) = table.parts
    numbers = [part.numbers[i] for i in rows]
    return Table(columns, table.class_names, (Part(part.path, part.unit, numbers),), table.notes)


def _located(table: Table, column: str) -> Table:
    """Have paths in a table begin where its file lies, and images in it know where they stand."""
    wanted = {column} if column != "auto" else set(COLUMNS)
    folder = Path(table.place(None)[0]).parent
    columns = {
        name: [_at(value, folder, table, row) for row, value in enumerate(values[:])]
        if name.lower() in wanted or name in wanted
        else values
        for name, values in table.columns.items()
    }
    return Table(columns, table.class_names, table.parts, table.notes)


def _at(value: Any, folder: Path, table: Table, row: int) -> Any:
    if isinstance(value, Mapping) and not value.get("bytes"):  # as `datasets` keeps them
        value = value.get("path")
    if isinstance(value, str) and value.strip():
        return folder / value
    if not isinstance(value, bytes | Mapping):
        return value
    place, line = table.place(row)
    return picture(value, ", ".join(filter(None, (str(place), line)))) or value


def picture(value: Any, place: str) -> Picture | None:
    """Return a value of an image column as a picture; None if it is none."""
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):  # as `datasets` and its parquet files keep them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        value = Path(value)
    if isinstance(value, Path):
        return Picture(value, str(value))
    if isinstance(value, bytes) and value:
        return Picture(value, place)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        return Picture(value, place)
    return None
