"""Fine-tune a vision model to classify images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_app.data import images
from fedlora_app.data.columns import has_column, named_column
from fedlora_app.data.kept import fingerprint
from fedlora_app.data.labels import Fail
from fedlora_app.data.tables import Table
from fedlora_app.discretion import DataError
from fedlora_app.tasks import snippets
from fedlora_app.tasks.base import About, Indices, Rows, register_task
from fedlora_app.tasks.classification import Classification

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

READ_WHOLE = 20_000  # images at most, at the door: about 2 ms each for photos of 500 pixels a side
CHANNELS = {1: "L", 3: "RGB"}  # how Pillow calls them


@register_task
class ImageClassification(Classification):
    """Images by their label: any ``AutoModelForImageClassification``.

    The model's own image processor decides size, crop and normalisation. Grey images become
    coloured, or the other way round, as the model has channels. Statistics of batch
    normalisation stay those of pretraining: clients would each drift to their own.
    """

    name = pipeline = "image-classification"
    reads = frozenset({"data.image-column"})
    asked_column = "image"
    key = "data.image-column"

    # ----- rows

    def splits(self, name: str) -> Mapping[str, Table]:
        """Return the tables of images by split."""
        return images.image_splits(name, self.config.data.image_column)

    def own_table(self, path: str) -> Table:
        """Return the images of a node's own file or folder."""
        from pathlib import Path

        from fedlora_app.discretion import NoDataError

        if not Path(path).expanduser().exists():
            raise NoDataError(
                Path(path).expanduser().absolute(),
                "expected this node's data here: not there",
                remedy="correct data-path in its node config",
            )
        return images.image_splits(path, self.config.data.image_column)["train"]

    def asked_table(self, path: str) -> Table:
        """Return the images of a folder, whether or not it has a folder for each class."""
        return images.loose(path, self.config.data.image_column)

    def item_columns(self, table: Table, label: str) -> dict[str, str]:
        """Return the column of the images."""
        wanted = self.config.data.image_column
        return {"image": named_column(table, wanted, images.COLUMNS, self.key)}

    def knows_items(self, table: Table) -> bool:
        """Tell whether there is a column of images."""
        return has_column(table, self.config.data.image_column, images.COLUMNS)

    def item(self, values: Mapping[str, Any], fail: Fail) -> images.Picture:
        """Return the picture; refuse what is none."""
        ((column, value),) = values.items()
        found = images.picture(value, f"an image in column {column!r}")
        if found is None:
            fail(
                "expected an image: a path, or its bytes",
                f"{type(value).__name__} in column {column!r}",
                f"set {self.key}, or task = 'text-classification' for texts",
            )
        return found

    def look_at(self, rows: Rows) -> None:
        """Read every image once, or of very many the beginning; a broken or huge one is named."""
        each = _every(len(rows))
        for number, picture in enumerate(rows.items):
            if not isinstance(picture.source, np.ndarray):
                picture.open(whole=number % each == 0).close()

    def show(self, rows: Rows) -> list[str]:
        """Return the size of the first image and its label."""
        if not len(rows):
            return []
        first = rows.items[0].open()
        label = rows.about["labels"][rows.targets[0]]
        lines = [f"  first: {first.width} × {first.height} pixels, {first.mode} → {label}"]
        if (each := _every(len(rows))) > 1:
            lines.append(
                f"  looked at: one image in {each} as a whole, of the others the beginning; one "
                "that is cut off further on stops the client that holds it, by name"
            )
        return lines

    # ----- the model

    @cached_property
    def processor(self) -> Any:
        """The image processor of the model, that of Pillow.

        Raises
        ------
        ValueError
            If the model has none.
        """
        from fedlora_app.models.pretrained import locate

        try:
            return _processor(*locate(self.config.model.name))
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]
            raise ValueError(
                f"model.name = {self.config.model.name!r}: expected its image processor "
                f"(preprocessor_config.json), which says size and normalisation: {reason}; save it "
                "beside config.json, or name a model for images"
            ) from error

    def save_encoder(self, folder: Path) -> None:
        """Write the image processor."""
        self.processor.save_pretrained(folder)

    def read_encoder(self, folder: Path) -> None:
        """Take the image processor that was written."""
        if (folder / "preprocessor_config.json").exists():
            self.processor = _processor(str(folder), True)

    def encode(self, rows: Rows) -> Pixels:
        """Return the pixels as the model's processor cuts them, still as bytes."""
        import torch

        processor, mode = self.processor, CHANNELS[self._channels]
        labels: NDArray[np.int64] = rows.targets
        found: list[NDArray[np.uint8]] = []
        for picture in rows.items:
            pixels = np.asarray(_in_mode(picture.open(), mode))
            done = processor(
                pixels[..., None] if pixels.ndim == 2 else pixels,
                do_rescale=False,
                do_normalize=False,
                input_data_format="channels_last",
                return_tensors="np",
            )["pixel_values"][0]
            if found and done.shape != found[0].shape:
                raise DataError(
                    picture.place,
                    f"expected an image of {found[0].shape} after the model's image processor",
                    str(done.shape),
                    "use a processor that crops, or images of one shape",
                )
            found.append(np.clip(np.rint(done), 0, 255).astype(np.uint8))
        stack = np.stack(found) if found else np.zeros((0, self._channels, 1, 1), np.uint8)
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        plain = not processor.do_normalize
        mean, std = ([0.0], [1.0]) if plain else (processor.image_mean, processor.image_std)
        return Pixels(
            torch.from_numpy(stack), labels, float(factor),
            torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1),
        )  # fmt: skip

    def fingerprint(self, rows: Rows) -> bytes | None:
        """Return the pixels, or the state of their files, and of the image processor's."""
        return fingerprint(rows, self.config.model.name)

    def restored(self, fields: Mapping[str, Any]) -> Pixels:
        """Return pixels that ``encode`` returned before."""
        return Pixels(**fields)

    @cached_property
    def _channels(self) -> int:
        from fedlora_app.models.pretrained import read_settings

        return int(getattr(read_settings(self.config.model.name), "num_channels", 3))

    def model(
        self, about: About, *, seed: int, precision: str = "float32", shapes_only: bool = False
    ) -> nn.Module:
        """Return the model with its head; see ``models.build_classifier``."""
        from torch.nn.modules.batchnorm import _BatchNorm

        from fedlora_app.models.loading import build_classifier

        model: Any = build_classifier(
            self.config.model,
            num_labels=len(about["labels"]),
            seed=seed,
            precision=precision,
            shapes_only=shapes_only,
            auto="AutoModelForImageClassification",
        )
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train = MethodType(_stay, module)  # type: ignore[method-assign]
        found: nn.Module = model
        return found

    def usage(self, merged: bool, about: About) -> str:
        """Return how to classify an image."""
        if merged:
            return snippets.PIPELINE.format(task=self.name, item='"photo.png"')
        return snippets.IMAGES.format(count=len(about["labels"]))

    def problems(self, model: nn.Module, rows: Rows) -> list[str]:
        """Return what of the processor, its size and the model does not go together."""
        if self._channels not in CHANNELS:
            return [
                f"model.name = {self.config.model.name!r}: expected 1 or 3 channels, its config "
                f"says {self._channels}; name another model"
            ]
        height, width = self.encode(rows.take([0])).pixels.shape[-2:]
        # Convolutions take any size, whatever their config says; a table of positions does not.
        fixed = any("position" in name for name, _ in model.named_parameters())
        wanted = getattr(model.config, "image_size", None) if fixed else None
        sides = tuple(wanted) if isinstance(wanted, list | tuple) else (wanted, wanted)
        if wanted is not None and (height, width) != sides:
            return [
                f"model.name = {self.config.model.name!r}: its image processor makes {height} × "
                f"{width} pixels, and the model takes {sides[0]} × {sides[1]}; correct size in "
                "preprocessor_config.json"
            ]
        return []


