"""Optimisers on the server: what a round changed is taken for a gradient.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, https://arxiv.org/abs/2003.00295 (as
published; in detail as Flower's ``FedAvgM``, ``FedAdagrad``, ``FedAdam`` and ``FedYogi``, which
the tests compare with). For adapters of different rank (this project's decision): what is gathered
belongs to an entry of the rank axis and grows and shrinks with it, and an entry that nobody of a
round held, or a factor that was not sent, neither moves nor ages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from strategies.aggregation import AGGREGATIONS, Aggregator
from strategies.lora import Adapter
from strategies.lora.algebra import resize
from strategies.naming import Registry
from strategies.promises import declares, those_that_declare
from strategies.sampling import Sampler

Moments = dict[str, Tensor]


class ServerOptimizer(ABC):
    """Base of the optimisers; what they have gathered is in ``moments``.

    Parameters
    ----------
    learning_rate : float
        Above 0.

    Raises
    ------
    ValueError
        If it is not, or another number is out of range.
    """

    name: ClassVar[str] = ""
    #: Of which averages it keeps one for each number: "m", of changes, and "v", of their squares.
    keeps: ClassVar[str] = "mv"

    def __init__(self, learning_rate: float) -> None:
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate: expected a number above 0, got {learning_rate!r}")
        self.learning_rate = learning_rate
        self.moments: Moments = {}

    @abstractmethod
    def move(
        self, change: Tensor, m: Tensor, v: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return how far to go, and the new ``m`` and ``v``.

        Parameters
        ----------
        change, m, v : Tensor
            Of one shape, float32; one that is not kept is zero.
        times : Tensor
            How often each entry has moved, this time included; of a shape that broadcasts.
        """

    def step(
        self, old: Adapter, new: Adapter, held: Mapping[str, Tensor], keys: set[str], factors: str
    ) -> tuple[Adapter, Moments]:
        """Return the adapter to go on with, and the moments that belong to it.

        Parameters
        ----------
        old, new : Adapter
            Before the round, and what the rule has made of it.
        held : Mapping[str, Tensor]
            By module, which entries somebody of the round had, bool.
        keys : set of str
            The other tensors that somebody sent.
        factors : str
            Those that were sent: "AB", "A" or "B".
        """
        after: Moments = {}
        pairs = {}
        for module, pair in new.pairs.items():
            start = old.pairs[module].with_rank(pair.rank).with_scale(pair.scale)
            moved = torch.zeros(pair.rank, dtype=torch.bool)
            if module in held:
                moved[: len(held[module])] = held[module][: pair.rank]
            A = self._moved(f"A.{module}", 0, start.A, pair.A, moved & ("A" in factors), after)
            B = self._moved(f"B.{module}", 1, start.B, pair.B, moved & ("B" in factors), after)
            pairs[module] = replace(pair, A=A, B=B)
        dense = {
            key: self._moved(
                f"dense.{key}", -1, old.dense[key], tensor, torch.tensor([key in keys]), after
            )
            for key, tensor in new.dense.items()
        }
        return Adapter(pairs, dense), after

    def _moved(
        self, key: str, axis: int, old: Tensor, new: Tensor, moved: Tensor, after: Moments
    ) -> Tensor:
        """Return one tensor after the step, and note its moments."""
        shape = [1] * max(1, old.dim())
        if axis >= 0:
            shape[axis] = -1
        elif not old.dim():
            shape = []
        size = len(moved)

        def kept(what: str, like: Tensor, along: int) -> Tensor:
            found = self.moments.get(f"{what}.{key}")
            if found is None:
                return torch.zeros_like(like)
            return resize(found, along, size) if axis >= 0 else found

        start = old.float()
        m, v = (kept(what, start, axis) for what in "mv")
        ages = kept("n", torch.zeros(size, dtype=torch.int64), 0) + moved
        here = moved.reshape(shape)
        times = ages.clamp(min=1).double().reshape(shape)
        distance, new_m, new_v = self.move(new.float() - start, m, v, times)
        after[f"n.{key}"] = ages
        for what, before, now in (("m", m, new_m), ("v", v, new_v)):
            if what in self.keeps:
                after[f"{what}.{key}"] = torch.where(here, now, before)
        return torch.where(here, start + distance, start).to(new.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return which optimiser this is; its tensors are in ``moments``."""
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse what another optimiser has gathered.

        Raises
        ------
        ValueError
            With both names.
        """
        if state["name"] != self.name:
            raise ValueError(
                f"the checkpoint is of a run with the server optimizer {state['name']!r}, this "
                f"one has {self.name!r}; resume with that of the run that wrote it"
            )


OPTIMIZERS: Registry[type[ServerOptimizer]] = Registry()


class Momentum(ServerOptimizer):
    """Go on in the direction of earlier rounds: ``m = momentum · m + Δ``, ``x += rate · m``.

    Parameters
    ----------
    learning_rate : float (default: 1.0)
    momentum : float (default: 0.9)
        At least 0, below 1. With 0 and a rate of 1 nothing changes.
    """

    name = "momentum"
    keeps = "m"

    def __init__(self, *, learning_rate: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__(learning_rate)
        self.momentum = _decay("momentum", momentum)

    def move(
        self, change: Tensor, m: Tensor, v: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``rate · m``."""
        m = self.momentum * m + change
        return self.learning_rate * m, m, v


class Adagrad(ServerOptimizer):
    """Divide by the root of the sum of squared changes: ``v += Δ²``, ``x += rate Δ / (√v + τ)``.

    Parameters
    ----------
    learning_rate : float (default: 0.01)
        About how far a number goes in a round; Flower's 0.1 is large beside LoRA factors.
    tau : float (default: 1e-3)
        Above 0; the smaller, the more do small changes count.
    """

    name = "adagrad"
    keeps = "v"

    def __init__(self, *, learning_rate: float = 0.01, tau: float = 1e-3) -> None:
        super().__init__(learning_rate)
        self.tau = _tau(tau)

    def move(
        self, change: Tensor, m: Tensor, v: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``rate · Δ / (√v + τ)``."""
        v = v + change.square()
        return self.learning_rate * change / (v.sqrt() + self.tau), m, v


class Adam(ServerOptimizer):
    """Divide the mean change by the root of the mean squared change.

    ``m = β1 m + (1 - β1) Δ``, ``v = β2 v + (1 - β2) Δ²``,
    ``x += rate · √(1 - β2^(n+1)) / (1 - β1^(n+1)) · m / (√v + τ)`` with n the times an entry has
    moved.

    Parameters
    ----------
    learning_rate : float (default: 0.01)
        As in ``Adagrad``.
    beta_1, beta_2 : float (default: 0.9, 0.99)
        At least 0, below 1.
    tau : float (default: 1e-3)
        As in ``Adagrad``.
    """

    name = "adam"

    def __init__(
        self,
        *,
        learning_rate: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(learning_rate)
        self.beta_1, self.beta_2 = _decay("beta_1", beta_1), _decay("beta_2", beta_2)
        self.tau = _tau(tau)

    def move(
        self, change: Tensor, m: Tensor, v: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the corrected rate times ``m / (√v + τ)``."""
        m = self.beta_1 * m + (1 - self.beta_1) * change
        v = self.squares(v, change.square())
        return self.rate(times).float() * m / (v.sqrt() + self.tau), m, v

    def squares(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next mean of squared changes."""
        return self.beta_2 * v + (1 - self.beta_2) * square

    def rate(self, times: Tensor) -> Tensor:
        """Return the rate of an entry that has moved so often, float64."""
        late = times + 1
        return self.learning_rate * (1 - self.beta_2**late).sqrt() / (1 - self.beta_1**late)


class Yogi(Adam):
    """Like ``adam``, but the squares change by no more than the latest one; no rate is corrected.

    ``v -= (1 - β2) Δ² sign(v - Δ²)``. Parameters as in ``Adam``.
    """

    name = "yogi"

    def squares(self, v: Tensor, square: Tensor) -> Tensor:
        """Return ``v - (1 - β2) Δ² sign(v - Δ²)``."""
        return v - (1 - self.beta_2) * square * torch.sign(v - square)

    def rate(self, times: Tensor) -> Tensor:
        """Return the learning rate."""
        return torch.full_like(times, self.learning_rate)


for _kind in (Momentum, Adagrad, Adam, Yogi):
    OPTIMIZERS.register(_kind)


def refuse_optimizer(
    optimizer: ServerOptimizer | None, rule: Aggregator[Any], sampler: Sampler
) -> list[str]:
    """Return every reason why an optimiser cannot be used with a rule and a sampler."""
    if optimizer is None:
        return []
    problems = []
    if not declares(rule, "entrywise"):
        problems.append(
            f"server optimizer {optimizer.name!r} gathers what happens to each number, and "
            f"{rule.name} makes its factors anew in every round, or merges a part of what was "
            f"learned; use one of {those_that_declare(AGGREGATIONS, 'entrywise')}"
        )
    if sampler.wants_loss:
        problems.append(
            f"server optimizer {optimizer.name!r} goes on from earlier rounds, and the pilots of "
            f"sampling {sampler.name!r} start the model anew; give alpha and beta, or use another "
            "sampler"
        )
    return problems


def _decay(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number from 0, below 1, got {value!r}")
    return value


def _tau(value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"tau: expected a number above 0, got {value!r}")
    return value
