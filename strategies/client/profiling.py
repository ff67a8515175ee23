"""What a client answers when the server asks who it is, and what its data is like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import ArrayLike

from strategies.capacity import CAPACITY_KEY
from strategies.privacy.mechanism import NOISE_KEY
from strategies.profiling import METRICS, PROFILE_KEY, SAMPLES_KEY, Profile, profile_metrics

# Where a client keeps its answer to the profiling query.
PROFILED_KEY = "fedlora.profile"
# What a node says of itself in answer to a query, as far as its node config has it.
IDENTITY_KEYS = ("partition-id", "max-rank", "num-examples")

LossesAndLabels = Profile | tuple[ArrayLike, ArrayLike]
Measure = Callable[..., LossesAndLabels]
CapacityOf = Callable[[Context, Mapping[str, Any]], Mapping[str, Any]]


def profile(
    state: RecordDict, measure: Measure, *, again: bool = False, limit: int = 0
) -> dict[str, float | int]:
    """Return a client's profile for ``AutoRank``, measured once and kept in its Flower state.

    Parameters
    ----------
    state : RecordDict
        ``context.state``; the profile is kept there as ``fedlora.profile``.
    measure : callable
        Returns the losses of the training samples (or of ``profile_rows`` of them) and the
        labels of all of them, as a ``Profile`` where there is not one label for each sample. Called
        only if nothing is kept, or ``again``; as ``measure(limit=limit)`` where it takes that and
        there is one.
    again : bool (default: False)
        Measure anew, e.g. after the received adapter was loaded because a training message
        says ``profile``.
    limit : int (default: 0)
        So many rows are to go through the model (``profile-samples`` in the message); 0: all.

    Returns
    -------
    dict
        The three numbers of ``profile_metrics``, and ``num-examples``, the rows, which every
        reply of a Flower client holds anyway: a query reports it for the server's log.
    """
    if again or PROFILED_KEY not in state:
        measured = measure(limit=limit) if limit > 0 and _takes_limit(measure) else measure()
        losses, labels = measured
        rows = measured.rows if isinstance(measured, Profile) else len(labels)  # type: ignore[arg-type]
        found = profile_metrics(losses, labels)
        state[PROFILED_KEY] = MetricRecord({**found, "num-examples": rows})
    return dict(state.metric_records[PROFILED_KEY])  # type: ignore[arg-type]


def register_profile(
    app: ClientApp,
    measure: Callable[..., LossesAndLabels],
    *,
    capacity_of: CapacityOf | None = None,
) -> None:
    """Let a Message API app answer the server's queries, profiling included.

    ``register_profile(app, my_losses_and_labels)`` registers the app's ``@app.query()``
    handler. It answers ``partition-id`` and ``max-rank`` from the node config and, where a
    profile is asked for, the three numbers of ``profile_metrics`` and ``num-examples``. A node
    says no number of examples, and answers a request for a profile with an error, if the run
    is private or its node config insists on it (``dp-noise-multiplier``).

    Parameters
    ----------
    app : ClientApp
        Without a query handler of its own.
    measure : callable
        ``measure(context)`` returns the losses of the training samples on the model as the
        run starts from it, and the labels. Called once a node and run. If it has a parameter
        ``limit``, it gets in it how many rows the server wants to go through the model
        (``AutoRank(profile_samples=…)``); 0: all.
    capacity_of : callable, optional
        As in ``register_identity``.

    Raises
    ------
    TypeError
        If ``measure`` cannot be called with a context alone, as ``losses_and_labels`` itself
        cannot.
    """
    if not callable(measure) or not _takes_one(measure):
        name = getattr(measure, "__name__", repr(measure))
        raise TypeError(
            f"measure: expected a function of one argument, the context, got {name}; write "
            f"register_profile(app, lambda context: {name}(…))"
        )

    def profiled_here(context: Context, limit: int) -> dict[str, float | int]:
        if _takes_limit(measure):
            return profile(context.state, lambda: measure(context, limit=limit))
        return profile(context.state, lambda: measure(context))

    _answer_queries(app, profiled_here, capacity_of)


def register_identity(app: ClientApp, *, capacity_of: CapacityOf | None = None) -> None:
    """Let a Message API app answer who it is: ``partition-id`` and ``max-rank`` of its node config.

    With it the server gives each node the rank it can hold, and the same seed gives the same
    bytes: without, clients are told apart by Flower's node ids, which are random. An app with
    ``register_profile`` has it already.

    Parameters
    ----------
    app : ClientApp
        Without a query handler of its own.
    capacity_of : callable, optional
        ``capacity_of(context, config)`` returns what ``strategies.client.capacity(context.state,
        config, …)`` does; for ``CapacityRank``, which gives others its ``fallback``.
    """
    _answer_queries(app, None, capacity_of)


def _takes_one(measure: Callable[..., Any]) -> bool:
    more = {"limit": 0} if _takes_limit(measure) else {}
    try:
        inspect.signature(measure).bind(None, **more)
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return True
    return True


def _takes_limit(measure: Callable[..., Any]) -> bool:
    """Return whether a measure has a parameter by that name, one that nobody has set yet."""
    try:
        found = inspect.signature(measure).parameters.get("limit")
    except (TypeError, ValueError):
        return False
    keywords = getattr(measure, "keywords", {})  # of a functools.partial
    return found is not None and "limit" not in keywords


def _answer_queries(
    app: ClientApp,
    profile_of: Callable[[Context, int], dict[str, float | int]] | None,
    capacity_of: CapacityOf | None,
) -> None:
    @app.query()
    def answer(message: Message, context: Context) -> Message:
        node = context.node_config
        asked = message.content.config_records.values()
        private = NOISE_KEY in node or any(NOISE_KEY in config for config in asked)
        known = {k: node[k] for k in IDENTITY_KEYS if k in node}
        if private:
            known.pop("num-examples", None)
        content = RecordDict({"properties": ConfigRecord(known)})  # type: ignore[arg-type]
        wanted = next((config for config in asked if config.get(CAPACITY_KEY)), None)
        if wanted is not None and capacity_of is not None and not private:
            known |= dict(capacity_of(context, wanted))
            content["properties"] = ConfigRecord(known)  # type: ignore[arg-type]
        if any(config.get(PROFILE_KEY) for config in asked):
            if private:
                raise ValueError(
                    "this node keeps its data private, but the message asks for a profile of its "
                    "rows; use a rank policy that needs none"
                )
            if profile_of is None:
                raise ValueError(
                    "the server asks for a profile; register_profile(app, measure) gives one"
                )
            limit = max(int(config.get(SAMPLES_KEY, 0)) for config in asked)  # type: ignore[arg-type]
            found = profile_of(context, limit)
            content["profile"] = MetricRecord(found)  # type: ignore[arg-type]
        return Message(content, reply_to=message)


def profile_wanted(config: Mapping[str, Any]) -> bool:
    """Tell whether a training message asks to profile the adapter that came with it."""
    return bool(config.get(PROFILE_KEY))


def profile_if_wanted(
    config: Mapping[str, Any], state: RecordDict | None, measure: Measure | None
) -> None:
    """Profile the adapter that came with a training message, if that asks for it.

    Raises
    ------
    ValueError
        If there is no state to keep the profile in.
    """
    if measure is None or not profile_wanted(config):
        return
    if state is None:
        raise ValueError(
            "the server asks for a profile, which is kept in the Flower state; pass the context "
            "(a NumPyClient: context.state)"
        )
    profile(state, measure, again=True, limit=int(config.get(SAMPLES_KEY, 0)))


def profiled(state: RecordDict) -> dict[str, float]:
    """Return the numbers of the profile that is kept in a Flower state, if there is one."""
    if PROFILED_KEY not in state:
        return {}
    kept = state.metric_records[PROFILED_KEY]
    return {key: float(kept[key]) for key in METRICS}  # type: ignore[arg-type]
