"""Adapters that start from factors of the frozen weights: PiSSA and OLoRA.

What they start from is taken out of the frozen weights, so that the model is at first what was
loaded. The server computes the factors and every node gets them with the model: singular vectors
of one matrix differ from machine to machine by their signs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from strategies.client.peft_model import lora_layers
from strategies.lora import Adapter, LoraPair

if TYPE_CHECKING:
    from peft import PeftModel


def pissa(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return factors with ``s·B A = W``, the leading singular terms of ``W`` first.

    PiSSA, https://arxiv.org/abs/2404.02948 (as PEFT computes it).

    Parameters
    ----------
    weight : Tensor
        ``W``, (m, n).
    scale : float
        ``s``.

    Returns
    -------
    (Tensor, Tensor)
        A, (k, n), and B, (m, k), for k = min(m, n).
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


def olora(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the factors of ``W = Q R``: B = Q, orthonormal, and A = R; ``scale`` as it is.

    OLoRA, https://arxiv.org/abs/2406.01775 (as PEFT computes it). Shapes as of ``pissa``.
    """
    Q, R = torch.linalg.qr(weight)
    return R, Q


STARTS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "pissa": pissa,
    "olora": olora,
}
"""By ``lora.variant``."""


def start_of(model: PeftModel, variant: str, *, scale: float, rank: int) -> Adapter:
    """Return what an adapter of a variant starts from, and its frozen weights do without.

    Parameters
    ----------
    model : PeftModel
        From ``add_lora``.
    variant : str
        One of ``STARTS``.
    scale : float
        ``s`` in ``W0 + s·B A``.
    rank : int
        Of every pair.

    Raises
    ------
    ValueError
        As ``check_start``.
    """
    check_start(model, variant, rank)
    pairs = {}
    for name, layer in lora_layers(model, "default"):
        weight = _matrix(layer).detach().float()
        A, B = STARTS[variant](weight, scale)
        pairs[name] = LoraPair(A[:rank].contiguous(), B[:, :rank].contiguous(), scale)
    return Adapter(pairs)


def check_start(model: nn.Module, variant: str, rank: int) -> None:
    """Refuse a model whose layers have no factors of so many entries.

    Raises
    ------
    ValueError
        With the layer and what to do.
    """
    for name, layer in lora_layers(model, "default"):
        shape = tuple(_matrix(layer).shape)
        if len(shape) != 2:
            raise ValueError(
                f"lora.variant = {variant!r} is for linear layers, and {name!r} is a "
                f"{type(layer.get_base_layer()).__name__}; name others with lora.target-modules, "
                "or use the variant lora"
            )
        if rank > min(shape):
            raise ValueError(
                f"lora.variant = {variant!r}: {name!r} has {min(shape)} factors "
                f"({shape[0]}×{shape[1]}), and ranks go up to {rank}; lower them"
            )


def _matrix(layer: nn.Module) -> Tensor:
    """Return the frozen weight of a layer as (out, in)."""
    weight: Tensor = layer.get_base_layer().weight  # type: ignore[operator]
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
