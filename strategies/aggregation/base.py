"""What an aggregation rule is, and the registry of rules by name.

A rule is three steps with explicit state, so that replies can be folded in as they
arrive and dropped again::

    state = rule.init(current)
    for update in updates:
        rule.add(state, update)
    result = rule.finish(state)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from strategies.aggregation.late import beside
from strategies.aggregation.population import Population
from strategies.aggregation.robust import Robust, make_robust
from strategies.aggregation.state import State
from strategies.aggregation.update import Download as Download
from strategies.aggregation.update import Update as Update
from strategies.lora import Adapter, AdapterError
from strategies.naming import Registry
from strategies.promises import declares, those_that_declare

# Sums are float32: weights further apart than this would overflow or vanish in them.
LARGEST_WEIGHT = 1e18

StateT = TypeVar("StateT", bound="State")
RuleT = TypeVar("RuleT", bound="Aggregator[Any]")


@dataclass(frozen=True)
class AggregationResult:
    """What a round of aggregation produced.

    Parameters
    ----------
    adapter : Adapter
        The new global adapter.
    base_delta : Adapter, optional
        What must be merged into the frozen weights, for rules that do (flora, fedex).
    left_out : Sequence[int]
        Which updates are not in it, in the order they were added, counted from 0; see ``protect``.
    """

    adapter: Adapter
    base_delta: Adapter | None = None
    left_out: Sequence[int] = ()

    def for_rank(self, rank: int) -> Adapter:
        """Return what a client of ``rank`` downloads; a module with less gives what it has."""
        return self.adapter.with_rank({m: min(rank, r) for m, r in self.adapter.ranks.items()})


class Aggregator(ABC, Generic[StateT]):
    """Combine the adapters of clients, possibly of different rank, into one.

    Subclasses say how LoRA pairs are combined. Tensors that are not LoRA pairs (head,
    biases, DoRA magnitudes) are a weighted mean over the clients that sent them, always.
    Sums are float32 whatever the type on the wire.

    With a ``Population`` in the state, what is linear in the updates is unbiased over the draws:
    "divided by the weight of the clients" is then by the weight of all clients, and the
    current adapter takes what is missing. A cut to a rank comes after it and is not linear. Whoever
    takes part must send every module, for the population does not say who has which.
    """

    name: ClassVar[str] = ""
    #: Whether something is merged into the frozen weights, by a ``base_delta`` or ``fixed`` parts.
    merges_base: ClassVar[bool] = False
    #: Whether all clients must have the global rank.
    equal_ranks: ClassVar[bool] = False
    #: Whether updates must come with a ``quality``.
    needs_quality: bool = False
    #: Whether the rule makes sense beside DoRA magnitudes, which belong to given factors.
    supports_dora: ClassVar[bool] = True
    #: Whether a client may be sent fewer entries than its rank.
    sketches: ClassVar[bool] = False
    #: Whether fewer entries than its rank cost variance, as the larger scale of a sketch does.
    sketch_adds_variance: ClassVar[bool] = True
    #: Whether an entry of the rank axis is a mean over those who hold it, however few, so that what
    #: one client alone holds is as large as what all train.
    mean_of_holders: ClassVar[bool] = False
    #: Whether all clients of one rank download the same.
    shares_downloads: ClassVar[bool] = True
    #: Whether, under independent sampling, the rule divides by the weight of the participants
    #: unless told otherwise: less variance where few clients hold an entry.
    default_ratio: ClassVar[bool] = False
    #: Promise (see ``strategies.promises``: not inherited) that with a ``Population`` the result
    #: is right in expectation over the draws, as far as it is linear in the updates: sums are
    #: divided as ``State.over``, ``over_all`` or ``over_holders`` says. Without it no coins
    #: decide who joins.
    unbiased: ClassVar[bool] = False
    #: Promise that for clients of one rank the result is the mean of the updates, by weight, in
    #: every number: noises add up.
    linear: ClassVar[bool] = False
    #: Promise that it is so for clients of any rank, what one does not hold counting as zero or as
    #: unchanged: one of m equal clients moves the model by no more than 1/m of its own change.
    mean_of_all: ClassVar[bool] = False
    #: Promise that the result shows no order of the updates, and nothing that only one of them
    #: could have brought about: it does not tell who took part.
    symmetric: ClassVar[bool] = False
    #: Promise that each number of the result is a weighted mean of those at the same place in the
    #: updates, what one lacks counting as zero or as unchanged: a median may take its place.
    entrywise: ClassVar[bool] = False
    #: Promise that replies to an older model can be added: see ``strategies.aggregation.late``.
    late: ClassVar[bool] = False
    #: Promise that each entry of the rank axis becomes a mean of those who hold it, or stays: then
    #: an adapter may start from factors that were taken out of the frozen weights.
    keeps_start: ClassVar[bool] = False
    #: What keeps liars among the clients from the result; set by ``protect``.
    robust: Robust | None = None
    #: Why clients cannot be sampled independently with this rule as it is set, whatever it
    #: promises; empty: nothing against it.
    sampling_refusal: str = ""
    #: The seed of the run, set by the strategy; for rules that draw.
    run_seed: int = 42
    #: The round in progress, set by the strategy; rules that alternate or reseed read it.
    server_round: int = 0

    def refuse_coins(self) -> str:
        """Return why clients cannot be sampled independently with this rule; empty: they can."""
        if self.sampling_refusal or declares(self, "unbiased"):
            return self.sampling_refusal
        return (
            f"{type(self).__name__} does not declare that it stays unbiased then, and no class "
            "inherits that; use a sampler without probabilities or one of "
            f"{those_that_declare(AGGREGATIONS, 'unbiased')}; if it divides its sums as "
            "State.over says, write unbiased = True into the class"
        )

    def refuse_start(self) -> str:
        """Return why an adapter cannot start from the frozen weights' factors; empty: it can."""
        if declares(self, "keeps_start"):
            return ""
        return (
            f"aggregation {self.name!r} does not declare that it keeps them entry by entry, as "
            f"{those_that_declare(AGGREGATIONS, 'keeps_start')} do: what it shrinks, cuts or puts "
            "elsewhere would be missing in the model"
        )

    def protect(self, robust: Robust | str) -> None:
        """Keep liars among the clients from the result; all updates then count the same.

        Parameters
        ----------
        robust : Robust or str
            Or its registered name; "none": nothing is done.

        Raises
        ------
        ValueError
            If it makes no sense with this rule, with what to use instead.
        """
        made = make_robust(robust)
        if made is None:
            return
        if made.by_entry and not declares(self, "entrywise"):
            raise ValueError(
                f"robust = {made.name!r} takes the place of the mean of each number, and "
                f"{self.name} does not make its result of such means; use robust = 'krum' or "
                "'norm-filter', which leave out whole clients, or one of "
                f"{those_that_declare(AGGREGATIONS, 'entrywise')}"
            )
        if not made.by_entry and (kept := set(self.trained()) - set(self.uploaded())):
            raise ValueError(
                f"robust = {made.name!r} compares what clients change in the model, and with "
                f"{self.name} they keep {', '.join(sorted(kept))} to themselves; use robust = "
                "'median' or 'trimmed-mean'"
            )
        self.robust = made
        self.linear = self.mean_of_all = self.symmetric = self.unbiased = False  # type: ignore[misc]
        self.late = False  # type: ignore[misc]
        self.sampling_refusal = (
            f"robust = {made.name!r} is no mean, and nobody knows what it is on average over the "
            "draws; use a sampler without probabilities, or robust = 'none'"
        )

    def trained(self) -> str:
        """Return the factors that clients train in this round: "AB", "A" or "B"."""
        return "AB"

    def uploaded(self) -> str:
        """Return the factors that clients send back (default: those they train)."""
        return self.trained()

    def downloaded(self) -> str:
        """Return the factors that clients are sent; the others they keep themselves."""
        return "AB"

    def download(self, current: Adapter, rank: int, rng: np.random.Generator) -> Download:
        """Return what a client of ``rank`` trains (default: the leading slice).

        Parameters
        ----------
        current : Adapter
            The global adapter.
        rank : int
            The client's rank; a module with less gives what it has.
        rng : numpy.random.Generator
            Of this client and round; for rules that draw. Unless ``shares_downloads``, a
            client's download is made again when its message goes out and when its reply
            comes, with the same numbers: nothing else may decide what is drawn.
        """
        return Download(current.with_rank({m: min(rank, r) for m, r in current.ranks.items()}))

    def view(self, current: Adapter, rank: int) -> Adapter:
        """Return what a client of ``rank`` evaluates (default: the leading slice)."""
        return current.with_rank({m: min(rank, r) for m, r in current.ranks.items()})

    def check(self, adapter: Adapter) -> None:
        """Refuse a model this rule cannot work with, before anything is sent.

        Raises
        ------
        ValueError
            If the adapter has DoRA magnitudes and the rule cannot keep them true.
        """
        if not self.supports_dora and any("lora_magnitude" in key for key in adapter.dense):
            raise ValueError(
                f"{self.name} changes the factors that DoRA magnitudes belong to; "
                "train without DoRA or use an averaging rule"
            )

    @abstractmethod
    def init(self, current: Adapter) -> StateT:
        """Return the empty state of a round that starts from ``current``."""

    @abstractmethod
    def add_pairs(self, state: StateT, update: Update, weight: float) -> None:
        """Fold the LoRA pairs of one update into ``state``, with ``weight`` in its unit."""

    @abstractmethod
    def finish_pairs(self, state: StateT) -> AggregationResult:
        """Return the result for the LoRA pairs; ``finish`` adds the dense tensors."""

    def add(self, state: StateT, update: Update) -> None:
        """Fold one update into ``state``; the update is not needed afterwards.

        Scales that differ from the global one are folded into ``B`` first. Under ``protect`` it is
        kept, a copy of it, until ``finish``.

        Raises
        ------
        ValueError
            If the weight is not a finite number above 0.
        AdapterError
            If the update holds NaN or Inf or does not fit the current adapter's shapes;
            the state is as it was.
        """
        weight = float(update.weight)
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"expected a finite weight above 0, got {update.weight!r}")
        if not 1 / LARGEST_WEIGHT <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"expected a weight from 1e-18 to 1e18, got {weight:g}")
        # Which modules may be missing is each rule's business.
        problems = update.adapter.differences(state.current, missing_ok=True)
        if problems:
            raise AdapterError(problems + update.adapter.non_finite(), "update")
        folded = self.fold(state, update)
        if problems := folded.adapter.non_finite():  # after folding, which may overflow
            raise AdapterError(problems, "update")
        if self.robust is None:
            self._sum(state, folded, weight * (1.0 if update.late is None else update.late))
            for other, share in beside(update, state.current):
                self._sum(state, self.fold(state, other), weight * share)
        else:
            state.waiting.append(replace(folded, adapter=_copy(folded.adapter), weight=1.0))

    def _sum(self, state: StateT, folded: Update, weight: float) -> None:
        """Add an update that is known to be good to the sums."""
        unit = state.unit or 2.0 ** math.frexp(weight)[1]
        self.add_pairs(state, folded, weight / unit)
        state.unit = unit
        state.note(folded)
        for key, tensor in folded.adapter.dense.items():
            add_into(state.dense, key, tensor, weight / unit)
            state.dense_mass[key] = state.dense_mass.get(key, 0.0) + weight / unit
        state.total += weight / unit
        state.count += 1

    def fold(self, state: StateT, update: Update) -> Update:
        """Return the update at the global scale."""
        scales = {module: pair.scale for module, pair in state.current.pairs.items()}
        return replace(update, adapter=update.adapter.with_scale(scales))

    def finish(self, state: StateT) -> AggregationResult:
        """Return the new global adapter; without updates, the current one.

        The state is used up: its sums become the result, without another copy.
        """
        left_out: Sequence[int] = ()
        if self.robust is not None and state.waiting:
            believed, left_out = self.robust.sift(state.current, state.waiting)
            state.waiting = []
            for update in believed:
                self._sum(state, update, 1.0)
        if state.count == 0:
            return AggregationResult(state.current)
        result = self.finish_pairs(state)
        dense = dict(state.current.dense)
        for key, total in state.dense.items():
            mass, share = state.over(state.dense_mass[key])
            mean = total.div_(mass)
            dense[key] = mean.add_(dense[key], alpha=share) if share else mean
        return AggregationResult(Adapter(result.adapter.pairs, dense), result.base_delta, left_out)

    def aggregate(
        self,
        current: Adapter,
        updates: Iterable[Update | tuple[Adapter, float]],
        population: Population | None = None,
    ) -> AggregationResult:
        """Run ``init``, ``add`` for every update, and ``finish``.

        Parameters
        ----------
        current : Adapter
            The global adapter the round started from.
        updates : Iterable[Update or (Adapter, float)]
            The clients' adapters and weights, in any order; consumed once.
        population : Population, optional
            Whom the updates stand for (default: themselves).

        Raises
        ------
        ValueError
            If there is a population and the rule refuses coins.
        """
        if population is not None and (refusal := self.refuse_coins()):
            raise ValueError(f"{self.name} with a population: {refusal}")
        state = self.init(current)
        state.population = population
        for update in updates:
            self.add(state, update if isinstance(update, Update) else Update(*update))
        return self.finish(state)


def _copy(adapter: Adapter) -> Adapter:
    pairs = {m: replace(p, A=p.A.clone(), B=p.B.clone()) for m, p in adapter.pairs.items()}
    return Adapter(pairs, {key: tensor.clone() for key, tensor in adapter.dense.items()})


def add_into(sums: dict[str, Tensor], key: str, tensor: Tensor, weight: float) -> None:
    """Add ``weight · tensor`` to a float32 sum, in one pass over the memory."""
    if key in sums:
        sums[key].add_(tensor, alpha=weight)
    else:
        sums[key] = tensor.to(torch.float32) * weight


AGGREGATIONS: Registry[Callable[..., Aggregator[Any]]] = Registry()


def register(cls: type[RuleT]) -> type[RuleT]:
    """Make a rule available by its ``name``, in ``make_aggregator`` and the run config.

    Raises
    ------
    ValueError
        If the rule has no name, or another rule has it.
    """
    return AGGREGATIONS.register(cls)


def make_aggregator(name: str, **options: Any) -> Aggregator[Any]:
    """Return the rule registered as ``name``.

    Raises
    ------
    ValueError
        If there is no such rule; the message lists those that exist.
    """
    return AGGREGATIONS.make(name, **options)
