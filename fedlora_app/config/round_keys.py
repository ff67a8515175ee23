"""The keys of a round: who joins, at which rank, how long it takes, how private and good it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_app.config.fields import Scalar, each_of, key_values, option


@dataclass(frozen=True)
class RanksConfig:
    """Which client trains which LoRA rank."""

    policy: str = option(
        "cycle",
        "uniform (rank), list (one per client), cycle (list repeated), reported (node's max-rank), "
        "quality (low, the best high), autorank (by each client's data, min to max), "
        "self-pruning (max, shrinking), staircase (list, by number of rows), random, feedback (by "
        "what the run shows), capacity (as much as each node can train), or one of your own "
        "(see plugins)",
        on_resume="fatal",
    )
    options: str = option("", "policy of your own: its options, as in 'low=2, high=16'")
    rank: int = option(8, "uniform: rank of every client", low=1)
    list: str = option(
        "4,8,16,32", "list, cycle, staircase: comma-separated ranks", each=int, low=1
    )
    min: int = option(4, "autorank, self-pruning, random, feedback: smallest rank", low=1)
    max: int = option(
        32,
        "reported, autorank, self-pruning, random, feedback: largest rank; also the rank of the "
        "global adapter",
        low=1,
    )
    fallback: int = option(
        0,
        "reported: rank of a node that names no max-rank; autorank: of one that gives no usable "
        "profile; 0: ranks.min",
        low=0,
    )
    budget: float = option(
        0.0,
        "autorank, feedback: mean rank of the clients, divided in proportion to scores; random: "
        "by chance; 0: autorank none, others ranks.rank",
        low=0,
    )
    budget_mb: float = option(
        0.0,
        "autorank: instead, megabytes a round in which every client trains may move, "
        "down and up; 0: none",
        low=0,
    )
    reassign_every: int = option(
        0,
        "autorank: profile and assign again every N rounds; 0: never; feedback: assign again, 0: "
        "every round",
        low=0,
    )
    profile_samples: int = option(
        2000, "autorank: rows of the profiling forward pass, a seeded choice; 0: all", low=0
    )
    profile_timeout: float = option(
        600.0,
        "seconds to wait for what nodes say of themselves, and (autorank) for their profiles",
        above=0,
    )
    order: str = option(
        "score",
        "autorank: score, or to compare with: reversed (lowest score, highest rank), random",
        choices=("score", "reversed", "random"),
    )
    criteria: str = option(
        "loss-entropy,label-entropy,gini-simpson",
        "autorank: what clients are scored by; volume (number of rows) may be added",
    )
    weights: str = option(
        "",
        "autorank: comma-separated weights of the criteria; empty: CRITIC's, as published",
        each=float,
        low=0,
    )
    holders: float = option(
        0.0,
        "autorank, feedback: share of the clients that hold every entry of the rank axis at least; "
        "0: autorank as published, feedback 0.3",
        low=0,
        high=1,
    )
    measure: str = option(
        "energy",
        "feedback: energy (directions of a client's update) or loss (its training loss)",
        choices=("energy", "loss"),
    )
    capacity: bool = option(
        False, "whatever the policy: no client gets more than it can train, by what it measures"
    )
    memory_share: float = option(
        0.5,
        "capacity: share of a node's free memory that training may take",
        above=0,
        high=1,
    )
    seconds: float = option(
        0.0, "capacity: seconds a round of a node may take, training and link; 0: any", low=0
    )
    low: int = option(5, "quality: rank of everyone at first", low=1)
    high: int = option(20, "quality: rank of the best after their first round", low=1)
    best_fraction: float = option(
        0.1, "quality: share of the clients that are best", above=0, high=1
    )
    validation_rows: int = option(
        0,
        "quality: rows of the server's test set that judge the clients, and are then left out of "
        "all test scores; 0: the clients' own validation rows judge",
        low=0,
    )
    gamma: float = option(
        0.99,
        "self-pruning: share of its rank a client keeps; 0.99 as published shrinks nothing "
        "below rank 100",
        above=0,
        high=0.9999,
    )
    penalty: float = option(0.001, "self-pruning: weight of the tail in the client's loss", low=0)

    def fallback_rank(self) -> int:
        """Return ``fallback``, or the smallest rank where none is named."""
        return self.fallback or self.min

    def numbers(self) -> Sequence[int]:
        """Return ``list`` as integers."""
        return each_of(self.list, int)

    def settings(self) -> dict[str, Scalar]:
        """Return ``options`` as keyword arguments of a policy."""
        return dict(key_values(self.options))


@dataclass(frozen=True)
class SamplingConfig:
    """Which clients join a round."""

    policy: str = option(
        "fraction",
        "fraction (so many, without replacement); each client by its own coin: independent (given "
        "probabilities), weighted (in proportion to its rows), statistical (rows times the size of "
        "its updates), planned (what reaches the target soonest on the clock); or "
        "one of your own (see plugins)",
        on_resume="fatal",
    )
    options: str = option("", "sampler of your own: its options, as in 'size=4'")
    fraction: float = option(
        0.6, "share of the clients in a round; of coins: the expected share", above=0, high=1
    )
    clients: int = option(0, "fraction: exactly so many clients instead; 0: by the share", low=0)
    min_clients: int = option(1, "fraction: at least this many clients in a round", low=1)
    q: str = option(
        "",
        "independent: comma-separated probabilities, one per client; empty: the share for all",
        each=float,
        above=0,
        high=1,
    )
    q_min: float = option(
        0.01, "weighted, statistical, planned: no client's probability is below", above=0, high=1
    )
    estimator: str = option(
        "auto",
        "with coins, updates count a/q: unbiased (divided by everybody's weight), ratio (by the "
        "participants': biased, less variance), auto (what suits the rule)",
        choices=("auto", "unbiased", "ratio"),
    )
    server_rate: float = option(
        1.0, "with coins and unbiased: factor on the aggregated change", above=0
    )
    pilots: bool = option(
        False,
        "planned: estimate alpha and beta by two pilots first, as published; false: begin with "
        "alpha = beta = 1, and let the run's own losses refine beta",
        on_resume="fatal",
    )
    pilot_rounds: int = option(
        5,
        "planned: rounds of each of the two pilots",
        low=2,
        on_resume="fatal",
    )
    pilot_fractions: str = option(
        "0.2,0.05",
        "planned: expected shares of the clients in the two pilots",
        each=float,
        above=0,
        high=1,
        on_resume="fatal",
    )
    alpha: float = option(
        0.0,
        "planned: with beta, rounds = alpha / (beta - s), as given and not refined; 0: not given",
        low=0,
        on_resume="fatal",
    )
    beta: float = option(0.0, "planned: see alpha; 0: not given", low=0, on_resume="fatal")
    sketch_cost: float = option(
        1.0,
        "planned with fslora: exponent of how much a sketch of k of R entries adds to the "
        "variance, (R/k)^this; 0: nothing",
        low=0,
    )
    replan_every: int = option(
        0, "planned: plan again every N rounds, from fresh channels and speeds; 0: once", low=0
    )

    def probabilities(self) -> Sequence[float] | float:
        """Return ``q`` as numbers, or the share for all."""
        return each_of(self.q, float) or self.fraction

    def fractions_of_pilots(self) -> Sequence[float]:
        """Return ``pilot-fractions`` as numbers."""
        return each_of(self.pilot_fractions, float)

    def settings(self) -> dict[str, Scalar]:
        """Return ``options`` as keyword arguments of a sampler."""
        return dict(key_values(self.options))


@dataclass(frozen=True)
class ClockConfig:
    """How long rounds take."""

    profile: str = option(
        "measured",
        "measured (real seconds), or simulated devices on a shared uplink: lab, campus, rural, "
        "phones, or a csv file with the columns snr_db and flops",
        on_resume="fatal",
    )
    surroundings: str = option(
        "campus",
        "csv: which profile's band, fading and limits",
        choices=("lab", "campus", "rural", "phones"),
    )
    bandwidth: str = option(
        "optimal",
        "how a round's clients share the band: optimal (all finish together) or equal",
        choices=("optimal", "equal"),
    )
    shared_band: bool = option(
        False, "measured: whether the nodes' uploads share one band; with an allocator they do"
    )
    allocator: str = option(
        "none",
        "measured: who is told each round's shares of the band, by clock.bandwidth: none, or",
        named_in="strategies.wallclock.allocators:ALLOCATORS",
    )
    allocate_with: str = option(
        "",
        "command: one with its arguments, told as JSON; htb: a csv file with the columns node, "
        "device, class, mbit and netns",
    )
    bandwidth_mhz: float = option(0.0, "the band; 0: the profile's", low=0)
    deadline: float = option(
        0.0, "simulated: seconds after which a round ends without who is late; 0: none", low=0
    )
    fixed_seconds: float = option(
        0.0, "simulated: what every reply takes beside computing and upload", low=0
    )
    idle_seconds: float = option(1.0, "simulated: length of a round without clients", above=0)
    change_round: int = option(
        0, "simulated: from this round on some clients have a worse channel; 0: never", low=0
    )
    change_share: float = option(0.5, "their share", above=0, high=1)
    change_factor: float = option(0.1, "what is left of their rate", above=0, high=1)
    availability: str = option(
        "always",
        "simulated: who is there when, or a csv file with the columns client, start and end (times "
        "there, in seconds)",
        named_in="strategies.wallclock:AVAILABILITIES",
        on_resume="fatal",
    )
    availability_options: str = option(
        "",
        "its options, as in 'share=0.8, seconds=600, clients=0.1' (diurnal, exponential: a tenth "
        "of the clients are there 80 % of the time; diurnal also spread=0.25) or 'repeat=86400' "
        "(csv)",
        on_resume="fatal",
    )

    @property
    def simulated(self) -> bool:
        """Whether the seconds are those of devices that are not there."""
        return self.profile != "measured"

    def availability_settings(self) -> dict[str, Scalar]:
        """Return ``availability-options`` as keyword arguments."""
        return dict(key_values(self.availability_options))


@dataclass(frozen=True)
class ServerConfig:
    """What the server does beside the rule that combines the adapters."""

    robust: str = option(
        "none",
        "what keeps liars among the clients from the result: none, or",
        named_in="strategies.aggregation:ROBUST",
        on_resume="fatal",
    )
    robust_options: str = option(
        "",
        "its options, as in 'liars=0.3' (trimmed-mean, krum) or 'factor=2' (norm-filter)",
        on_resume="fatal",
    )

    optimizer: str = option(
        "none",
        "takes what a round has changed for a gradient: none, or",
        named_in="strategies.optimizers:OPTIMIZERS",
        on_resume="fatal",
    )
    optimizer_options: str = option(
        "",
        "its options, as in 'learning_rate=0.02, beta_1=0.9' (adam, yogi) or 'momentum=0.5'",
        on_resume="fatal",
    )

    def optimizer_settings(self) -> dict[str, Scalar]:
        """Return ``optimizer-options`` as keyword arguments."""
        return dict(key_values(self.optimizer_options))

    def robust_settings(self) -> dict[str, Scalar]:
        """Return ``robust-options`` as keyword arguments."""
        return dict(key_values(self.robust_options))


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of what clients send."""

    noise_multiplier: float = option(
        0.0,
        "clients add Gaussian noise of so many times the clipping norm to what they send; 0: none",
        low=0,
        on_resume="fatal",
    )
    clip: float = option(
        1.0, "with noise: largest norm of a client's change", above=0, on_resume="fatal"
    )
    delta: float = option(1e-5, "with noise: delta of the guarantee", above=0, high=0.5)


