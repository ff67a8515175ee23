"""The whole server state of a run: saved after rounds, put back when it is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from logging import INFO, WARNING
from typing import Any, Protocol, runtime_checkable

from flwr.app import MetricRecord
from flwr.common import log
from flwr.serverapp.strategy import Result
from torch import Tensor

from strategies.checkpoint import Checkpoint, Checkpoints, compare_fingerprints
from strategies.checkpoint.format import ASIDE, EARLIER, MOMENTS
from strategies.messages import from_record, to_record
from strategies.progress import Progress

_HISTORY = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)
#: Parts that a run may begin anew where a checkpoint, say an older one, does not have them.
OPTIONAL = {"waiting"}


class Stateful(Protocol):
    """What can save itself as JSON."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""


@runtime_checkable
class HasMoments(Protocol):
    """What has tensors to save as well."""

    moments: dict[str, Tensor]


@runtime_checkable
class HasModels(Protocol):
    """What has models of earlier rounds to save as well."""

    models: dict[str, Tensor]


class Saver:
    """Saves a run's state every few rounds, and goes on from a saved one.

    Everything random is drawn from the seed and the round, so no generator has a state of
    its own to save: a resumed run draws what an uninterrupted one would have drawn.

    Parameters
    ----------
    checkpoints : Checkpoints
        Where, how often, and which to keep.
    resume_from : str (default: "")
        "latest", "best", or the path of a checkpoint; empty: a new run.
    fingerprint : Mapping[str, bool or int or float or str]
        The settings of the run; saved, and compared when it is resumed.
    fatal, ignored : Iterable[str]
        Settings that must be as they were, and those that may differ. All others that
        differ are warned of by name.
    patience : float (default: 60)
        Seconds to wait for the run that is to be resumed: the ServerApp of a SuperLink that
        died notices only when it next reaches one, up to half a minute after that is back.

    Raises
    ------
    FileNotFoundError
        If there is nothing to resume from.
    ValueError
        If the checkpoint is damaged and no other is there, or a fatal setting differs.
    BlockingIOError
        If the run that is to be resumed is still going on after that.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        resume_from: str = "",
        fingerprint: Mapping[str, bool | int | float | str],
        fatal: Iterable[str] = (),
        ignored: Iterable[str] = (),
        patience: float = 60.0,
    ) -> None:
        self.checkpoints = checkpoints
        self.fingerprint = dict(fingerprint)
        self.resumed: Checkpoint | None = None
        #: The round that is resumed from; None for a new run.
        self.round: int | None = None
        if resume_from:
            self.resumed, warnings = matching(
                checkpoints, resume_from, self.fingerprint, fatal=fatal, ignored=ignored
            )
            self.round = self.resumed.round
            # Before anyone touches what else is in the run's folder: the run may be going on.
            checkpoints.claim(self.resumed, patience=patience)
            for warning in warnings:
                log(WARNING, "resume: %s", warning)

    def resume(self, parts: Mapping[str, Stateful], progress: Progress, result: Result) -> int:
        """Put everything back; return the round it was saved after, 0 for a new run.

        Parameters
        ----------
        parts : Mapping[str, Stateful]
            What has a state of its own, by name.
        progress : Progress
        result : Result
            Gets the saved arrays and the history of metrics.

        Raises
        ------
        ValueError
            If the checkpoint is of a run with other parts, say a private one.
        """
        if self.resumed is None:
            self.checkpoints.claim()
            return 0
        saved, self.resumed = self.resumed, None  # its arrays are not needed a second time
        aside = saved.named(ASIDE)
        result.arrays = to_record(saved.model)
        progress.aside = to_record(aside) if aside else None
        progress.rounds, progress.aside_rounds = saved.state["progress"]
        known = saved.state.keys() - {"progress", "history"}
        if differ := (parts.keys() ^ known) - OPTIONAL:
            raise ValueError(
                f"{saved.path} and this run do not both have {', '.join(sorted(differ))}; resume "
                "with the settings of the run that wrote it"
            )
        for name, part in parts.items():
            if name in known:
                part.load_state_dict(saved.state[name])
            if isinstance(part, HasModels):
                part.models = saved.named(EARLIER)
            if isinstance(part, HasMoments):
                part.moments = saved.named(MOMENTS)
        for name in _HISTORY:
            history: dict[int, MetricRecord] = getattr(result, name)
            for server_round, metrics in saved.state["history"][name].items():
                history[int(server_round)] = MetricRecord(metrics)
        log(INFO, "resumed after round %s from %s", saved.round, saved.path)
        return saved.round

    def save(
        self,
        server_round: int,
        num_rounds: int,
        parts: Mapping[str, Stateful],
        progress: Progress,
        result: Result,
        evaluation: Mapping[str, float],
    ) -> None:
        """Save everything if it is time; what cannot be written is warned of, and the run goes on.

        Parameters
        ----------
        server_round, num_rounds : int
        parts, progress, result
            As in ``resume``.
        evaluation : Mapping[str, float]
            The server's scores of this round, by which the best is kept.
        """
        self.hold(server_round, num_rounds, parts, progress, result)(evaluation)

    def hold(
        self,
        server_round: int,
        num_rounds: int,
        parts: Mapping[str, Stateful],
        progress: Progress,
        result: Result,
    ) -> Callable[[Mapping[str, float]], None]:
        """Note everything as it is now, if it is time; return what saves it with the scores.

        Until that is called ``parts`` and ``progress`` may go on, but ``result`` may only get the
        scores of this round. See ``save`` for the parameters.
        """
        if not self.checkpoints.due(server_round, num_rounds):
            return lambda evaluation: None
        arrays = from_record(result.arrays)
        if progress.aside is not None:
            arrays |= {ASIDE + k: t for k, t in from_record(progress.aside).items()}
        for part in parts.values():  # whose tensors are new in every round, never changed in place
            if isinstance(part, HasMoments):
                arrays |= {MOMENTS + k: t for k, t in part.moments.items()}
            if isinstance(part, HasModels):
                arrays |= {EARLIER + k: t for k, t in part.models.items()}
        state: dict[str, Any] = {name: deepcopy(p.state_dict()) for name, p in parts.items()}
        state["progress"] = [progress.rounds, progress.aside_rounds]

        def save(evaluation: Mapping[str, float]) -> None:
            state["history"] = {
                name: {str(r): dict(metrics) for r, metrics in getattr(result, name).items()}
                for name in _HISTORY
            }
            score = self.checkpoints.score_of(evaluation)
            self.checkpoints.save(server_round, arrays, state, self.fingerprint, score)

        return save


def matching(
    checkpoints: Checkpoints,
    resume_from: str,
    fingerprint: Mapping[str, bool | int | float | str],
    *,
    fatal: Iterable[str] = (),
    ignored: Iterable[str] = (),
) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint to go on from, and how its settings differ; nothing is touched.

    See ``Saver`` for the parameters and errors.
    """
    found = checkpoints.load(resume_from)
    warnings, errors = compare_fingerprints(
        found.fingerprint, fingerprint, fatal=set(fatal), ignored=set(ignored)
    )
    if errors:
        raise ValueError(
            f"cannot resume from {found.path}:\n" + "\n".join(f"  - {line}" for line in errors)
        )
    return found, warnings
