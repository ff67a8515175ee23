"""The client's part: bound how far an update can move, and hide the rest in noise.

What is bounded is the *displacement*: the difference between what leaves the node and what
the node was sent, over all tensors that leave it, taken as one long vector. These are the
LoRA factors that the rule has uploaded and every dense tensor (head, magnitudes). The product
``B A`` is not bounded and need not be: it is computed from the factors that left.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.lora import Adapter

#: In a config: the largest L2 norm of a displacement.
CLIP_KEY = "dp-clip"
#: In a config: standard deviation of the noise over that norm; above 0, updates are private.
NOISE_KEY = "dp-noise-multiplier"


@dataclass(frozen=True)
class Privacy:
    """How a client makes its update private: the Gaussian mechanism on its displacement.

    Parameters
    ----------
    clip : float
        ``C``, the largest L2 norm of the displacement, in the unit of the weights.
    noise_multiplier : float
        ``z``; every number that leaves gets noise of standard deviation ``z · C``.

    Raises
    ------
    ValueError
        If one of them is not a finite number above 0.
    """

    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        for key, value in ((CLIP_KEY, self.clip), (NOISE_KEY, self.noise_multiplier)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key}: expected a finite number above 0, got {value!r}")

    @classmethod
    def asked(
        cls, config: Mapping[str, Any], node: Mapping[str, Any] | None = None
    ) -> Privacy | None:
        """Return what a message asks for, or None; a node may insist on a minimum.

        Parameters
        ----------
        config : Mapping[str, Any]
            The received config, with ``dp-clip`` and ``dp-noise-multiplier``.
        node : Mapping[str, Any], optional
            The node config. With ``dp-noise-multiplier`` there, less noise is refused; with
            ``dp-clip``, a larger norm: the node need not trust the server in this.

        Raises
        ------
        ValueError
            If the message asks for less privacy than the node insists on.
        """
        asked = float(config.get(NOISE_KEY, 0.0))
        own = dict(node or {})
        least, largest = float(own.get(NOISE_KEY, 0.0)), float(own.get(CLIP_KEY, math.inf))
        if asked < least or math.isnan(asked):
            raise ValueError(
                f"this node insists on {NOISE_KEY} = {least:g} or more, but the message says "
                f"{asked:g}; ask the server's operator to raise it"
            )
        if asked == 0:
            return None
        privacy = cls(float(config.get(CLIP_KEY, 0.0)), asked)
        if privacy.clip > largest:
            raise ValueError(
                f"this node insists on {CLIP_KEY} = {largest:g} or less, but the message says "
                f"{privacy.clip:g}; ask the server's operator to lower it"
            )
        return privacy

    def settings(self) -> dict[str, float]:
        """Return what a training message must hold so that clients follow."""
        return {CLIP_KEY: self.clip, NOISE_KEY: self.noise_multiplier}

    def apply(
        self,
        start: Mapping[str, Tensor],
        trained: Mapping[str, Tensor],
        generator: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return ``trained`` as it may leave the node: displacement clipped, noise added.

        Call it before ``wire.encode``: rounding to float16 or int8 afterwards is
        post-processing. A displacement with NaN or Inf counts as zero, for a reply that is
        refused would tell of the data (this project's decision).

        Parameters
        ----------
        start : Mapping[str, Tensor]
            What the node was sent, decoded; may hold more than ``trained``.
        trained : Mapping[str, Tensor]
            Everything that is to leave, and nothing else.
        generator : numpy.random.Generator, optional
            Source of the noise, for tests only (default: the operating system).

        Raises
        ------
        ValueError
            If a tensor that is to leave was not sent, or in another shape.
        """
        moved, norm = _displacement(start, trained)
        if not math.isfinite(norm):
            moved = {key: torch.zeros_like(x) for key, x in moved.items()}
            norm = 0.0
        factor = _factor(norm, self.clip)
        kept = {key: start[key].cpu().double() + x * factor for key, x in moved.items()}
        return add_noise(kept, self.noise_multiplier * self.clip, generator)


