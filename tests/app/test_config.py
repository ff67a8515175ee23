"""The run config: what is accepted, and how everything else is refused."""

import tomllib
from pathlib import Path

import pytest

from fedlora_app.config.keys import ConfigError, RunConfig, markdown_table, toml_section
from fedlora_app.config.read import read_config

ROOT = Path(__file__).parents[2]


def flatten(table, prefix=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_pyproject_holds_every_key_with_its_default_and_comment():
    text = (ROOT / "pyproject.toml").read_text()
    flat = dict(flatten(tomllib.loads(text)["tool"]["flwr"]["app"]["config"]))
    assert flat == RunConfig().to_flat()
    assert toml_section() in text


def test_the_documentation_holds_the_table_of_keys():
    assert markdown_table() in (ROOT / "docs" / "configuration.md").read_text()


def test_defaults_are_valid_and_flat_is_the_inverse():
    assert RunConfig.from_flat({}) == RunConfig()
    changed = RunConfig.from_flat({"rounds": 3, "data.alpha": 1, "ranks.list": "4, 8"})
    assert changed.data.alpha == 1.0
    assert changed.ranks.numbers() == [4, 8]
    assert RunConfig.from_flat(changed.to_flat()) == changed


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"round": 3}, "round: unknown key; did you mean 'rounds'"),
        ({"alpha": 3}, "alpha: unknown key; did you mean 'data.alpha'"),
        ({"xyzzy": 3}, r"xyzzy: unknown key$"),
        ({"rounds": "three"}, "rounds: expected int, got 'three'"),
        ({"rounds": 2.5}, "rounds: expected int, got 2.5"),
        ({"rounds": True}, "rounds: expected int, got True"),
        ({"lora.dora": 1}, "lora.dora: expected bool, got 1"),
        ({"rounds": 0}, "rounds: must be at least 1, got 0"),
        ({"train.learning-rate": 0}, "train.learning-rate: must be above 0"),
        ({"train.learning-rate": float("nan")}, "train.learning-rate: must be finite"),
        ({"sampling.fraction": 1.5}, "sampling.fraction: must be at most 1"),
        ({"data.partition": "dirichlett"}, "did you mean 'dirichlet'"),
        ({"aggregation": "rblaa"}, "did you mean 'rbla'"),
        ({"ranks.list": "4,x"}, "ranks.list: expected comma-separated whole numbers"),
        ({"ranks.list": "4,0"}, "ranks.list: expected comma-separated whole numbers"),
        ({"ranks.list": ""}, "ranks.policy = 'cycle': ranks: expected at least one rank"),
        ({"sampling.q": "0.5,nan"}, "sampling.q: expected comma-separated numbers above 0 and up"),
        ({"sampling.pilot-fractions": "x"}, "pilot-fractions: expected comma-separated numbers"),
        ({"aggregation": "fedit"}, "averages equal ranks only"),
        (
            {"aggregation": "fedit", "ranks.policy": "reported"},
            "averages equal ranks only.*reported",
        ),
        ({"ranks.policy": "reported", "ranks.fallback": 64}, "ranks.fallback .64. must not exceed"),
        ({"sampling.estimator": "ratio"}, "sampling.estimator = 'ratio' is for independent"),
        ({"sampling.server-rate": 0.5}, "sampling.server-rate = 0.5 is for independent"),
        ({"clock.availability": "diurnal"}, "clock.availability = 'diurnal' is for simulated"),
        (
            {"clock.profile": "lab", "clock.availability": "diurnl"},
            "clock.availability: .*did you mean 'diurnal'",
        ),
        (
            {"clock.availability": "exponential", "clock.availability-options": "share=2"},
            "clock.availability: invalid exponential availability: share",
        ),
        (
            {"clock.availability": "exponential", "clock.availability-options": "ratio=2"},
            "clock.availability: .*ratio",
        ),
        (
            {
                "clock.profile": "lab",
                "clock.availability": "diurnal",
                "privacy.noise-multiplier": 8,
            },
            "who is there would move the chance to join",
        ),
        ({"privacy.noise-multiplier": 8}, "privacy.noise-multiplier: .*evaluate.clients = 0"),
        (
            {"privacy.noise-multiplier": 8, "evaluate.clients": 0, "ranks.policy": "autorank"},
            "asks clients for numbers on their rows",
        ),
    ],
)
def test_what_is_wrong_is_said(flat, message):
    with pytest.raises(ConfigError, match=message):
        read_config(flat)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({"round": 1, "seed": "x", "data.alpha": -1})
    assert len(caught.value.problems) == 3


def test_fedit_is_allowed_where_it_works():
    for flat in (
        {"ranks.policy": "uniform"},
        {"ranks.list": "8,8"},
        {"method": "head"},
    ):
        read_config({"aggregation": "fedit", **flat})


@pytest.mark.parametrize(
    ("flat", "rank"),
    [
        ({"ranks.policy": "uniform", "ranks.rank": 6}, 6),
        ({"ranks.policy": "list", "ranks.list": "2,64"}, 64),
        ({"ranks.policy": "reported", "ranks.max": 16}, 16),
    ],
)
def test_the_global_rank_follows_from_the_policy(flat, rank):
    assert read_config(flat).policy.max_rank == rank


def test_what_a_resumed_run_may_change_is_said_at_the_key():
    fatal, free = (set(RunConfig.keys_on_resume(kind)) for kind in ("fatal", "ignore"))
    assert {"seed", "model.name", "lora.dora", "aggregation", "privacy.clip"} <= fatal
    assert {"output", "rounds", "checkpoint-every"} <= free
    assert "train.steps" not in fatal | free


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"seed": 2**63}, r"seed: must be below 2\^63, got 9223372036854775808"),
        ({"aggregation": "florist", "aggregation-options": "energy=0.9, energy=0.5"}, "twice"),
    ],
)  # fmt: skip
def test_numbers_nobody_can_send_and_options_given_twice(flat, expected):
    with pytest.raises(ConfigError, match=expected):
        read_config(flat)
