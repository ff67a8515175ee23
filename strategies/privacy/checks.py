"""Which settings would void the guarantee of private updates, and which weaken it.

Everything the server computes from the noised updates is post-processing and costs nothing:
every aggregation rule, ranks and samplers that look at updates, tests of them on the server's
own rows. What voids it is data that leave beside the updates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from strategies.aggregation import AGGREGATIONS, Aggregator
from strategies.promises import declares, those_that_declare

if TYPE_CHECKING:
    from strategies.ranks import RankPolicy
    from strategies.sampling import Sampler


def refuse_private(
    aggregation: Aggregator[Any],
    ranks: RankPolicy,
    sampling: Sampler,
    *,
    evaluate_fraction: float,
) -> list[str]:
    """Return every reason why private updates would not make the run private.

    Parameters
    ----------
    aggregation : Aggregator
    ranks : RankPolicy
    sampling : Sampler
    evaluate_fraction : float
        Share of the clients that evaluate on rows of their own.

    Returns
    -------
    list of str
        Empty if nothing leaves a client but noised updates, as far as settings tell.
    """
    problems = []
    if aggregation.needs_quality:
        problems.append(
            f"aggregation {aggregation.name!r} weighs by the quality that clients measure on their "
            'rows, which leaves without noise; use holder_weights = "data"'
        )
    if aggregation.robust is not None:
        problems.append(
            f"robust = {aggregation.robust.name!r} looks for updates unlike the others, and each "
            "has noise of its own, larger than what it says; use 'none': clipping already bounds "
            "what one client can do"
        )
    if ranks.profiles:
        problems.append(
            f"the rank policy {ranks.name!r} asks clients for numbers on their rows, which leave "
            "without noise; use uniform, list, cycle or reported ranks"
        )
    elif ranks.needs_counts or ranks.reads_loss:
        what = "numbers of rows" if ranks.needs_counts else "training losses"
        problems.append(
            f"the rank policy {ranks.name!r} needs the clients' {what}, which stay with them; use "
            "uniform, list, cycle or reported ranks"
        )
    elif ranks.metrics:
        problems.append(
            f"the rank policy {ranks.name!r} asks clients for {', '.join(ranks.metrics)}, which "
            "leaves without noise; let the server judge (score_fn, ranks.validation-rows)"
        )
    if sampling.needs_weights:
        problems.append(
            f"sampling {sampling.name!r} needs the clients' numbers of rows, which stay with them; "
            "use fraction, or independent with probabilities that come from no data"
        )
    if evaluate_fraction > 0:
        problems.append(
            "clients would report loss and scores on their own rows without noise; set "
            "evaluate_fraction = 0 (evaluate.clients = 0) and test on the server's rows"
        )
    return problems


def refuse_amplification(
    aggregation: Aggregator[Any],
    ranks: RankPolicy,
    sampling: Sampler,
    *,
    secret_draws: bool,
    topped_up: bool = False,
    server_clips: bool = False,
) -> list[str]:
    """Return every reason why sampling does not hide a client from those who see the models.

    The guarantee against the server does not need it. Whoever claims more than that by
    ``Fixed``, ``Poisson`` or summed noises must have an empty list.

    Parameters
    ----------
    aggregation, ranks, sampling
        As ``refuse_private``. That device limits leave all ranks equal is for the caller to see.
    secret_draws : bool
        Whether clients are drawn from a seed that only the server has; the run's own seed is
        known to every client.
    topped_up : bool (default: False)
        Whether the server adds what ``top_up`` says.
    server_clips : bool (default: False)
        Whether the server clips the updates that arrive (``clip-norm``).
    """
    problems = []
    if server_clips:
        problems.append(
            "the server clips what arrives, noise included, so that noises do not add up as they "
            "were drawn; leave clip-norm off, the clients clip already"
        )
    if not secret_draws:
        problems.append("the draws follow from the run's seed, which is public; draw from entropy")
    if not declares(sampling, "blind"):
        problems.append(
            f"sampling {sampling.name!r} may follow the clients' updates or speed, so that "
            "data decide who joins; use fraction or independent"
        )
    if ranks.may_differ:
        problems.append(
            f"with ranks {ranks.name!r} clients may differ in rank, and which entries changed "
            "tells who took part; use uniform"
        )
    if not declares(aggregation, "symmetric"):
        problems.append(
            f"the result of {aggregation.name!r} shows single updates, not only what they make "
            "together; use an averaging rule"
        )
    if sampling.probabilities([]) is not None:
        if not declares(aggregation, "linear"):
            problems.append(
                f"with independent sampling {aggregation.name!r} is not linear in the updates: the "
                "noise depends on who joined; use one of "
                f"{those_that_declare(AGGREGATIONS, 'linear')}"
            )
        ratio = sampling.estimator == "ratio" or (
            sampling.estimator == "auto" and aggregation.default_ratio
        )
        if ratio:
            problems.append(
                "the ratio estimator divides by the weight of who joined, which bounds no "
                'client\'s part; use estimator = "unbiased"'
            )
        if not topped_up:
            problems.append(
                "with independent sampling the clients' noise depends on who joined; let the "
                "server top it up"
            )
    return problems