def clip_displacement(
    start: Mapping[str, Tensor], trained: Mapping[str, Tensor], norm: float
) -> tuple[dict[str, Tensor], float]:
    """Return ``start + d · min(1, norm / ‖d‖)`` with ``d = trained − start``, and ``‖d‖``.

    One factor for all tensors: the direction stays. What is within the norm is returned as
    it is, to the last bit, and so is what holds NaN or Inf, which validation refuses.

    Parameters
    ----------
    start, trained : Mapping[str, Tensor]
        ``start`` has at least the keys of ``trained``, in the same shapes.
    norm : float
        Above 0.

    Raises
    ------
    ValueError
        If ``norm`` is not above 0, or the tensors do not fit each other.
    """
    if not norm > 0:
        raise ValueError(f"norm: expected a number above 0, got {norm!r}")
    moved, before = _displacement(start, trained)
    if not before > norm or math.isinf(before):
        return dict(trained), before
    factor = _factor(before, norm)
    clipped = {
        key: (start[key].cpu().double() + x * factor).to(trained[key]) for key, x in moved.items()
    }
    return clipped, before


def clip_update(sent: Adapter, trained: Adapter, norm: float) -> tuple[Adapter, float]:
    """Return ``trained`` with its displacement from ``sent`` clipped, and the norm before.

    For the server, against a client that moves too far (``clip-norm``); by itself it makes
    nothing private. A factor that stayed fixed has no displacement. Where the ranks differ,
    ``sent`` counts at the rank of ``trained``; where the scales do, ``trained`` at that of
    ``sent``.

    Parameters
    ----------
    sent, trained : Adapter
        With the same modules and dense tensors.
    norm : float
        The largest L2 norm of all factors' and dense tensors' displacement together.

    Raises
    ------
    ValueError
        As ``clip_displacement``.
    """
    scales = {module: pair.scale for module, pair in sent.pairs.items()}
    own = trained.with_scale(scales)
    ranks = {module: rank for module, rank in own.ranks.items() if module in sent.pairs}
    start = Adapter({m: sent.pairs[m] for m in ranks}, sent.dense).with_rank(ranks)
    clipped, before = clip_displacement(start.to_state_dict(), own.to_state_dict(), norm)
    if not before > norm or math.isinf(before):
        return trained, before
    return Adapter.from_state_dict(clipped, scales, check_finite=False), before


def add_noise(
    tensors: Mapping[str, Tensor], std: float, generator: np.random.Generator | None = None
) -> dict[str, Tensor]:
    """Return float32 tensors with independent Gaussian noise on every number.

    The sum is made in float64 and then rounded, so that the gaps between float64 numbers,
    by which noise can be told from data (Mironov 2012), do not reach the wire.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Exactly what leaves the node.
    std : float
        0 or more, in the unit of the tensors.
    generator : numpy.random.Generator, optional
        For tests. Default: the operating system's cryptographic generator. The run's seed
        must not determine noise, for the server knows it; neither must a torch generator,
        whose seed counts for 32 bits only and can be found by trying them all.

    Raises
    ------
    ValueError
        If ``std`` is negative or not finite.
    """
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"std: expected a finite number of 0 or more, got {std!r}")
    draw = _system_normal if generator is None else generator.standard_normal
    return {
        key: (x.detach().cpu().double() + std * torch.from_numpy(draw(x.numel())).view(x.shape))
        .float()
        for key, x in tensors.items()
    }  # fmt: skip


def _displacement(
    start: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Return the float64 difference and its L2 norm over all tensors."""
    moved = {}
    for key, tensor in trained.items():
        if key not in start or start[key].shape != tensor.shape:
            got = f"shape {tuple(start[key].shape)}" if key in start else "nothing"
            raise ValueError(
                f"{key!r} is to leave with shape {tuple(tensor.shape)}, but {got} was received "
                "under that name: the displacement is unknown; pass the received arrays"
            )
        moved[key] = tensor.detach().cpu().double() - start[key].cpu().double()
    return moved, math.sqrt(sum(float(x.square().sum()) for x in moved.values()))


def _factor(norm: float, limit: float) -> float:
    return min(1.0, limit / norm) if norm > 0 else 1.0


def _system_normal(count: int) -> NDArray[np.float64]:
    """Return standard normal numbers made from ``os.urandom`` by Box and Muller's formula."""
    half = (count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * half), dtype=np.uint64) >> np.uint64(11)
    u, v = (bits + 0.5).reshape(2, half) * 2.0**-53  # inside (0, 1)
    radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return np.asarray(normal, dtype=np.float64)
