"""The server's part: which (ε, δ) the noise on the clients' updates gives, and against whom.

Client n sends ``x + clip_C(d_n) + N(0, (z C)²)`` with ``x`` what it was sent. Two guarantees:

**Against the server**, which sees each update and who sent it: every round in which a client
takes part is one Gaussian mechanism on all of its data. Replacing the data moves the clipped
displacement by up to ``2C``, so the noise is ``z / 2`` sensitivities. Sampling does not hide who
takes part; it only makes taking part rarer. See ``local_epsilon``.

**Against those who see only the models** (other clients, whoever gets the result), if the server
is trusted, replies are not forged and nobody learns who took part: sampling hides a client, and
the noises of a round add up. See ``central_epsilon`` and ``refuse_amplification``.

Both hold for the whole data of a client, hence for every row of it: no row counts for more.
All numbers are upper bounds; of several valid ones the least is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from strategies.privacy.releases import (
    Fixed,
    Gaussian,
    Poisson,
    Release,
    check_delta,
    check_release,
)
from strategies.privacy.spent import gaussian_epsilon, total

Sampling = Literal["all", "fixed", "poisson"]
Neighbours = Literal["replace", "remove"]


def epsilon(releases: Mapping[Release, int], delta: float) -> float:
    """Return ε after releases that may depend on those before them.

    Without sampling it is exact (Balle and Wang, https://arxiv.org/abs/1805.06530 [P]): k
    releases of multiplier σ are one of ``σ / √k``. Otherwise Rényi DP as ``dp-accounting`` has
    it (Mironov, Talwar and Zhang, https://arxiv.org/abs/1908.10530, for Poisson; Wang, Balle
    and Kasiviswanathan, https://arxiv.org/abs/1808.00087, for fixed size [P]), or what holds
    without sampling if that is less, as it may be at high rates.

    Parameters
    ----------
    releases : Mapping[Release, int]
        How often each was made; all for the same notion of neighbours.
    delta : float
        In (0, 1).

    Raises
    ------
    ValueError
        If a number is out of range, or ``Fixed`` and ``Poisson`` are mixed.
    ImportError
        If sampling is to be accounted for and ``dp-accounting`` is missing.
    """
    check_delta(delta)
    return total(releases).epsilon(delta)


def local_epsilon(
    noise_multiplier: float,
    delta: float,
    rounds: int,
    *,
    probability: float = 1.0,
    neighbours: Neighbours = "replace",
) -> float:
    """Return a client's ε against everybody, the server included.

    Parameters
    ----------
    noise_multiplier : float
        ``z``: standard deviation of the noise over the clipping norm.
    delta : float
        In (0, 1).
    rounds : int
        Rounds in which the client is asked to train.
    probability : float (default: 1.0)
        Before a run of ``rounds`` rounds: the probability to be asked in each, by coins that
        nobody knows in advance and that no data moves. δ is then the mean over the number
        of rounds that come out, exactly; who is asked need not stay secret (derived here [D]).
        After the run, give the rounds it was asked in and leave this at 1.
    neighbours : "replace" or "remove" (default: "replace")
        What stays hidden: which data the client has (sensitivity 2C), or only whether it
        trained on them or sent pure noise (sensitivity C).

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    check_delta(delta)
    if rounds < 0:
        raise ValueError(f"rounds: expected 0 or more, got {rounds!r}")
    check_release(Poisson(noise_multiplier, probability))
    multiplier = noise_multiplier / _distance(neighbours)
    if rounds == 0 or probability == 0:
        return 0.0
    if multiplier == 0:
        return math.inf
    from scipy.stats import binom

    counts = np.arange(1, rounds + 1)
    chances = binom.pmf(counts, rounds, probability)
    weights = {multiplier / math.sqrt(k): float(p) for k, p in zip(counts, chances, strict=True)}
    return gaussian_epsilon(weights, delta)


def central_epsilon(
    noise_multiplier: float,
    delta: float,
    rounds: int,
    *,
    sampling: Sampling,
    clients: int = 1,
    sample: int = 1,
    probability: float = 1.0,
) -> float:
    """Return a client's ε against those who see the models only; see the module's docstring.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of all the noise in the sum of the updates over the norm of the
        client's part in it: ``z`` for one noise, ``z·√m`` where ``m`` independent equal noises
        are summed. Under "poisson" it must not depend on who joins (``top_up``), and the part
        of client n is ``(a_n / q_n)·C``, so it differs from client to client.
    delta : float
        In (0, 1).
    rounds : int
    sampling : "all", "fixed" or "poisson"
        "all" and "fixed" protect against replacing a client's data, "poisson" against
        removing the client. A replacement is two removals: ``(2ε, (1 + e^ε)δ)``.
    clients, sample : int (default: 1)
        "fixed": how many there are and how many of them join.
    probability : float (default: 1.0)
        "poisson": the client's ``q_n``.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    if rounds < 0:
        raise ValueError(f"rounds: expected 0 or more, got {rounds!r}")
    release: Release
    match sampling:
        case "all":
            release, rate, multiplier = Gaussian(noise_multiplier / 2), 1.0, noise_multiplier
        case "fixed":
            release = Fixed(noise_multiplier / 2, clients, sample)
            rate, multiplier = min(1.0, sample / max(clients, 1)), noise_multiplier
        case "poisson":
            release, rate = Poisson(noise_multiplier, probability), probability
            multiplier = 2 * noise_multiplier  # ``local_epsilon`` halves it
        case other:
            raise ValueError(f"sampling: expected all, fixed or poisson, got {other!r}")
    hidden = epsilon({release: rounds}, delta)
    # Telling who joined cannot make a guarantee better, so what holds then holds here.
    return min(hidden, local_epsilon(multiplier, delta, rounds, probability=rate))


def top_up(weights: Iterable[float], client_std: float, total_std: float) -> float:
    """Return the standard deviation the server adds so that the sum always has ``total_std``.

    Under independent sampling the clients' own noise in the sum depends on who joined, which
    gives that away. With the rest added by the server it does not, and ``Poisson`` applies
    with ``multiplier = total_std / (w_n C)``. Choose ``total_std`` no less than
    ``client_std · √(Σ w²)`` over ALL clients; else a large draw cannot be hidden.

    Parameters
    ----------
    weights : Iterable[float]
        ``w_n = a_n / q_n`` of those whose updates are in the sum, as it is divided.
    client_std : float
        ``z C``; 0 if the server adds all of the noise.
    total_std : float

    Raises
    ------
    ValueError
        If the clients' noise is already more than that.
    """
    own = client_std**2 * math.fsum(w * w for w in weights)
    rest = total_std**2 - own
    if rest < -1e-9 * own:
        raise ValueError(
            f"total_std: the clients' noise alone is {math.sqrt(own):g} in this draw, more than "
            f"{total_std:g}; use at least client_std · √Σw² over all clients"
        )
    return math.sqrt(max(0.0, rest))


def _distance(neighbours: str) -> float:
    """Return by how many clipping norms neighbours can differ."""
    if neighbours not in ("replace", "remove"):
        raise ValueError(f"neighbours: expected 'replace' or 'remove', got {neighbours!r}")
    return 2.0 if neighbours == "replace" else 1.0
