"""What a federation is compared with, as a client hears of it: more to train, alone or for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedlora_app.config.keys import RunConfig, TrainConfig
from fedlora_app.data.rows import train_validation_split
from fedlora_app.tasks import Indices
from strategies.sampling.fraction import FractionSampling

TIMES_KEY = "steps-factor"  # rounds to train one after the other
CENTRAL_KEY = "all-rows"  # train on what all clients have together
TUNE_KEY = "tune"  # train for oneself what the federation has trained
OWN_KEY = "own-scores"  # on rows held out here: "after" training, or "both" before and after
BEFORE, AFTER = "before_", "after_"

NOT_HERE = (
    "method = 'central' is a simulation's baseline: the rows of real sites cannot be put in one "
    "place; set another method"
)


def trains_alone(message: Mapping[str, Any]) -> bool:
    """Tell whether a message asks for another training than a round's."""
    return CENTRAL_KEY in message or TUNE_KEY in message or int(message.get(TIMES_KEY, 1)) > 1


def training_of(config: RunConfig, message: Mapping[str, Any], clients: int) -> TrainConfig:
    """Return how much a message wants to be trained.

    Parameters
    ----------
    config : RunConfig
    message : mapping
        The received config.
    clients : int
        How many there are in the simulation. Whoever trains for all of them sees as many rows in a
        round as those that would be asked.
    """
    settings, sampling = config.train, config.sampling
    if TUNE_KEY in message and settings.personal_steps:
        return replace(settings, steps=settings.personal_steps)
    if CENTRAL_KEY not in message:
        return settings
    chosen = FractionSampling(
        sampling.fraction, min_clients=sampling.min_clients, clients=sampling.clients
    ).size(clients)
    return replace(
        settings, steps=settings.steps * chosen, epochs=settings.epochs * chosen / clients
    )


def together(shares: Sequence[Indices], config: RunConfig) -> tuple[Indices, Indices]:
    """Return the rows that all clients train on, and those they hold out, each as it does alone."""
    fraction, seed = config.data.validation_fraction, config.seed
    parts = [
        [share[some] for some in train_validation_split(range(len(share)), fraction, seed)]
        for share in shares
    ]
    kept, held_out = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    return kept, held_out


def own_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return a client's scores on its own rows as it reports them."""
    found = {f"{BEFORE}{name}": value for name, value in before.items()}
    return found | {f"{AFTER}{name}": value for name, value in after.items()}
