"""The sampler of a run config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from strategies.sampling import (
    FractionSampling,
    IndependentSampling,
    PlannedSampling,
    Sampler,
    StatisticalSampling,
    WeightedSampling,
    make_sampler,
)

if TYPE_CHECKING:
    from fedlora_app.config import RunConfig


def make_run_sampler(config: RunConfig) -> Sampler:
    """Return the sampler of the run config."""
    c = config.sampling
    coins: dict[str, Any] = {"estimator": c.estimator, "server_rate": c.server_rate}
    match c.policy:
        case "fraction":
            return FractionSampling(c.fraction, min_clients=c.min_clients, clients=c.clients)
        case "independent":
            return IndependentSampling(c.probabilities(), **coins)
        case "weighted":
            return WeightedSampling(c.fraction, q_min=c.q_min, **coins)
        case "statistical":
            return StatisticalSampling(c.fraction, q_min=c.q_min, **coins)
        case "planned":
            return PlannedSampling(
                pilot_rounds=c.pilot_rounds,
                pilot_fractions=c.pilots(),
                alpha=c.alpha or None,
                beta=c.beta or None,
                replan_every=c.replan_every,
                sketch_cost=c.sketch_cost,
                q_min=c.q_min,
                seed=config.seed,
                **coins,
            )
        case own:
            return make_sampler(own, **c.settings())
