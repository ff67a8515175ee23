"""``AutoRank``: the more complex a client's data, the higher its rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.clients import Client
from strategies.listing import listed
from strategies.profiling import METRICS, PROFILE_KEY, SAMPLES_KEY, checked_profile
from strategies.ranks.base import Explanation, RankPolicy, Settings, at_least_one
from strategies.ranks.holders import (
    caps_of,
    divided,
    number_of_holders,
    pooled_scores,
    whole_budget,
    with_holders,
)
from strategies.ranks.mcda import critic_weights, scores_to_ranks, topsis_scores
from strategies.seeding import stream
from strategies.trained import Trained

ORDERS = ("score", "reversed", "random")
VOLUME = "volume"
#: What a client can be scored by: the published three, and its number of rows [D].
CRITERIA = (*METRICS, VOLUME)


class AutoRank(RankPolicy):
    """Ranks from three numbers a client measures on its data, weighed and scored.

    AutoRank, https://arxiv.org/abs/2412.15553. Each client reports the entropy of its
    losses, the entropy of its labels and their Gini-Simpson index (``profile_metrics``);
    CRITIC weighs the three, TOPSIS scores the clients (``strategies.ranks.mcda``, with the
    certainty of each step), and the scores are mapped to ``min_rank … max_rank``.

    When and on which model clients are profiled is this project's decision [D]:

    - By a query when a node appears, once, on the model the client itself builds: its
      seeded start, where B = 0. No arrays travel, because a ``NumPyClient``'s
      ``get_properties`` takes none.
    - With ``reassign_every = N``, again by the first training message after N rounds, on
      the adapter that came with it, before it is trained; the numbers return with the
      reply. Ranks are assigned anew before rounds N + 1, 2N + 1, …
    - A client that did not answer the query, or answered nonsense, trains at ``fallback``
      and is asked once more with each training message. Its rank then follows.
    - All profiled clients are scored together, so one that joins, or answers late, may
      move the ranks of others. One that leaves moves them only under a budget. Ranks
      depend on the profiles alone, not on node ids or the order of answers; ties under a
      budget go to the lower client index.

    Parameters
    ----------
    min_rank, max_rank : int (default: 4, 32)
        Rank of the lowest and the highest score; ``max_rank`` is also that of the global
        adapter. A device's own ``max-rank`` wins over both.
    budget : float, optional
        Mean rank of the connected clients: their ranks add up to ``budget`` times their
        number, rounded down, in the proportions of the scores.
    byte_budget : float, optional
        The same for bytes: a round in which every connected client trains moves at most
        this much, down and up, head included. With partial participation a round moves
        less [D].
    reassign_every : int (default: 0)
        Profile and assign again every this many rounds; 0: never.
    fallback : int, optional
        Rank of a client without a usable profile (default: ``min_rank``).
    profile_samples : int (default: 0)
        Rows a client passes through its model, a seeded choice; 0: all.
    order : "score", "reversed" or "random" (default: "score")
        For comparison: the lowest score gets the highest rank, or the same scores are
        dealt out at random. The authors compare with the reversed order [P].
    seed : int (default: 42)
        Of the random order.
    criteria : Sequence[str] (default: the published three)
        What clients are scored by, of ``CRITERIA``. ``volume`` is the number of rows, which the
        paper does not look at [D]; a client that does not say it counts as the mean.
    weights : Sequence[float], optional
        Of the criteria, in their order, in place of CRITIC's.
    holders : float (default: 0.0)
        Share of the clients that hold every entry of the rank axis at least; the largest ranks are
        level then (``strategies.ranks.holders``) [D]. As published an entry may have one.

    Raises
    ------
    ValueError
        If an argument is out of range, or both budgets are given.
    """

    name = "autorank"
    profiles = True
    profiles_everyone = True
    metrics = METRICS
    divides_budget = True

    def __init__(
        self,
        min_rank: int = 4,
        max_rank: int = 32,
        *,
        budget: float | None = None,
        byte_budget: float | None = None,
        reassign_every: int = 0,
        fallback: int | None = None,
        profile_samples: int = 0,
        order: str = "score",
        seed: int = 42,
        criteria: Sequence[str] = METRICS,
        weights: Sequence[float] | None = None,
        holders: float = 0.0,
    ) -> None:
        self.min_rank = at_least_one("min_rank", min_rank)
        self._max_rank = max_rank
        self.fallback = min_rank if fallback is None else at_least_one("fallback", fallback)
        if min_rank > max_rank:
            raise ValueError(f"min_rank ({min_rank}) must not exceed max_rank ({max_rank})")
        if self.fallback > max_rank:
            raise ValueError(f"fallback ({fallback}) must not exceed max_rank ({max_rank})")
        if budget is not None and byte_budget is not None:
            raise ValueError("expected budget (a mean rank) or byte_budget, got both")
        if budget is not None and not min_rank <= budget <= max_rank:
            raise ValueError(
                f"budget: a mean rank of {budget} is not between min_rank ({min_rank}) and "
                f"max_rank ({max_rank})"
            )
        if byte_budget is not None and not (math.isfinite(byte_budget) and byte_budget > 0):
            raise ValueError(f"byte_budget: expected a number above 0, got {byte_budget!r}")
        for what, value in (
            ("reassign_every", reassign_every),
            ("profile_samples", profile_samples),
        ):
            if value < 0:
                raise ValueError(f"{what}: expected 0 or more, got {value!r}")
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}; got {order!r}")
        if not criteria or len(set(criteria)) < len(criteria) or set(criteria) - set(CRITERIA):
            raise ValueError(
                f"criteria: expected some of {', '.join(CRITERIA)}, each once; got "
                f"{', '.join(criteria) or 'none'}"
            )
        if weights is not None and (
            len(weights) != len(criteria)
            or not all(math.isfinite(w) and w >= 0 for w in weights)
            or not any(weights)
        ):
            raise ValueError(
                f"weights: expected {len(criteria)} numbers ≥ 0, not all 0, one for each of "
                f"{', '.join(criteria)}; got {list(weights)}"
            )
        if not 0 <= holders <= 1:
            raise ValueError(f"holders: expected a share of the clients, 0 to 1, got {holders!r}")
        self.criteria, self.holders = tuple(criteria), holders
        self.weights = None if weights is None else np.array(weights, np.float64)
        self.budget = budget
        self.byte_budget = byte_budget
        self.reassign_every = reassign_every
        self.profile_samples = profile_samples
        self.order = order
        self.seed = seed
        self.counts_bytes = byte_budget is not None
        self._cost: tuple[float, float] | None = None
        # All by client index, for node ids differ from run to run.
        self._asked: set[int] = set()
        self._profiles: dict[int, tuple[float, float, float]] = {}
        self._rows: dict[int, int] = {}  # as first known
        self._measured: dict[int, int] = {}  # the round of the profile; 0: before training
        self._ranks: dict[int, int] = {}
        self._stale = True  # someone got a first profile, or the costs changed
        self._explanation = Explanation()

    @property
    def may_differ(self) -> bool:
        """Whether there is more than one rank to give."""
        return len({self.min_rank, self.max_rank, self.fallback}) > 1

    @property
    def max_rank(self) -> int:
        """The largest rank a client can get."""
        return self._max_rank

    # ----- what clients are asked, and answer ------------------------------------------

    def to_profile(self, clients: Sequence[Client], server_round: int) -> list[Client]:
        """Return the clients that were never asked."""
        return [client for client in clients if client.index not in self._asked]

    def profile_settings(self) -> Settings:
        """Return the request for a profile."""
        return {PROFILE_KEY: True, SAMPLES_KEY: self.profile_samples}

    def learn(self, client: Client, answer: Mapping[str, Any] | None, server_round: int) -> None:
        """Keep the three numbers of an answer."""
        self._asked.add(client.index)
        if answer is not None:
            self._keep(client, answer, 0)

    def learn_cost(self, fixed: float, per_rank: float) -> None:
        """Remember what a rank costs; a change means that the bytes are divided anew."""
        if self._cost != (fixed, per_rank):
            self._cost = fixed, per_rank
            self._stale = True

    def train_settings(self, client: Client, server_round: int) -> Settings:
        """Ask for a profile where there is none, or it is old."""
        measured = self._measured.get(client.index)
        due = measured is None or (
            self.reassign_every > 0 and server_round - measured >= self.reassign_every
        )
        return self.profile_settings() if due else {}

    def observe(self, trained: Trained) -> None:
        """Keep the profile that came with a reply, if one did."""
        if any(key in trained.metrics for key in METRICS):
            self._keep(trained.client, trained.metrics, trained.server_round)

    def forget(self, index: int) -> None:
        """Forget a profile, so that whoever has the place is asked."""
        self._asked.discard(index)
        for known in (self._profiles, self._measured, self._ranks, self._rows):
            known.pop(index, None)  # type: ignore[attr-defined]

    def _keep(self, client: Client, answer: Mapping[str, Any], measured: int) -> None:
        profile = checked_profile(answer)
        self._stale |= client.index not in self._profiles
        self._profiles[client.index] = profile
        self._measured[client.index] = measured

    # ----- the ranks ---------------------------------------------------------------------

    def choose(self, clients: Sequence[Client], server_round: int) -> list[int]:
        """Return the ranks in effect, assigned anew where that is due."""
        present = {client.index for client in clients}
        again = self.reassign_every and server_round > 1
        due = again and (server_round - 1) % self.reassign_every == 0
        budgeted = self.budget is not None or self.byte_budget is not None
        moved = not present <= self._ranks.keys() or (budgeted and present != self._ranks.keys())
        if self._stale or due or moved:
            for client in clients:
                if client.num_examples:
                    self._rows.setdefault(client.index, client.num_examples)
            self._assign(sorted(clients, key=lambda client: client.index))
        return [self._ranks[client.index] for client in clients]

    def _assign(self, clients: Sequence[Client]) -> None:
        known = sorted(self._profiles)
        scores: dict[int, float] = {}
        weights = np.zeros(0)
        if known:
            x = self._measures(known)
            weights = critic_weights(x) if self.weights is None else self.weights
            scores = dict(zip(known, self._ordered(topsis_scores(x, weights), known), strict=True))
        ranks = {client.index: _capped(self.fallback, client) for client in clients}
        profiled = [client for client in clients if client.index in scores]
        notes: list[str] = []
        if len(profiled) < len(clients):
            names = listed([c.name for c in clients if c.index not in scores])
            notes.append(f"no usable profile, so rank {self.fallback} (fallback): {names}")
        total = self._total(clients, notes)
        if total is None:
            # Over all known clients, so that who is away for a round moves nobody's rank.
            values = pooled_scores([scores[i] for i in known], self._holders(len(known)))
            mapped = scores_to_ranks(values, self.min_rank, self.max_rank)
            high = np.full(len(known), self.max_rank)
            mapped = with_holders(mapped, values, self._holders(len(known)), high, self.min_rank)
            free = dict(zip(known, mapped.tolist(), strict=True))
            ranks = {**free, **ranks} | {c.index: _capped(free[c.index], c) for c in profiled}
        elif profiled:
            others = sum(rank for index, rank in ranks.items() if index not in scores)
            shares = self._divide(profiled, scores, total - others, notes)
            ranks |= {c.index: r for c, r in zip(profiled, shares.tolist(), strict=True)}
        elif sum(ranks.values()) != total:
            notes.append(
                f"the ranks add up to {sum(ranks.values())}, not {total}: nobody is scored"
            )
        self._ranks = ranks
        self._stale = False
        details: dict[int, dict[str, float | None]] = {}
        for client in clients:
            profile = self._profiles.get(client.index, (None,) * len(METRICS))
            details[client.index] = dict(zip(METRICS, profile, strict=True))
            details[client.index]["score"] = scores.get(client.index)
        shown = dict(zip(self.criteria, weights.tolist(), strict=False))
        self._explanation = Explanation(details, shown, notes)

    def _ordered(self, scores: NDArray[np.float64], known: Sequence[int]) -> list[float]:
        if self.order == "reversed":
            return (scores.max() + scores.min() - scores).tolist()  # type: ignore[no-any-return]
        if self.order == "random":
            # A draw of its own for each client: others joining do not change it.
            draws = [stream(self.seed, "order", index).random() for index in known]
            dealt = np.empty_like(scores)
            dealt[np.argsort(draws, kind="stable")] = np.sort(scores)
            return dealt.tolist()  # type: ignore[no-any-return]
        return scores.tolist()  # type: ignore[no-any-return]

    def _total(self, clients: Sequence[Client], notes: list[str]) -> int | None:
        """Return the sum of ranks that the budget allows, or None without a budget."""
        if self.budget is not None:
            total, note = whole_budget(self.budget, len(clients))
            notes += [note] if note else []
            return total
        if self.byte_budget is None or self._cost is None:
            return None
        fixed, per_rank = self._cost
        left = self.byte_budget - fixed * len(clients)
        if left < 0:
            notes.append(
                f"{self.byte_budget / 1e6:g} MB a round are less than the head and other fixed "
                f"parts of {len(clients)} clients take ({fixed * len(clients) / 1e6:g} MB)"
            )
        if per_rank <= 0:  # there is no LoRA module, so rank costs nothing
            return self.max_rank * len(clients)
        return math.floor(max(0.0, left) / per_rank + 1e-9)

    def _divide(
        self, clients: Sequence[Client], scores: Mapping[int, float], total: int, notes: list[str]
    ) -> NDArray[np.int64]:
        """Divide a sum of ranks by score; one that the limits do not allow, as near as can be."""
        ranks, note = divided(
            [scores[client.index] for client in clients], total, self.min_rank, self.max_rank,
            caps_of(clients, self.max_rank), self._holders(len(clients)),
        )  # fmt: skip
        notes += [note] if note else []
        return ranks

    def _holders(self, clients: int) -> int:
        return number_of_holders(self.holders, clients)

    def _measures(self, known: Sequence[int]) -> NDArray[np.float64]:
        """Return one row a client, one column a criterion."""
        mean = float(np.mean(list(self._rows.values()))) if self._rows else 1.0
        rows = [[*self._profiles[index], self._rows.get(index, mean)] for index in known]
        columns = [CRITERIA.index(name) for name in self.criteria]
        return np.array(rows, np.float64)[:, columns]

    def explain(self) -> Explanation:
        """Return the clients' metrics and scores, the weights, and what a budget missed."""
        return self._explanation

    # ----- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return profiles and ranks, by client index."""
        return {
            "asked": sorted(self._asked),
            "profiles": {str(k): list(v) for k, v in sorted(self._profiles.items())},
            "measured": {str(k): v for k, v in sorted(self._measured.items())},
            "ranks": {str(k): v for k, v in sorted(self._ranks.items())},
            "stale": self._stale,
            "cost": self._cost,
            "rows": {str(k): v for k, v in sorted(self._rows.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._asked = {int(k) for k in state["asked"]}
        self._profiles = {int(k): (v[0], v[1], v[2]) for k, v in state["profiles"].items()}
        self._measured = {int(k): int(v) for k, v in state["measured"].items()}
        self._ranks = {int(k): int(v) for k, v in state["ranks"].items()}
        self._rows = {int(k): int(v) for k, v in state.get("rows", {}).items()}
        self._stale = bool(state["stale"])
        self._cost = None if state["cost"] is None else (state["cost"][0], state["cost"][1])

    def summary(self) -> str:
        """Return the settings in one line."""
        parts = [f"{self.min_rank} to {self.max_rank}"]
        if self.budget is not None:
            parts.append(f"mean {self.budget:g}")
        if self.byte_budget is not None:
            parts.append(f"{self.byte_budget / 1e6:g} MB a round")
        if self.reassign_every:
            parts.append(f"again every {self.reassign_every} rounds")
        if self.criteria != METRICS or self.weights is not None:
            by = "" if self.weights is None else f" {self.weights.tolist()}"
            parts.append(f"by {', '.join(self.criteria)}{by}")
        if self.holders:
            parts.append(f"every entry of {self.holders:.0%} of the clients")
        if self.order != "score":
            parts.append(f"order {self.order}")
        return f"{self.name} ({', '.join(parts)})"


def _capped(rank: int, client: Client) -> int:
    return min(rank, client.max_rank or rank)
