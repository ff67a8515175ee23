"""The model, the images, and a plain training loop.

A small network is pretrained on upright digits; the clients' digits lie on their side.
"""

from copy import deepcopy
from functools import lru_cache

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

RANK = 8  # the largest of a client
SCALE = 2.0  # of the adapter, s in W0 + s·B A: lora_alpha = s · r
PRETRAINING, TRAINING, TEST = slice(0, 800), slice(800, 1400), slice(1400, 1797)


@lru_cache(maxsize=1)
def images() -> tuple[Tensor, Tensor]:
    """Return 1,797 digits, shape (1797, 8, 8), in a fixed order, and their labels."""
    digits = load_digits()  # comes with scikit-learn
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = torch.from_numpy(digits.images[order] / 16).float()
    return pixels, torch.from_numpy(digits.target[order])


def load_data(partition_id: int, num_partitions: int) -> tuple[Tensor, Tensor]:
    """Return a client's own digits, turned to the left by 90 degrees, and their labels."""
    pixels, labels = (t[TRAINING][partition_id::num_partitions] for t in images())
    return pixels.rot90(1, (1, 2)), labels


def load_test_data() -> tuple[Tensor, Tensor]:
    """Return the server's test digits, turned like those of the clients."""
    pixels, labels = images()
    return pixels[TEST].rot90(1, (1, 2)), labels[TEST]


@lru_cache(maxsize=1)
def pretrained() -> nn.Sequential:
    """Return a network trained on upright digits; a second's work, the same everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    pixels, labels = (t[PRETRAINING] for t in images())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        rows = torch.randint(0, len(labels), (64,))
        cross_entropy(model(pixels[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def make_model(rank: int) -> PeftModel:
    """Return the pretrained network with a LoRA adapter on every layer."""
    base = deepcopy(pretrained())
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["1", "3", "5"])
    return get_peft_model(base, config)


def train(model: PeftModel, data: tuple[Tensor, Tensor], steps: int, lr: float) -> float:
    """Train the adapter and return the mean loss."""
    pixels, labels = data
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(steps):
        rows = torch.randint(0, len(labels), (32,), generator=generator)
        loss = cross_entropy(model(pixels[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


@torch.inference_mode()
def test(model: PeftModel, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    pixels, labels = data
    logits = model(pixels)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return cross_entropy(logits, labels).item(), accuracy
