"""Differential privacy of a whole run: what the server asks for, adds, and keeps account of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.common import log

from strategies.lora import Adapter
from strategies.privacy.accountant import PrivacyAccountant
from strategies.privacy.accounting import central_epsilon, top_up
from strategies.privacy.checks import refuse_amplification, refuse_private
from strategies.privacy.ledger import read_ledger, write_ledger
from strategies.privacy.mechanism import Privacy, add_noise
from strategies.promises import declares

if TYPE_CHECKING:
    from strategies.aggregation import Aggregator
    from strategies.clients import Client
    from strategies.ranks import RankPolicy
    from strategies.sampling import Sampler


class PrivateRun:
    """Clipped and noised updates in a run, with ε by round.

    Clients clip and add noise before anything leaves them. Who is drawn comes from the
    operating system instead of the run's seed, so that sampling may hide who took part; so a
    private run cannot be repeated. Under independent sampling the server adds the noise
    that those who stayed away would have brought (``top_up``), where that hides them.

    A round that is lost and repeated, because the server was killed before it could save a
    checkpoint, was given away twice. So what is spent is also written to ``ledger``, before
    clients are asked, and a resumed run goes on from there instead of from its checkpoint.

    Parameters
    ----------
    privacy : Privacy
        What clients are asked for.
    delta : float (default: 1e-5)
        In (0, 1); well below one over the number of those to be protected.
    ledger : Path, optional
        File of what these clients have spent; one that is there is gone on with (default:
        none, and only what is in a checkpoint survives the process).

    Raises
    ------
    ValueError
        If an argument is out of range, or ``ledger`` cannot be read.
    """

    #: Weights must not come from the data, whatever a node says of itself.
    rows_known = False

    def __init__(self, privacy: Privacy, delta: float = 1e-5, ledger: Path | None = None) -> None:
        self.privacy = privacy
        self.accountant = PrivacyAccountant(privacy.noise_multiplier, delta)
        self.ledger = ledger
        self._read = ledger is not None and ledger.exists()
        if ledger is not None and self._read:
            read_ledger(ledger, self.accountant)
        self._equal_ranks = True
        self._amplified = False
        self._linear = False
        self._independent = False
        self._asked: list[int] = []
        self._weights: dict[int, float] = {}  # w = a / q of everybody
        self._chances: dict[int, float] = {}  # their q
        self._present = 0

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in every number that arrives."""
        return self.privacy.clip * self.privacy.noise_multiplier

    def settings(self) -> dict[str, float]:
        """Return what messages must hold so that clients follow."""
        return self.privacy.settings()

    def parts(self) -> dict[str, Any]:
        """Return what has a state that must last, by its name in a checkpoint."""
        return {"privacy": self}

    def check(
        self,
        rule: Aggregator[Any],
        policy: RankPolicy,
        sampler: Sampler,
        *,
        evaluate_fraction: float,
        server_clips: bool,
    ) -> None:
        """Refuse settings that void the guarantee, and see whether sampling adds to it.

        Parameters
        ----------
        rule : Aggregator
        policy : RankPolicy
        sampler : Sampler
        evaluate_fraction : float
            Share of the clients that evaluate the model on their own data.
        server_clips : bool
            Whether the server scales down what arrives.

        Raises
        ------
        ValueError
            With every reason.
        """
        problems = refuse_private(rule, policy, sampler, evaluate_fraction=evaluate_fraction)
        if problems:
            raise ValueError("private updates would not make this run private:\n"
                             + "\n".join(f"  - {problem}" for problem in problems))  # fmt: skip
        self._independent = sampler.probabilities([]) is not None
        self._linear = declares(rule, "linear")
        self._amplified = not refuse_amplification(
            rule,
            policy,
            sampler,
            secret_draws=True,
            topped_up=self._independent,
            server_clips=server_clips,
        )
        if self._amplified:  # what is missing must be missed before anything is sent
            central_epsilon(1.0, self.accountant.delta, 1, sampling="fixed", clients=2, sample=1)

    def seen(self, clients: list[Client]) -> list[Client]:
        """Return clients as the server may know them: without their numbers of rows."""
        return [replace(client, num_examples=None) for client in clients]

    def rng(self, seeded: np.random.Generator) -> np.random.Generator:
        """Return the generator that draws who joins: one that nobody can repeat."""
        return np.random.default_rng()

    @property
    def tops_up(self) -> bool:
        """Whether the server adds noise to every round, whoever joined, be it nobody."""
        return self._hides and self._independent

    @property
    def _hides(self) -> bool:
        """Whether sampling hides who takes part in this round."""
        return self._amplified and self._equal_ranks

    def begin(
        self,
        clients: Sequence[Client],
        asked: Sequence[Client],
        weights: Mapping[int, float],
        chances: Mapping[int, float],
        *,
        equal_ranks: bool,
    ) -> None:
        """Note who is there and who is asked, before they are.

        Parameters
        ----------
        clients, asked : Sequence[Client]
        weights, chances : Mapping[int, float]
            Everybody's ``a / q`` and ``q`` by index, under independent sampling.
        equal_ranks : bool
            Whether all clients have one rank in this round. If device limits make them
            differ, which entries changed tells who took part.
        """
        self._equal_ranks = equal_ranks
        self._present = len(clients)
        self._asked = [client.index for client in asked]
        self._weights, self._chances = dict(weights), dict(chances)
        if raised := self.accountant.meet(clients):
            names = ", ".join(client.name for client in clients if client.index in raised)
            log(WARNING, "%s: may have trained before under another node id, so ε begins with the "
                "most that any such client may have spent (%.2f); a node that names itself, by "
                "partition-id in its node config, keeps its own (a Message API app: "
                "register_identity(app))", names,
                max(map(self.accountant.local_epsilon, raised)))  # fmt: skip
        self.accountant.record(self._asked)
        self._save(open_round=True)

    def finish(self, adapter: Adapter, answered: Sequence[int], uploaded: str = "AB") -> Adapter:
        """Return the new global adapter with the server's own noise, and note the round.

        Parameters
        ----------
        adapter : Adapter
            What the rule made of the updates.
        answered : Sequence[int]
            Indices of those whose updates are in it.
        uploaded : str (default: "AB")
            The factors that clients sent; others are the server's own and get no noise.
        """
        noised = self._topped_up(adapter, answered, uploaded)
        self._save(open_round=False)
        return noised

    def _topped_up(self, adapter: Adapter, answered: Sequence[int], uploaded: str) -> Adapter:
        if not self.tops_up:
            self.accountant.record_fixed(
                self._present, len(self._asked), len(answered),
                summed=self._linear, amplified=self._hides,
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
        found = Adapter.from_state_dict(
            {key: tensor.to(torch.float32) for key, tensor in noised.items()}, scales
        )
        own = [factor for factor in "AB" if factor not in uploaded]
        pairs = {
            module: replace(pair, **{f: getattr(adapter.pairs[module], f) for f in own})
            for module, pair in found.pairs.items()
        }
        return Adapter(pairs, found.dense)

    def spent(self) -> dict[str, float]:
        """Return ε so far: against the server, and against who sees the models alone."""
        return {
            "epsilon_local": self.accountant.local_epsilon(),
            "epsilon_central": self.accountant.central_epsilon(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent, as JSON can hold it."""
        return self.accountant.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned, unless the ledger, which has all, was there."""
        if not self._read:
            self.accountant.load_state_dict(state)

    def _save(self, *, open_round: bool) -> None:
        if self.ledger is None:
            return
        try:
            write_ledger(self.ledger, self.accountant, open_round=open_round)
        except OSError as error:
            log(WARNING, "cannot write %s: %s; should the run be killed now and resumed, it would "
                "count too little", self.ledger, error)  # fmt: skip
