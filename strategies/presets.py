"""One name per published method; each only composes what ``FedLoRA`` takes.

Every preset takes the keywords of ``FedLoRA`` besides its own, so that one part of a method
can be exchanged: ``AutoRank(aggregation="flexlora")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from strategies import ranks as policies
from strategies.aggregation import make_aggregator
from strategies.sampling import PlannedSampling
from strategies.strategy import FedLoRA
from strategies.wallclock import Clock


class AutoRank(FedLoRA):
    """Each client's rank by the complexity of its data: AutoRank, arXiv 2412.15553.

    Averaged entry by entry over the clients that hold it (``rbla``, by the same authors).

    Parameters
    ----------
    min_rank, max_rank : int (default: 4, 32)
    budget : float, optional
        Mean rank of the clients (default: none, ranks by score alone).
    reassign_every : int (default: 0)
        Profile and assign again every N rounds; 0: never.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(
        self,
        *,
        min_rank: int = 4,
        max_rank: int = 32,
        budget: float | None = None,
        reassign_every: int = 0,
        **settings: Any,
    ) -> None:
        policy = policies.AutoRank(
            min_rank,
            max_rank,
            budget=budget,
            reassign_every=reassign_every,
            seed=settings.get("seed", 42),
        )
        super().__init__(**{"aggregation": "rbla", "ranks": policy, **settings})


class Replication(FedLoRA):
    """Low rank for all, high rank for the best, missing entries replicated: arXiv 2406.17477.

    Parameters
    ----------
    low, high : int (default: 5, 20)
        Ranks as reported of the paper.
    best_fraction : float (default: 0.1)
        Share of the clients that get the high rank after their first round.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(
        self, *, low: int = 5, high: int = 20, best_fraction: float = 0.1, **settings: Any
    ) -> None:
        policy = policies.QualityRank(low, high, best_fraction)
        super().__init__(**{"aggregation": "replication", "ranks": policy, **settings})


class AdaptiveSampling(FedLoRA):
    """Who joins how often, and with how much of the adapter, so that a run ends soonest.

    Adaptive federated LoRA over heterogeneous wireless networks with independent sampling,
    as reported of the paper: two pilots estimate how sampling slows the run down, the planner
    chooses probabilities and sketching ratios, bandwidth is shared so that all finish
    together. Clients train sketches (``fslora``) of at most the rank their policy gives them.

    Parameters
    ----------
    clock : Clock, optional
        A ``SimulatedClock``; default: measured times, for deployments.
    pilot_rounds : int (default: 5)
        Rounds of each pilot.
    pilot_fractions : (float, float) (default: (0.2, 0.05))
        Expected shares of the clients in the two pilots.
    replan_every : int (default: 0)
        Plan again every N rounds; 0: once.
    sketch_cost : float (default: 1.0)
        How much a sketch of k of R entries adds to the variance: ``(R/k)^sketch_cost``.
    q_min : float (default: 0.01)
        No client's probability is below.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        pilot_rounds: int = 5,
        pilot_fractions: Sequence[float] = (0.2, 0.05),
        replan_every: int = 0,
        sketch_cost: float = 1.0,
        q_min: float = 0.01,
        **settings: Any,
    ) -> None:
        sampler = PlannedSampling(
            pilot_rounds=pilot_rounds,
            pilot_fractions=tuple(pilot_fractions),
            replan_every=replan_every,
            sketch_cost=sketch_cost,
            q_min=q_min,
            seed=settings.get("seed", 42),
        )
        super().__init__(
            **{
                "aggregation": "fslora",
                "ranks": policies.UniformRank(16),
                "sampling": sampler,
                "clock": clock,
                **settings,
            }
        )


class HetLoRA(FedLoRA):
    """Norm-weighted zero padding with ranks that prune themselves: arXiv 2401.06432.

    Parameters
    ----------
    max_rank : int (default: 32)
    **settings
        As in ``FedLoRA``.
    """

    def __init__(self, *, max_rank: int = 32, **settings: Any) -> None:
        policy = policies.SelfPruningRank(max_rank)
        super().__init__(**{"aggregation": "hetlora", "ranks": policy, **settings})


class FlexLoRA(FedLoRA):
    """Ranks as devices allow, full products averaged and cut by SVD: arXiv 2402.11505.

    Parameters
    ----------
    max_rank : int (default: 32)
        Nobody gets more than this.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(self, *, max_rank: int = 32, **settings: Any) -> None:
        policy = policies.ReportedRank(max_rank)
        super().__init__(**{"aggregation": "flexlora", "ranks": policy, **settings})


class FLoRA(FedLoRA):
    """Stacked factors, merged exactly into the base: arXiv 2409.05976.

    Parameters
    ----------
    ranks : Sequence[int]
        Ranks by client index, repeated (default: those of the paper's experiments).
    **settings
        As in ``FedLoRA``.
    """

    def __init__(
        self, *, ranks: Sequence[int] = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4), **settings: Any
    ) -> None:
        policy = policies.ListRank(ranks, cycle=True)
        super().__init__(**{"aggregation": "flora", "ranks": policy, **settings})


class FedPLoRA(FedLoRA):
    """Each client trains some rank-one terms, the others folded into its weights: arXiv 2602.16936.

    Parameters
    ----------
    max_rank : int (default: 32)
        Terms that there are; a client trains as many as its device allows.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(self, *, max_rank: int = 32, **settings: Any) -> None:
        policy = policies.ReportedRank(max_rank)
        super().__init__(**{"aggregation": "fold", "ranks": policy, **settings})


class FedRotLoRA(FedLoRA):
    """Factors rotated onto those that were sent before they are averaged: arXiv 2602.23638.

    Parameters
    ----------
    rank : int (default: 8)
        Of all clients, as in the paper; with unequal ranks by ``ranks`` choose another
        ``aggregation`` with ``align=True``, which is this project's own.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(self, *, rank: int = 8, **settings: Any) -> None:
        rule = make_aggregator("fedit", align=True)
        policy = policies.UniformRank(rank)
        super().__init__(**{"aggregation": rule, "ranks": policy, **settings})


class FedSVD(FedLoRA):
    """Only B travels up; then the product's SVD gives an orthonormal A: arXiv 2505.12805.

    Parameters
    ----------
    rank : int (default: 8)
        Of all clients.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(self, *, rank: int = 8, **settings: Any) -> None:
        policy = policies.UniformRank(rank)
        super().__init__(**{"aggregation": "fedsvd", "ranks": policy, **settings})


class FedMomentum(FedLoRA):
    """The mean product's leading values become the factors, the rest the base's: arXiv 2603.08014.

    Parameters
    ----------
    rank : int (default: 8)
        Of all clients.
    **settings
        As in ``FedLoRA``.
    """

    def __init__(self, *, rank: int = 8, **settings: Any) -> None:
        policy = policies.UniformRank(rank)
        super().__init__(**{"aggregation": "fedmomentum", "ranks": policy, **settings})
