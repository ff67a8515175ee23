"""What is trained: replace the model and the data by yours; the rest of the project may stay.

Here it is a small network on scikit-learn's 8 × 8 digits, so that the project runs as it is.
"""

from functools import lru_cache

import torch
from flwr.app import Context
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SCALE = 2.0  # of the adapter, s in W0 + s·B A: lora_alpha = s · r

Rows = tuple[Tensor, Tensor]  # images and labels


def make_model(rank: int) -> PeftModel:
    """Return the model with LoRA of this rank on its hidden layers; its head is trained whole."""
    torch.manual_seed(0)  # the same frozen weights on every node
    base = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    config = LoraConfig(
        r=rank, lora_alpha=int(SCALE * rank), target_modules=["1", "3"], modules_to_save=["5"]
    )
    return get_peft_model(base, config)


@lru_cache(maxsize=1)
def digits() -> tuple[Rows, Rows]:
    """Return training and test rows."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=0)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return (x.float(), y), (x_test.float(), y_test)


def own_rows(context: Context) -> Rows:
    """Return a node's own rows: on a SuperNode those of its data-path, else its share of all."""
    node = context.node_config
    if "data-path" in node:  # of a real site, saved with torch.save((images, labels), path)
        return tuple(torch.load(str(node["data-path"]), weights_only=True))
    images, labels = digits()[0]
    mine = slice(int(node["partition-id"]), None, int(node["num-partitions"]))
    return images[mine], labels[mine]


def train(model: PeftModel, rows: Rows, steps: int, learning_rate: float) -> float:
    """Train and return the mean loss."""
    images, labels = rows
    # Made after the adapter came in: where the rank changes, the parameters are new ones.
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), learning_rate)
    losses = []
    for _ in range(steps):
        batch = torch.randint(0, len(labels), (32,))
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def test(model: PeftModel, rows: Rows) -> dict[str, float]:
    """Return loss and accuracy."""
    images, labels = rows
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"loss": cross_entropy(logits, labels).item(), "accuracy": accuracy}
