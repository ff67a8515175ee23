"""Clients join as a plan says: the one that reaches the target soonest."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.common import log

from strategies.clients import Client
from strategies.records import PilotsRecord, PlanRecord
from strategies.sampling.base import Estimator, Outlook, Restart, register
from strategies.sampling.independent import BernoulliSampling
from strategies.sampling.pilots import Pilots
from strategies.sampling.plans import Basis, Draw, plan_of, plan_record, plan_state, seconds_between
from strategies.sampling.refining import Refining
from strategies.seeding import stream
from strategies.wallclock.choosing import Choice, choose_way
from strategies.wallclock.convergence import sampling_variance
from strategies.wallclock.objective import ClientProfiles, Phi
from strategies.wallclock.planner import Plan, plan

# Data weights that moved by more than this share of their sum are worth another plan.
_MOVED = 0.1
# So is a β that moved by a quarter.
_REFINED = 1.25


@register
class PlannedSampling(BernoulliSampling):
    """Plan whom to ask how often, for how much rank, so that a run ends soonest.

    Adaptive federated LoRA [R]; the planner is `strategies.wallclock.planner`, with the certainty
    of each step. With a sketching rule the plan chooses each client's rank up to the one it was
    given, and the variance of its update grows by ``φ = R/k``; otherwise ranks stay, with φ = 1.

    A run is planned from its first round, with α = β = 1: m clients a round need m/(m − 1) times
    the rounds of all (and where not even all of them reached that, with twice the least β that
    they do). The run's own losses then refine β, see `Refining`, and another plan is made when it
    has moved by a quarter [D]. α only scales the number of rounds, so it moves no plan.

    With pilots, as published, it has three parts instead:

    - Pilot 1, rounds 1 to ``P = pilot_rounds``: everyone joins with the same probability, the
      first of ``pilot_fractions``, at the rank the policy gives.
    - Pilot 2, rounds P + 1 to 2 P, with the second, from the initial model again. α and β are
      then fitted to the loss curves of both (`estimate_convergence`).
    - The run itself, from the better of the two models, as planned.

    It plans again every ``replan_every`` rounds, and when clients come or go, the policy gives
    other ranks, or a tenth of the data weights moved to other clients [D].

    Nothing of this ends a run [D]. If the pilots cannot tell α from β, the cautious bound of
    `estimate_convergence` is planned with. If they have no loss in common, or none was
    reported, sampling stays uniform, with the larger of the pilots' probabilities. If the target
    is out of reach even with everybody, everybody joins until the next plan is due; where the
    clock has yet to measure, for a round, with sketches of a quarter if the rule takes any: the
    slowest line decides what measuring costs. Each is logged as a warning and said in ``record``.

    Parameters
    ----------
    pilot_rounds : int, optional
        ``P``, at least 2. (default: 5 if ``pilot_fractions`` are given, else no pilots)
    pilot_fractions : (float, float), optional
        Probabilities of the pilots, different, in (0, 1]. A pilot needs participants in most of
        its rounds: with few clients take larger ones. (default: (0.2, 0.05) if ``pilot_rounds``
        is given, else no pilots)
    alpha, beta : float, optional
        Constants of the number of rounds, > 0. With both there are no pilots, and nothing is
        refined.
    replan_every : int (default: 0)
        Plan again, with fresh estimates of speeds and channels, after this many rounds; 0: only
        when it must.
    q_min : float (default: 0.01)
        Least probability of a client, in (0, 1].
    idle_seconds : float, optional
        Time of a round in which nobody joins (default: the clock's).
    ranks : Sequence[int], optional
        What a sketch may have; a client whose rank is below all of them sends its whole rank.
        (default: powers of two up to the client's rank, and that rank itself)
    sketch_cost : float (default: 1.0)
        ``γ`` in ``φ = (R/k)^γ``, at least 0. 1 is what the theory gives for one step of plain
        gradient descent; with several local steps of Adam sketches cost fewer rounds than that
        (docs/results.md), and 0 says they cost none [D].
    seed : int (default: 42)
        Of the planner's sets of participants; each plan draws from (seed, round).
    estimator, server_rate
        As in `BernoulliSampling`.

    Raises
    ------
    ValueError
        If an argument is out of range, or only one of alpha and beta is given.
    """

    name = "planned"
    needs_weights = True
    needs_cost = True

    def __init__(
        self,
        *,
        pilot_rounds: int | None = None,
        pilot_fractions: Sequence[float] | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        replan_every: int = 0,
        q_min: float = 0.01,
        idle_seconds: float | None = None,
        ranks: Sequence[int] | None = None,
        sketch_cost: float = 1.0,
        seed: int = 42,
        estimator: Estimator = "auto",
        server_rate: float = 1.0,
    ) -> None:
        super().__init__(estimator=estimator, server_rate=server_rate)
        if (alpha is None) != (beta is None):
            raise ValueError("expected both alpha and beta, or neither, got one of them")
        for what, value in (("alpha", alpha), ("beta", beta)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{what}: expected a number above 0, got {value!r}")
        if replan_every < 0:
            raise ValueError(f"replan_every: expected 0 (never) or more, got {replan_every!r}")
        if not 0 < q_min <= 1:
            raise ValueError(f"q_min: expected a number in (0, 1], got {q_min!r}")
        if idle_seconds is not None and not (math.isfinite(idle_seconds) and idle_seconds >= 0):
            raise ValueError(f"idle_seconds: expected 0 or more, got {idle_seconds!r}")
        if not (math.isfinite(sketch_cost) and sketch_cost >= 0):
            raise ValueError(f"sketch_cost: expected 0 or more, got {sketch_cost!r}")
        if ranks is not None and (not ranks or min(ranks) < 1):
            raise ValueError(f"ranks: expected numbers of at least 1, got {list(ranks)!r}")
        self.replan_every = replan_every
        self.q_min = q_min
        self.idle_seconds = idle_seconds
        self.candidates = None if ranks is None else sorted(set(ranks))
        self.sketch_cost = sketch_cost
        self.seed = seed
        wanted = pilot_rounds is not None or pilot_fractions is not None
        self.pilots: Pilots | None = None
        if wanted and alpha is None:
            rounds = 5 if pilot_rounds is None else pilot_rounds
            fractions = (0.2, 0.05) if pilot_fractions is None else pilot_fractions
            self.pilots = Pilots(rounds, fractions)
        #: α and β, as far as they are known.
        self.convergence = None if alpha is None or beta is None else (alpha, beta)
        self._concluded = False  # whether the pilots were evaluated
        self._refining = Refining() if alpha is None and self.pilots is None else None
        self._draw: Draw | None = None  # of this round
        self._basis: Basis | None = None
        self._plan: Plan | None = None  # None where there could be none
        self._k: dict[int, int] = {}
        self._told: list[PilotsRecord | PlanRecord] = []

    # ----- before a round ------------------------------------------------------------------

    def restart(self, server_round: int) -> Restart | None:
        """Return "start" before pilot 2, "back" after it if pilot 1 got further."""
        return self.pilots.restart(server_round) if self.pilots else None

    def prepare(self, outlook: Outlook) -> None:
        """Run the pilots, then plan when that is due."""
        if not outlook.clients:
            return
        running = self.pilots.running(outlook.server_round) if self.pilots else None
        if self.pilots and running is not None:
            chance = self.pilots.fractions[running]
            self._uniform(outlook, chance)
            self.pilots.learn_variance(
                outlook.server_round,
                sampling_variance(
                    chance, outlook.weights, self._phi(outlook)(np.array(outlook.ranks))
                ),
            )
            return
        if self.pilots and not self._concluded:
            self._conclude(self.pilots, outlook.server_round)
        cause = self._refine(self._refining, outlook) if self._refining else ""
        if self.convergence is not None:
            if cause := self._due(outlook) or cause:
                self._make(outlook, *self.convergence, cause)
        elif self.pilots:
            self._uniform(outlook, max(self.pilots.fractions))
        if self._refining:
            k = np.array(self.ranks(outlook.clients, outlook.ranks), np.float64)
            self._draw = Draw.of(outlook, self._q, self._phi(outlook)(k))

    def _refine(self, book: Refining, outlook: Outlook) -> str:
        """Take what the losses say of β; return why that is worth another plan, or nothing."""
        if self.convergence is None:
            book.beta = self._guess(outlook)
            self.convergence = 1.0, book.beta
            return ""
        beta, before = book.estimate(), self.convergence[1]
        if max(beta, before) < _REFINED * min(beta, before):
            return ""
        self.convergence = self.convergence[0], beta
        return f"beta, by the losses so far, is {beta:.3g} rather than {before:.3g}"

    def _guess(self, outlook: Outlook) -> float:
        """Return the β to begin with: 1, or twice the least that everybody reaches."""
        phi = [float(self._phi(outlook)(np.array(ks)).min()) for ks in self._options(outlook)]
        return max(1.0, 2 * float((outlook.weights**2 * phi).sum()))

    def ways(self, outlook: Outlook, **options: Any) -> Choice:
        """Return which way is promised to end soonest, before anybody is asked.

        Parameters
        ----------
        outlook : Outlook
        **options
            Of `choose_way`.
        """
        alpha, beta = self.convergence or (1.0, self._guess(outlook))
        options |= {"phi": self._phi(outlook), "idle_seconds": self._idle(outlook)}
        options |= {"q_min": self.q_min, "rng": stream(self.seed, "ways")}
        return choose_way(self._profiles(outlook), alpha, beta, **options)

    def sample(
        self, clients: Sequence[Client], server_round: int, rng: np.random.Generator
    ) -> list[Client]:
        """Return the clients whose coin says so; possibly none."""
        chosen = super().sample(clients, server_round, rng)
        if self._refining and self._draw:
            self._draw.tell(self._refining, server_round, chosen)
        return chosen

    def _uniform(self, outlook: Outlook, chance: float) -> None:
        self._q = {client.index: chance for client in outlook.clients}
        self._k = {}

    def _conclude(self, pilots: Pilots, server_round: int) -> None:
        """Fit α and β, once."""
        self._concluded = True
        self.convergence, told = pilots.conclude(server_round)
        self._told.append(told)

    # ----- plans ---------------------------------------------------------------------------

    def _due(self, outlook: Outlook) -> str:
        """Return why to plan before this round; empty: the last plan holds."""
        old, new = self._basis, Basis.of(outlook)
        if old is None:
            return "first plan"
        if old.clients != new.clients:
            return "clients came or went"
        if old.ranks != new.ranks:
            return "the ranks changed"
        if np.abs(np.subtract(old.weights, new.weights)).sum() / 2 > _MOVED:
            return "the data weights changed"
        if self.replan_every and new.server_round - old.server_round >= self.replan_every:
            return f"{new.server_round - old.server_round} rounds since the last plan"
        return ""

    def _make(self, outlook: Outlook, alpha: float, beta: float, cause: str) -> None:
        began = time.perf_counter()
        basis = Basis.of(outlook)
        same = self._basis is not None and self._basis.clients == basis.clients
        reason, measured, between = "", False, None
        try:
            profiles = self._profiles(outlook)
            measured = True
            made = plan(
                profiles,
                alpha,
                beta,
                rng=stream(self.seed, "plan", basis.server_round),
                phi=self._phi(outlook),
                q_min=self.q_min,
                idle_seconds=self._idle(outlook),
                warm_start=self._plan if same else None,
            )
        except ValueError as error:  # a running deployment goes on
            reason = f"{error}; until the next plan everybody joins"
            log(WARNING, "round %s: no plan: %s", basis.server_round, reason)
            self._plan = None
            self._uniform(outlook, 1.0)
            if not measured:
                options = zip(basis.clients, basis.ranks, self._options(outlook), strict=True)
                for client, rank, ks in options:
                    self._k[client] = min(ks, key=lambda k: abs(4 * k - rank))
        else:
            self._plan = made
            self._q = dict(zip(basis.clients, made.q.tolist(), strict=True))
            self._k = dict(zip(basis.clients, made.k.tolist(), strict=True))
            between = seconds_between(outlook, made, self._profiles, self._idle(outlook))
            log(INFO, "plan (%s): %s", cause, made.summary())
        # A clock that has yet to measure may know in a round; an unreachable target stays one.
        self._basis = basis if measured else None
        seconds = round(time.perf_counter() - began, 4)
        told = {"cause": cause, "reason": reason, "between": between, "planner_seconds": seconds}
        told |= {"alpha": alpha, "beta": beta}
        self._told.append(plan_record(basis, self._plan, self._q, self._k, **told))

    def _profiles(self, outlook: Outlook) -> ClientProfiles:
        basis = Basis.of(outlook)
        return outlook.clock.profiles(
            basis.clients, basis.weights, self._options(outlook),
            outlook.upload_bytes, outlook.full_rank, basis.server_round,
        )  # fmt: skip

    def _idle(self, outlook: Outlook) -> float:
        return outlook.clock.idle_seconds if self.idle_seconds is None else self.idle_seconds

    def _phi(self, outlook: Outlook) -> Phi:
        """Return what maps ranks to variance factors: ``(R/k)^γ`` for sketches [D], else 1."""
        if not (outlook.sketches and outlook.sketches_cost):
            return np.ones_like
        full, cost = outlook.full_rank, self.sketch_cost
        return lambda k: (full / np.asarray(k, np.float64)) ** cost

    def _options(self, outlook: Outlook) -> list[list[int]]:
        """Return the ranks that each client may be sent instead of the one it was given."""
        ranks = map(int, outlook.ranks)
        if not outlook.sketches:
            return [[rank] for rank in ranks]
        if self.candidates is None:
            return [sorted({r, *(2**i for i in range(r.bit_length()))}) for r in ranks]
        return [[k for k in self.candidates if k <= rank] or [rank] for rank in ranks]

    # ----- what the strategy asks and says ---------------------------------------------------

    @property
    def wants_loss(self) -> bool:
        """Whether the pilots are still to be evaluated."""
        return self.pilots is not None and not self._concluded

    @property
    def planned_seconds(self) -> float | None:
        """Expected seconds of a round by the current plan; None without one."""
        return None if self._plan is None else self._plan.round_seconds

    def ranks(self, clients: Sequence[Client], ranks: Sequence[int]) -> list[int]:
        """Return the planned ranks; without a plan, those given."""
        pairs = zip(clients, ranks, strict=True)
        return [min(rank, self._k.get(client.index, rank)) for client, rank in pairs]

    def learn_loss(self, server_round: int, loss: float) -> None:
        """Take the global loss: always of one kind, on the same data."""
        for book in (self.pilots, self._refining):
            if book:
                book.learn_loss(server_round, loss)

    def record(self) -> PilotsRecord | PlanRecord | None:
        """Return the next untold result of the pilots, or plan; None when all are told."""
        return self._told.pop(0) if self._told else None

    def state_dict(self) -> dict[str, Any]:
        """Return the books of losses, the estimate, the plan and what it was made for."""
        return {
            **({"refining": self._refining.state_dict()} if self._refining else {}),
            "pilots": None if self.pilots is None else self.pilots.state_dict(),
            "concluded": self._concluded,
            "convergence": None if self.convergence is None else list(self.convergence),
            "basis": None if self._basis is None else dict(vars(self._basis)),
            "plan": plan_state(self._plan),
            "q": {str(index): q for index, q in sorted(self._q.items())},
            "k": {str(index): k for index, k in sorted(self._k.items())},
            "told": list(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        if self.pilots and state["pilots"]:
            self.pilots.load_state_dict(state["pilots"])
        self._concluded = bool(state["concluded"])
        if not self.pilots and state["pilots"] and not self._concluded:
            raise ValueError(
                f"{self.name}: the saved run was in its pilots, and this one has none; go on with "
                "pilot_rounds as they were (sampling.pilots = true)"
            )
        if self._refining and state.get("refining"):
            self._refining.load_state_dict(state["refining"])
        elif state["convergence"] is not None:  # saved by a run that had pilots
            self._refining = None
        if (found := state["convergence"]) is not None:
            self.convergence = float(found[0]), float(found[1])
        self._basis = None if state["basis"] is None else Basis(**state["basis"])
        self._plan = plan_of(state["plan"])
        self._q = {int(index): float(q) for index, q in state["q"].items()}
        self._k = {int(index): int(k) for index, k in state["k"].items()}
        self._told = list(state["told"])

    def summary(self) -> str:
        """Return the settings in one line."""
        parts = [f"q at least {self.q_min:g}"]
        if self.pilots:
            first, second = self.pilots.fractions
            parts.append(f"pilots of {self.pilots.rounds} rounds with q = {first:g} and {second:g}")
        elif self._refining:
            parts.append("refined as it goes")
        elif self.convergence:
            parts.append("alpha {:g}, beta {:g}".format(*self.convergence))
        if self.replan_every:
            parts.append(f"again every {self.replan_every} rounds")
        return f"{self.name} ({', '.join(parts)})"
