"""Flower strategies for federated LoRA fine-tuning when clients differ."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.checkpoint import save_adapter
    from strategies.presets import (
        AdaptiveSampling,
        AutoRank,
        FedMomentum,
        FedPLoRA,
        FedRotLoRA,
        FedSVD,
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
    "FedMomentum",
    "FedPLoRA",
    "FedRotLoRA",
    "FedSVD",
    "FlexLoRA",
    "HetLoRA",
    "Replication",
    "save_adapter",
]

_ELSEWHERE = {"FedLoRA": "strategies.strategy", "save_adapter": "strategies.checkpoint"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, which not every part of this needs."""
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "strategies.presets")), name)
    if not name.startswith("_"):
        try:
            return import_module(f"strategies.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"strategies.{name}":
                raise
    raise AttributeError(f"module 'strategies' has no attribute {name!r}")
