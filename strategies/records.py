"""What listeners are told and ``metrics.jsonl`` holds: one type for each ``kind`` of record.

All are JSON-able. Scores are open-ended, one key each: ``server_<score>`` and
``clients_<score>`` in a ``RoundRecord``, the client's own metrics in a ``ClientRecord`` and a
``ClientEvaluationRecord``; so is what a policy says of a client in a ``RankRecord``. A reader of
files meets those of older runs, which lack fields that are new: it asks with ``get``.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

#: Goes up when a field changes its meaning or goes, not when one is added.
RECORDS_VERSION = 1

#: Fields that only a measured clock fills, of rounds and of clients.
MEASURED = frozenset(
    {"queue_seconds", "expected_seconds"}
    | {f"{of}_seconds{end}" for of in ("fixed", "mb") for end in ("", "_low", "_high")}
)


class _Timed(TypedDict):
    round: int
    at: NotRequired[float]  # seconds since the run began; in files


class StartRecord(_Timed):
    """A run begins, or goes on after ``round``."""

    kind: Literal["start"]
    version: int
    scores: list[dict[str, Any]]  # the fields of each ``strategies.scores.Score``, the first first


class ClockRecord(TypedDict):
    """What it takes to time the run again on another network; the app's own."""

    kind: Literal["clock"]
    base_flops: float
    rank_flops: float
    steps: float
    at: NotRequired[float]


class SamplesRecord(_Timed):
    """What the model of a round made of some test rows, in words; the app's own."""

    kind: Literal["samples"]
    samples: list[dict[str, Any]]  # asked, wanted, given, score


class PersonalRecord(_Timed):
    """What clients that tuned the model of a round score on their own rows; the app's own."""

    kind: Literal["personal"]
    clients: list[dict[str, Any]]  # client, node, rows, before_<score>, after_<score>


class RankRecord(_Timed):
    """Which client trains which rank, and why; told when that changes."""

    kind: Literal["ranks"]
    policy: str
    weights: dict[str, float]
    clients: list[dict[str, Any]]  # client, samples, what the rank was derived from, rank
    notes: list[str]


class PilotsRecord(_Timed):
    """What the pilots of a planning sampler have found."""

    kind: Literal["pilots"]
    losses: list[list[float]]
    continued: int
    alpha: float | None
    beta: float | None
    reliable: bool
    reason: str
    variances: list[float] | None
    spread: float | None
    residual: float | None


class PlannedClient(TypedDict):
    """What a plan decides for one client."""

    client: int
    q: float
    rank: int


class PlanRecord(_Timed):
    """A plan of the rounds to come, or why there is none."""

    kind: Literal["plan"]
    cause: str
    feasible: bool
    reason: str
    alpha: float
    beta: float
    round_seconds: float | None
    round_between: NotRequired[list[float] | None]  # of a measured clock; not in older runs
    rounds: float | None
    total_seconds: float | None
    alternatives: dict[str, float | None]
    clients: list[PlannedClient]
    planner_seconds: float


class WayRecord(_Timed):
    """What ``round.mode = "auto"`` has become, before anybody was asked; the app's own."""

    kind: Literal["way"]
    way: str  # synchronous, deadline or buffered
    deadline: float  # seconds; 0: none
    buffer: int  # replies that make a model; 0: there are rounds
    busy: int
    alternatives: dict[str, float]  # predicted seconds of the best of each way


class RoundStartRecord(_Timed):
    """A round's messages are about to be sent."""

    kind: Literal["round-start"]
    clients: int


class ArrivedRecord(_Timed):
    """A reply is in, before its turn to be aggregated."""

    kind: Literal["arrived"]
    node: str
    bytes: NotRequired[int]  # of its arrays, as they travelled; not in older runs


class ClientRecord(_Timed):
    """One client's part in a round, with what it reported; after the last reply."""

    kind: Literal["client"]
    client: int
    node: str
    status: str  # ok, rejected, late
    rank: int
    bytes_down: int
    bytes_up: int
    bytes_planned: int
    compute_seconds: float | None
    upload_seconds: float | None  # None where nothing was sent over a network
    fixed_seconds: NotRequired[float | None]  # measured: what every reply takes beside both
    queue_seconds: NotRequired[float | None]  # in a simulation without a clock: not computing
    mb_seconds: NotRequired[float | None]  # measured: of each megabyte of its upload
    mb_seconds_low: NotRequired[float | None]  # ends of its 90 % interval
    mb_seconds_high: NotRequired[float | None]
    reason: NotRequired[str]  # of a rejected one
    # Where rounds do not wait for everybody: the round it was asked in, how many rounds older than
    # the model is what it was trained from, and from when to when it was busy, by the run's clock.
    asked: NotRequired[int]
    staleness: NotRequired[int]
    began: NotRequired[float | None]
    ended: NotRequired[float | None]
    steps: NotRequired[float]  # as reported
    memory_load_mb: NotRequired[float]  # peaks, as ``strategies.memory`` measures them
    memory_forward_mb: NotRequired[float]
    memory_backward_mb: NotRequired[float]
    memory_optimizer_mb: NotRequired[float]


class ClientEvaluationRecord(_Timed):
    """What one client reports of the new model on its own data."""

    kind: Literal["client-evaluation"]
    client: int
    node: str


class RoundWarning(TypedDict):
    """What a person should look at though nothing failed: see ``strategies.watch``."""

    about: Literal["unmoved", "loss", "lone"]
    client: int
    text: str


class RoundRecord(_Timed):
    """A round that is over; round 0 is the initial model."""

    kind: Literal["round"]
    clients: int  # asked
    clients_total: int  # present
    accepted: int
    rejected: int
    late: int
    stale: NotRequired[int]  # of those accepted, trained from an older model
    ranks: list[int]
    train_loss: float | None
    bytes_down: int
    bytes_up: int
    bytes_rejected: int
    train_seconds: float
    aggregate_seconds: float
    seconds: float
    clock_seconds: float | None
    clock_total: float | None
    bottleneck: int | None
    planned_seconds: float | None
    expected_seconds: NotRequired[float | None]  # measured: before it, from the rounds so far
    fixed_seconds: NotRequired[float | None]  # as of its clients, with a 90 % interval
    fixed_seconds_low: NotRequired[float | None]
    fixed_seconds_high: NotRequired[float | None]
    epsilon_local: NotRequired[float]
    epsilon_central: NotRequired[float]
    warnings: NotRequired[list[RoundWarning]]  # only where there are any


class EndRecord(_Timed):
    """Why the run is over, and who was asked and never took part."""

    kind: Literal["end"]
    reason: str
    never_took_part: list[str]


Record: TypeAlias = (
    StartRecord
    | ClockRecord
    | SamplesRecord
    | PersonalRecord
    | RankRecord
    | PilotsRecord
    | PlanRecord
    | WayRecord
    | RoundStartRecord
    | ArrivedRecord
    | ClientRecord
    | ClientEvaluationRecord
    | RoundRecord
    | EndRecord
)
"""Any of them; ``record["kind"]`` tells mypy and the reader which."""
