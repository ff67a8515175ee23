"""Flower strategies for federated LoRA fine-tuning when clients differ."""

from strategies.checkpoint import save_adapter
from strategies.presets import (
    AdaptiveSampling,
    AutoRank,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Replication,
)
from strategies.strategy import FedLoRA

__all__ = [
    "AdaptiveSampling",
    "AutoRank",
    "FLoRA",
    "FedLoRA",
    "FlexLoRA",
    "HetLoRA",
    "Replication",
    "save_adapter",
]
