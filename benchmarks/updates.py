"""Random adapters to aggregate."""

import torch

from strategies.lora import Adapter, LoraPair

RANKS = (4, 4, 8, 8, 16, 16, 32, 32, 64, 64)
SCALE = 2.0


def adapter(rank: int, d: int, modules: int, rng: torch.Generator) -> Adapter:
    pairs = {
        f"layer.{i}": LoraPair(
            torch.randn(rank, d, generator=rng) / d**0.5,
            torch.randn(d, rank, generator=rng) / d**0.5,
            SCALE,
        )
        for i in range(modules)
    }
    return Adapter(pairs)