@dataclass(frozen=True)
class Pixels:
    """n images of one shape, as bytes; they become numbers batch by batch.

    Parameters
    ----------
    pixels : uint8 Tensor, shape (n, channels, height, width)
    labels : ndarray of int64, shape (n,)
        Label ids.
    factor : float
        On the bytes.
    mean, std : Tensor, shape (channels, 1, 1)
        Subtracted, then divided by.
    """

    pixels: Tensor
    labels: NDArray[np.int64]
    factor: float
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """One for each image: all cost the same."""
        return np.ones(len(self), np.int64)

    def take(self, indices: Sequence[int] | Indices) -> Pixels:
        """Return the rows at ``indices``, in that order."""
        import torch

        chosen = np.asarray(indices, dtype=np.int64)
        pixels = self.pixels[torch.from_numpy(chosen)]
        return Pixels(pixels, self.labels[chosen], self.factor, self.mean, self.std)

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some images as the model takes them, normalised."""
        import torch

        chosen = np.asarray(indices, dtype=np.int64)
        values = self.pixels[torch.from_numpy(chosen)].float() * self.factor
        labels = torch.from_numpy(self.labels[chosen])
        return {"pixel_values": (values - self.mean) / self.std, "labels": labels}


def _processor(source: str, local: bool) -> Any:
    import transformers

    return transformers.AutoImageProcessor.from_pretrained(
        source, backend="pil", trust_remote_code=False, local_files_only=local
    )


def _every(rows: int) -> int:
    """Return of how many images one is read as a whole at the door, so that it takes a minute."""
    return -(-rows // READ_WHOLE)


def _in_mode(image: Any, mode: str) -> Any:
    """Return an image in grey or colour, what is transparent on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        from PIL import Image

        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # more than 8 bits of grey
        from PIL import Image

        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max() > 1 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * 255 / top), 0, 255).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stay in evaluation mode."""
    del mode
    return module
