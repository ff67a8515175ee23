"""The run config as validated dataclasses.

``RunConfig.from_flat`` reads the flat mapping that Flower hands to an app
(``context.run_config``: dotted kebab-case keys, scalar values) and either returns
a complete, valid configuration or raises one ``ConfigError`` that lists everything
that is wrong. ``python -m fedlora_app.config`` prints the table of all keys;
``--write`` puts it into pyproject.toml and docs/configuration.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path

from fedlora_app.fields import (
    ConfigError,
    Scalar,
    build,
    key_values,
    option,
    options,
    unknown_key,
    values_of,
)
from fedlora_app.plugins import load

__all__ = ["ConfigError", "RunConfig", "Scalar", "markdown_table", "toml_section"]


@dataclass(frozen=True)
class ModelConfig:
    """What is fine-tuned."""

    name: str = option(
        "packaged:minilm-l6",
        "packaged model (minilm-l6, minilm-l3), Hugging Face model id, or local folder",
        on_resume="fatal",
    )
    head: str = option(
        "auto",
        "classification head: mean-pool (mean of token states), stock "
        "(AutoModelForSequenceClassification), auto (what suits the model)",
        choices=("auto", "mean-pool", "stock"),
        on_resume="fatal",
    )


@dataclass(frozen=True)
class LoraConfig:
    """How the LoRA modules are made."""

    scale: float = option(
        2.0,
        "s in W0 + s*B*A, one for all ranks (alpha of a client = s * its rank)",
        above=0,
        on_resume="fatal",
    )
    target_modules: str = option(
        "auto",
        "comma-separated module names, or auto (query and value projections)",
        on_resume="fatal",
    )
    dropout: float = option(0.0, "dropout on the LoRA input", low=0, high=0.9, on_resume="fatal")
    dora: bool = option(False, "train DoRA magnitudes as well", on_resume="fatal")


@dataclass(frozen=True)
class DataConfig:
    """What it is fine-tuned on, and how simulated clients share it."""

    name: str = option(
        "packaged:reuters-r8",
        "packaged data set, Hugging Face data set id, or local csv, jsonl, parquet file or folder",
        on_resume="fatal",
    )
    text_column: str = option("auto", "column with the text (auto: text, sentence, content, …)")
    label_column: str = option("auto", "column with the label (auto: label, labels, category, …)")
    partition: str = option(
        "dirichlet",
        "how simulated clients differ: iid, dirichlet, pathological, double-imbalance",
        choices=("iid", "dirichlet", "pathological", "double-imbalance"),
    )
    alpha: float = option(0.5, "dirichlet: concentration; smaller is more skewed", above=0)
    classes_per_client: int = option(2, "pathological: classes of each client", low=1)
    min_samples: int = option(20, "every client has at least this many rows, or an error", low=2)
    max_length: int = option(48, "tokens of a text; longer ones are cut", low=2)
    validation_fraction: float = option(
        0.1, "part of each client's rows kept for its own evaluation", above=0, high=0.5
    )
    test_rows: int = option(
        500, "rows of the server's test set used after each round (0: all; the end uses all)", low=0
    )


@dataclass(frozen=True)
class TrainConfig:
    """Local training on a client."""

    steps: int = option(10, "optimiser steps a round; 0: use epochs", low=0)
    epochs: float = option(1.0, "passes over the client's rows when steps = 0", above=0)
    batch_size: int = option(16, "rows of a step", low=1)
    learning_rate: float = option(3e-3, "AdamW learning rate of the LoRA weights", above=0)
    head_learning_rate: float = option(5e-3, "AdamW learning rate of the head", above=0)
    round_decay: float = option(
        0.9, "both learning rates are multiplied by this after every round", above=0, high=1
    )
    weight_decay: float = option(0.0, "AdamW weight decay", low=0)
    schedule: str = option(
        "constant",
        "learning rate within a client's round: constant, linear or cosine down to 0",
        choices=("constant", "linear", "cosine"),
    )
    max_grad_norm: float = option(1.0, "gradient clipping; 0: none", low=0)
    precision: str = option(
        "auto",
        "float32, bfloat16 (frozen weights and activations; trained weights stay float32) or auto: "
        "on each node what its hardware multiplies fast, float32 for rules that merge",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = option(1, "torch CPU threads of a client", low=1)

    def in_round(self, number: int, *, times: int = 1) -> TrainConfig:
        """Return the config of one round, with ``times`` as much training in one go."""
        decay = self.round_decay ** (number - 1)
        return replace(
            self,
            steps=self.steps * times,
            epochs=self.epochs * times,
            learning_rate=self.learning_rate * decay,
            head_learning_rate=self.head_learning_rate * decay,
        )


@dataclass(frozen=True)
class RanksConfig:
    """Which client trains which LoRA rank."""

    policy: str = option(
        "cycle",
        "uniform (rank), list (one per client), cycle (list repeated), reported (node's max-rank), "
        "quality (low, the best high), autorank (by each client's data, min to max), "
        "self-pruning (max, shrinking), or one of your own (see plugins)",
        on_resume="fatal",
    )
    options: str = option("", "policy of your own: its options, as in 'low=2, high=16'")
    rank: int = option(8, "uniform: rank of every client", low=1)
    list: str = option("4,8,16,32", "list and cycle: comma-separated ranks")
    min: int = option(4, "autorank and self-pruning: smallest rank", low=1)
    max: int = option(
        32,
        "reported, autorank, self-pruning: largest rank; also the rank of the global adapter",
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
        "autorank: mean rank of the clients, divided in proportion to the scores; 0: none",
        low=0,
    )
    budget_mb: float = option(
        0.0,
        "autorank: instead, megabytes a round in which every client trains may move, "
        "down and up; 0: none",
        low=0,
    )
    reassign_every: int = option(
        0, "autorank: profile and assign again every N rounds; 0: never", low=0
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
        "its updates), planned (what reaches the target soonest on the clock, by two pilots); or "
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
        "", "independent: comma-separated probabilities, one per client; empty: the share for all"
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
    pilot_rounds: int = option(
        5,
        "planned: rounds of each of the two pilots that estimate alpha and beta",
        low=2,
        on_resume="fatal",
    )
    pilot_fractions: str = option(
        "0.2,0.05",
        "planned: expected shares of the clients in the two pilots",
        on_resume="fatal",
    )
    alpha: float = option(
        0.0,
        "planned: with beta, instead of pilots: rounds = alpha / (beta - s); 0: pilots",
        low=0,
        on_resume="fatal",
    )
    beta: float = option(0.0, "planned: see alpha; 0: pilots", low=0, on_resume="fatal")
    sketch_cost: float = option(
        1.0,
        "planned with fslora: exponent of how much a sketch of k of R entries adds to the "
        "variance, (R/k)^this; 0: nothing",
        low=0,
    )
    replan_every: int = option(
        0, "planned: plan again every N rounds, from fresh channels and speeds; 0: once", low=0
    )

    def probabilities(self) -> list[float] | float:
        """Return ``q`` as numbers, or the share for all."""
        return [float(part) for part in self.q.split(",")] if self.q else self.fraction

    def pilots(self) -> tuple[float, float]:
        """Return ``pilot-fractions`` as numbers."""
        first, second = (float(part) for part in self.pilot_fractions.split(","))
        return first, second

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
    bandwidth_mhz: float = option(0.0, "the band; 0: the profile's", low=0)
    deadline: float = option(
        0.0, "simulated: seconds after which a round ends without who is late; 0: none", low=0
    )
    idle_seconds: float = option(1.0, "simulated: length of a round without clients", above=0)
    change_round: int = option(
        0, "simulated: from this round on some clients have a worse channel; 0: never", low=0
    )
    change_share: float = option(0.5, "their share", above=0, high=1)
    change_factor: float = option(0.1, "what is left of their rate", above=0, high=1)


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
class EvaluateConfig:
    """Evaluation on the server and on the clients."""

    every: int = option(1, "evaluate after every Nth round (and the last)", low=1)
    clients: float = option(
        1.0, "share of the clients that evaluate on their own rows; 0: none", low=0, high=1
    )
    batch_size: int = option(64, "rows of an evaluation batch", low=1)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs, valid by construction."""

    rounds: int = option(10, "federated rounds", low=1, on_resume="ignore")
    seed: int = option(42, "same seed, same result", low=0, on_resume="fatal")
    output: str = option(
        "", "folder of the run's results; empty: runs/<time>-<aggregation>", on_resume="ignore"
    )
    task: str = option(
        "text-classification",
        "what is fine-tuned for: text-classification, or one of your own (see plugins)",
        on_resume="fatal",
    )
    method: str = option(
        "lora",
        "lora (federated), head (baseline: only the head is trained) or "
        "local (baseline: every client alone, same number of steps)",
        choices=("lora", "head", "local"),
        on_resume="fatal",
    )
    plugins: str = option(
        "",
        "comma-separated modules of your own that register rules, policies and samplers; imported "
        "where the server runs",
    )
    aggregation: str = option(
        "replication", "rule that combines the clients' adapters", on_resume="fatal"
    )
    aggregation_options: str = option(
        "",
        "options of that rule, as in 'energy=0.9' (florist) or 'holder_weights=\"quality\"'",
        on_resume="fatal",
    )
    wire_dtype: str = option(
        "float32",
        "how numbers travel: float32, float16, bfloat16 or int8 (with a step for each rank entry)",
        choices=("float32", "float16", "bfloat16", "int8"),
    )
    min_replies: int = option(1, "fewer good replies leave the model as it was", low=1)
    min_answering: float = option(
        0.5,
        "the run ends, with a checkpoint, after five rounds in which a smaller share of the "
        "clients asked sent a good reply; 0: never",
        low=0,
        high=1,
    )
    min_nodes: int = option(2, "wait for this many nodes before the first round", low=1)
    round_timeout: float = option(3600.0, "seconds to wait for the replies of a round", above=0)
    clip_norm: float = option(
        0.0, "a client's change of a larger norm is scaled down to this; 0: never", low=0
    )
    stop_score: float = option(
        0.0,
        "stop when the task's first score (accuracy for classifiers), on the server, is this good "
        "in the mean of the last three evaluations; 0: run all rounds",
        low=0,
        on_resume="ignore",
    )
    checkpoint_every: int = option(
        1,
        "save the server's state after every Nth round, in output/checkpoints; 0: never",
        low=0,
        on_resume="ignore",
    )
    checkpoint_keep: int = option(
        3, "how many of the last to keep, besides the best", low=1, on_resume="ignore"
    )
    checkpoint_best: str = option(
        "auto",
        "which server score is the best's, as in macro_f1, or -loss where lower is better; auto: "
        "the task's first",
        on_resume="ignore",
    )
    tensorboard: bool = option(
        False, "write scalars to output/tensorboard (needs the extra [tensorboard])"
    )
    resume_from: str = option(
        "",
        "go on from a checkpoint: latest or best (of output), or a path; empty: a new run",
        on_resume="ignore",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    clock: ClockConfig = field(default_factory=ClockConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar], *, check: bool = True) -> RunConfig:
        """Read ``{"data.alpha": 0.5, …}``; keys left out take their defaults.

        Parameters
        ----------
        flat : Mapping[str, bool, int, float or str]
        check : bool (default: True)
            Whether to import ``plugins`` and to check names and combinations of keys. A client
            leaves that to the server, and does not need the plug-ins.

        Raises
        ------
        ConfigError
            With every unknown key, wrong type, value out of range and impossible
            combination.
        """
        problems: list[str] = []
        known = dict(options(cls))
        for key in flat:
            if key not in known:
                problems.append(unknown_key(key, list(known)))
        config: RunConfig = build(cls, flat, "", problems)
        if check and not problems:
            problems += load(config.plugins)
        if check and not problems:
            from fedlora_app.checks import impossible  # needs the rules, and they need torch

            problems += impossible(config)
        if problems:
            raise ConfigError(problems)
        return config

    def to_flat(self) -> dict[str, Scalar]:
        """Return the inverse of ``from_flat``."""
        return dict(values_of(self))

    @classmethod
    def keys_on_resume(cls, kind: str) -> list[str]:
        """Return the keys whose change on resuming is ``kind``: fatal, warn or ignore."""
        return [key for key, f in options(cls) if f.metadata["on_resume"] == kind]

    def aggregation_settings(self) -> dict[str, Scalar]:
        """Return ``aggregation-options`` as keyword arguments of the rule."""
        return dict(key_values(self.aggregation_options))

    def rank_list(self) -> list[int]:
        """Return ``ranks.list`` as integers."""
        return [int(part) for part in self.ranks.list.split(",")]

    def max_rank(self) -> int:
        """Return the rank of the global adapter."""
        match self.ranks.policy:
            case "uniform":
                return self.ranks.rank
            case "list" | "cycle":
                return max(self.rank_list())
            case "quality":
                return self.ranks.high
            case "reported" | "autorank" | "self-pruning":
                return self.ranks.max
            case own:
                from strategies.ranks import make_rank_policy  # needs torch

                return make_rank_policy(own, **self.ranks.settings()).max_rank