@dataclass(frozen=True)
class SimulateConfig:
    """How clients share a machine in a simulation."""

    clients_per_process: int = option(
        1,
        "so many clients of a round, of as many processes, train in one batch of one of them; for "
        "clients that share a GPU (--gpus-per-client); the same results within rounding",
        low=1,
        on_resume="ignore",
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on the server and on the clients."""

    every: int = option(2, "evaluate after every Nth round (and the last)", low=1)
    clients: float = option(
        0.2, "share of the clients that evaluate on their own rows; 0: none", low=0, high=1
    )
    overlap: bool = option(
        False,
        "the server evaluates while clients train in the next round, where no stop-score, pilot or "
        "sampler waits for it; for machines with cores to spare; results are the same but for "
        "rounding",
    )
    batch_size: int = option(64, "rows of an evaluation batch", low=1)
    generate: int = option(
        0,
        "causal-lm: so many of the server's test rows are answered by the model itself, word by "
        "word, and scored; 0: none",
        low=0,
    )
    generate_tokens: int = option(128, "causal-lm: tokens of such an answer at most", low=1)
    scorer: str = option(
        "exact",
        "causal-lm: what scores generated answers, ours or one of your own (see plugins)",
        named_in="fedlora_app.tasks.scorers:SCORERS",
    )
