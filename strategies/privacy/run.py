"""Differential privacy of a whole run: what the server asks for, adds, and keeps account of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from strategies.lora import Adapter
from strategies.privacy.accountant import PrivacyAccountant
from strategies.privacy.accounting import top_up
from strategies.privacy.checks import LINEAR_RULES, refuse_amplification, refuse_private
from strategies.privacy.mechanism import Privacy, add_noise

if TYPE_CHECKING:
    from strategies.clients import Client
    from strategies.strategy import FedLoRA


class PrivateRun:
    """Clipped and noised updates in a run, with ε by round.

    Clients clip and add noise before anything leaves them. Who is drawn comes from the
    operating system instead of the run's seed, so that sampling may hide who took part; so a
    private run cannot be repeated. Under independent sampling the server adds the noise
    that those who stayed away would have brought (``top_up``), where that hides them.

    Parameters
    ----------
    privacy : Privacy
        What clients are asked for.
    delta : float
        In (0, 1); well below one over the number of those to be protected.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, privacy: Privacy, delta: float = 1e-5) -> None:
        self.privacy = privacy
        self.accountant = PrivacyAccountant(privacy.noise_multiplier, delta)
        self._amplified = False
        self._linear = False
        self._independent = False
        self._asked: list[int] = []
        self._weights: dict[int, float] = {}  # w = a / q of everybody
        self._chances: dict[int, float] = {}  # their q
        self._present = 0

    def check(self, run: FedLoRA) -> None:
        """Refuse settings that void the guarantee, and see whether sampling adds to it.

        Raises
        ------
        ValueError
            With every reason.
        """
        sampler = run.participation.sampler
        share = run.evaluate_sampling.fraction if run.evaluate_sampling else 0.0
        problems = refuse_private(run.aggregation, run.ranks, sampler, evaluate_fraction=share)
        if problems:
            raise ValueError("private updates would not make this run private:\n"
                             + "\n".join(f"  - {problem}" for problem in problems))  # fmt: skip
        self._independent = run.participation.independent
        self._linear = run.aggregation.name in LINEAR_RULES
        self._amplified = not refuse_amplification(
            run.aggregation,
            run.ranks,
            sampler,
            secret_draws=True,
            topped_up=self._independent,
            server_clips=run.clip_norm > 0,
        )

    def rng(self) -> np.random.Generator:
        """Return a generator that nobody can repeat."""
        return np.random.default_rng()

    @property
    def tops_up(self) -> bool:
        """Whether the server adds noise to every round, whoever joined, be it nobody."""
        return self._amplified and self._independent

    def begin(
        self,
        clients: Sequence[Client],
        asked: Sequence[Client],
        weights: Mapping[int, float],
        chances: Mapping[int, float],
    ) -> None:
        """Note who is there and who is asked; of coins also everybody's ``a / q`` and ``q``."""
        self._present = len(clients)
        self._asked = [client.index for client in asked]
        self._weights, self._chances = dict(weights), dict(chances)
        self.accountant.record(self._asked)

    def finish(self, adapter: Adapter, answered: Sequence[int]) -> Adapter:
        """Return the new global adapter with the server's own noise, and note the round.

        Parameters
        ----------
        adapter : Adapter
            What the rule made of the updates.
        answered : Sequence[int]
            Indices of those whose updates are in it.
        """
        if not self.tops_up:
            self.accountant.record_fixed(
                self._present, len(self._asked), len(answered),
                summed=self._linear, amplified=self._amplified and not self._independent,
            )  # fmt: skip
            return adapter
        # As much as if everybody had joined: less could not hide a large draw.
        std = self.privacy.noise_multiplier * self.privacy.clip
        total = std * math.sqrt(math.fsum(w * w for w in self._weights.values()))
        self.accountant.record_poisson(self._chances, self._weights, total / self.privacy.clip)
        missing = top_up([self._weights[i] for i in answered], std, total)
        if not missing:
            return adapter
        noised = add_noise(adapter.to_state_dict(), missing)
        scales = {module: pair.scale for module, pair in adapter.pairs.items()}
        return Adapter.from_state_dict(
            {key: tensor.to(torch.float32) for key, tensor in noised.items()}, scales
        )

    def spent(self) -> dict[str, float]:
        """Return ε so far: against the server, and against who sees the models alone."""
        return {
            "epsilon_local": self.accountant.local_epsilon(),
            "epsilon_central": self.accountant.central_epsilon(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger, as JSON can hold it."""
        return self.accountant.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.accountant.load_state_dict(state)