def toml_section() -> str:
    """Return ``[tool.flwr.app.config]`` of pyproject.toml: every key with its comment."""
    lines: list[str] = []
    section = "[tool.flwr.app.config]"
    for key, f in options(RunConfig):
        group, _, name = key.rpartition(".")
        wanted = "[tool.flwr.app.config" + (f".{group}]" if group else "]")
        if wanted != section or not lines:
            lines += ["", wanted] if lines else [wanted]
            section = wanted
        value = f'"{f.default}"' if isinstance(f.default, str) else str(f.default).lower()
        lines += [f"# {f.metadata['help']}", f"{name} = {value}"]
    return "\n".join(lines)


def markdown_table() -> str:
    """Return the table of all keys for docs/configuration.md."""
    rows = ["| key | default | what it does |", "|---|---|---|"]
    for key, f in options(RunConfig):
        default = f.default if f.default is not MISSING else ""
        shown = f'"{default}"' if isinstance(default, str) else str(default).lower()
        rows.append(f"| `{key}` | `{shown}` | {f.metadata['help'].replace('<', '&lt;')} |")
    return "\n".join(rows)


def write(root: Path) -> None:
    """Write all keys into pyproject.toml and docs/configuration.md of the project in ``root``."""
    for name, start, new in (
        ("pyproject.toml", "[tool.flwr.app.config]\n", toml_section()),
        ("docs/configuration.md", "| key | default |", markdown_table()),
    ):
        path = root / name
        before, found, after = path.read_text(encoding="utf-8").partition(start)
        if not found:
            raise ValueError(f"{path}: expected a line that begins with {start!r}")
        # Up to the next section that is not the config's, or the end of the table.
        end = re.search(r"\n\n(?!\[tool\.flwr\.app\.config)(?!\|)", after)
        path.write_text(before + new + (after[end.start() :] if end else "\n"), encoding="utf-8")


if __name__ == "__main__":
    import sys

    if "--write" in sys.argv:
        write(Path.cwd())
    else:
        print(toml_section() if "--toml" in sys.argv else markdown_table())
