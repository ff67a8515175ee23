"""Training at another LoRA scale than the one a federation shares, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strategies.client.peft_model import lora_layers


@contextmanager
def trained_at(
    model: nn.Module, scale: Callable[[int], float], *, adapter_name: str = "default"
) -> Iterator[None]:
    """Have every LoRA layer train at a scale of its rank inside the block, as rsLoRA does.

    The model computes the same before and after: ``s·B A`` is ``s'·(s/s' B) A``. What changes is
    how far a step of an optimiser takes it. Afterwards the shared scale holds again, and with it
    everything that is sent; a factor that is not trained is as it was, to the bit.

    Parameters
    ----------
    model : nn.Module
        As ``apply_adapter`` left it.
    scale : callable
        ``scale(rank)`` is the scale inside: ``lambda rank: alpha / rank**0.5`` for rsLoRA
        (Kalajdzievski 2023).
    adapter_name : str (default: "default")
    """
    before: list[tuple[Any, float, float, Tensor | None]] = []
    with torch.no_grad():
        for _, layer in lora_layers(model, adapter_name):
            shared, factor = float(layer.scaling[adapter_name]), _factor(layer, adapter_name)
            own = scale(int(layer.r[adapter_name]))
            before.append((layer, shared, own, None if factor.requires_grad else factor.clone()))
            factor.mul_(shared / own)
            layer.scaling[adapter_name] = own
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, shared, own, kept in before:
                factor = _factor(layer, adapter_name)
                if kept is None:
                    factor.mul_(own / shared)
                else:
                    factor.copy_(kept)
                layer.scaling[adapter_name] = shared


def _factor(layer: Any, adapter_name: str) -> Tensor:
    """Return the factor that starts at 0, so that the other starts as it does without this."""
    if adapter_name in layer.lora_B:
        found: Tensor = layer.lora_B[adapter_name].weight
    else:
        found = layer.lora_embedding_A[adapter_name]
    return found
