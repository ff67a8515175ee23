"""The packaged vision model: a small ViT that learns to see on images no client and no test has.

    python -m fedlora_app.models.small_vit

No package of the registry ships a vision model this small, so it is made once, in about a minute,
and kept in the cache (``FEDLORA_CACHE``, by default ``~/.cache/fedlora``). It learns the digits on
a fifth of the packaged MNIST, moved about, and is saved without its head.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_app.data import packaged
from fedlora_app.data.images import packaged_splits
from fedlora_app.models.cache import made_once

NAME = packaged.MADE_HERE
VERSION = 2  # of what is made here
SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "initializer_range": 0.08,  # that of large models leaves one as narrow as this asleep for long
}
MEAN, STD = 0.13, 0.31  # of MNIST
STEPS, BATCH, RATE = 600, 32, 2e-3
SEED = 0


def small_vit() -> Path:
    """Return the folder of the model, which is made if it is not there yet.

    Several processes may ask at once: one makes it, the others wait.

    Raises
    ------
    OSError
        If the cache cannot be written.
    """
    return made_once(f"{NAME}-{VERSION}", _make_and_say)


def _make_and_say(folder: Path) -> None:
    began = time.perf_counter()
    print(f"making {NAME}, once: it learns on images that no client has …",
          file=sys.stderr, flush=True)  # fmt: skip
    make(folder)
    print(f"… in {folder.parent} after {time.perf_counter() - began:.0f} s",
          file=sys.stderr, flush=True)  # fmt: skip


def make(folder: Path, steps: int = STEPS) -> float:
    """Train the model and save it, without a head, as transformers does.

    Parameters
    ----------
    folder : Path
        Made here.
    steps : int (default: ``STEPS``)

    Returns
    -------
    float
        The share of the last hundred batches' images told right.
    """
    import torch
    import transformers
    from torch.nn import functional

    from strategies.surroundings import torch_threads

    table = packaged_splits("packaged:mnist-5k", "pretraining")["pretraining"]
    pixels = torch.from_numpy(np.stack(table.columns["image"])).float()[:, None] / 255
    rng = np.random.default_rng(SEED)
    labels = torch.tensor(table.columns["label"])
    hits: list[float] = []
    # A model this small gains nothing from a second thread, and loses much where cores are busy.
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # transformers takes no other generator
        model: Any = transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, num_labels=10)
        )
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
        model.train()
        for _ in range(steps):
            chosen = torch.from_numpy(rng.integers(len(pixels), size=BATCH))
            shift = rng.integers(-3, 4, size=2).tolist()
            padded = functional.pad(pixels[chosen], (3, 3, 3, 3))
            batch = torch.roll(padded, shift, dims=(2, 3))[..., 3:-3, 3:-3]
            logits = model(pixel_values=(batch - MEAN) / STD).logits
            loss = functional.cross_entropy(logits, labels[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            hits.append(float((logits.argmax(1) == labels[chosen]).float().mean()))
    model.vit.save_pretrained(str(folder))
    processor = transformers.ViTImageProcessorPil(
        size={"height": SIZES["image_size"], "width": SIZES["image_size"]},
        image_mean=[MEAN],
        image_std=[STD],
    )
    processor.save_pretrained(str(folder))
    return float(np.mean(hits[-100:]))


if __name__ == "__main__":
    print(small_vit())
