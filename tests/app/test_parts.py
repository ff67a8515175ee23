"""What a run config names is made and judged once, by what it is and not by its name."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fedlora_app import client_app
from fedlora_app.config.build import RANKS, SAMPLING
from fedlora_app.config.fields import help_of, options
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.discretion import SiteError
from fedlora_app.server_app import make_strategy
from fedlora_app.tasks import TASKS, TextClassification
from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS
from strategies.ranks import RANK_POLICIES
from strategies.sampling import SAMPLERS
from strategies.wallclock import MeasuredClock, SimulatedClock

TASK = """
from fedlora_app.tasks import TextClassification, register_task

@register_task
class Sentiment(TextClassification):
    name = "sentiment"
"""


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """A module that registers a task, found but not imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_sentiment.py").write_text(TASK, encoding="utf-8")
    client_app._task.cache_clear()
    yield "own_sentiment"
    sys.modules.pop("own_sentiment", None)
    TASKS.pop("sentiment", None)
    client_app._task.cache_clear()


def test_the_strategy_gets_the_very_parts_that_were_judged(tmp_path):
    parts = read_config({"privacy.noise-multiplier": 0.5, "evaluate.clients": 0.0})
    folder = Mock(path=tmp_path, rounds=[])
    strategy = make_strategy(parts, folder, SimpleNamespace(validation=None, all=None), None)
    assert type(strategy) is FedLoRA
    assert strategy.aggregation is parts.rule
    assert strategy.ranks is parts.policy
    assert strategy.participation.sampler is parts.sampler
    assert isinstance(strategy.participation.clock, MeasuredClock)
    changed = parts.with_config(RunConfig(seed=3))
    assert changed.task.config.seed == 3
    assert changed.rule is parts.rule


def test_robustness_is_one_line():
    rule = read_config({"server.robust": "trimmed-mean", "server.robust-options": "liars=0.3"}).rule
    assert (rule.robust.name, rule.robust.liars) == ("trimmed-mean", 0.3)
    for wrong, said in (
        ({"server.robust": "meddian"}, "server.robust: expected one of .* mean 'median'"),
        ({"server.robust": "krum", "server.robust-options": "liars=1"}, "robust-options: liars"),
        ({"server.robust-options": "liars=0.1"}, "which is 'none'"),
        ({"server.robust": "median", "aggregation": "flora"}, "server.robust: robust = 'median'"),
        ({"server.robust": "median", "sampling.policy": "weighted"}, "robust = 'median' is no"),
        (
            {"server.robust": "median", "privacy.noise-multiplier": 1.0, "evaluate.clients": 0.0},
            "privacy.noise-multiplier: robust = 'median'",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            read_config(wrong)


def test_a_server_optimiser_is_one_line(tmp_path):
    options = "learning_rate=0.02, beta_1=0.8"
    parts = read_config({"server.optimizer": "yogi", "server.optimizer-options": options})
    folder = Mock(path=tmp_path, rounds=[])
    strategy = make_strategy(parts, folder, SimpleNamespace(validation=None, all=None), None)
    assert strategy.optimizer is parts.optimizer
    assert (parts.optimizer.learning_rate, parts.optimizer.beta_1) == (0.02, 0.8)
    for wrong, said in (
        ({"server.optimizer": "adams"}, "server.optimizer: expected one of .* mean 'adam'"),
        ({"server.optimizer": "adam", "server.optimizer-options": "tau=0"}, "options: tau"),
        ({"server.optimizer-options": "tau=0.1"}, "which is 'none'"),
        ({"server.optimizer": "adam", "aggregation": "florist"}, "server.optimizer: .* anew"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_config(wrong)


def test_every_policy_with_keys_of_its_own_is_made_from_them():
    for policy in RANKS:
        assert read_config({"ranks.policy": policy, "aggregation": "rbla"}).policy.max_rank > 1
    for policy in SAMPLING:
        flat = {"sampling.policy": policy, "aggregation": "rbla", "rounds": 20}
        assert isinstance(read_config(flat).sampler, SAMPLERS[policy])
    work = {"base_flops": 1e9, "rank_flops": 1e6, "steps": 3.0}
    clock = read_config({"clock.profile": "lab", "clock.deadline": 2.0}).clock
    assert isinstance(clock.clock(**work), SimulatedClock)


def test_the_tables_name_all_there_is():
    said = {key: help_of(f) for key, f in options(RunConfig)}
    for key, registry in (
        ("aggregation", AGGREGATIONS),
        ("ranks.policy", RANK_POLICIES),
        ("sampling.policy", SAMPLERS),
        ("task", TASKS),
    ):
        assert [name for name in registry if name not in said[key]] == []


def test_a_judge_comes_later_and_only_where_the_server_judges():
    flat = {"ranks.policy": "quality", "ranks.validation-rows": 7}
    parts = read_config(flat)
    assert parts.validation_rows == 7
    assert parts.policy.judges
    with pytest.raises(RuntimeError, match="not there yet"):
        parts.policy.score_fn(None)
    parts.judge_by(lambda adapter: 0.25)
    assert parts.policy.score_fn(None) == 0.25
    assert read_config({**flat, "ranks.validation-rows": 0}).validation_rows == 0
    assert read_config({**flat, "ranks.policy": "cycle"}).validation_rows == 0


def test_a_rule_is_judged_by_what_it_says_of_itself(monkeypatch):
    kind = type("Picky", (AGGREGATIONS["rbla"],), {"name": "picky", "equal_ranks": True})
    monkeypatch.setitem(AGGREGATIONS, "picky", kind)
    with pytest.raises(ConfigError, match=r"'picky' averages equal ranks only.*'4,8,16,32'"):
        read_config({"aggregation": "picky"})
    read_config({"aggregation": "picky", "ranks.policy": "uniform"})
    monkeypatch.setattr(kind, "merges_base", True)
    with pytest.raises(ConfigError, match="'picky' merges into the frozen weights"):
        read_config(
            {
                "aggregation": "picky",
                "ranks.policy": "uniform",
                "train.precision": "bfloat16",
            }
        )


@pytest.mark.parametrize(
    ("registry", "key"),
    [
        (AGGREGATIONS, "aggregation"),
        (RANK_POLICIES, "ranks.policy"),
        (SAMPLERS, "sampling.policy"),
        (TASKS, "task"),
    ],
)
def test_what_is_registered_but_of_another_kind(monkeypatch, registry, key):
    monkeypatch.setitem(registry, "odd", lambda *_: FedLoRA())
    with pytest.raises(ConfigError, match=rf"{key} = 'odd': expected .*, got FedLoRA; register a"):
        read_config({key: "odd"})


def test_problems_of_several_parts_come_at_once():
    with pytest.raises(ConfigError) as caught:
        read_config({"task": "text-clasification", "aggregation": "rblaa", "clock.profile": "x"})
    first, second, third = caught.value.problems
    assert "aggregation: expected one of" in first
    assert "clock.profile: expected measured, lab" in second
    assert third.endswith("got 'text-clasification'; did you mean 'text-classification'?")


def test_a_task_of_ones_own_is_known_on_the_server_and_on_nodes(own_task):
    flat = {"task": "sentiment", "plugins": f"{own_task}, of_the_server_alone"}
    config = RunConfig.from_flat(flat)
    assert "sentiment" not in TASKS
    assert client_app._task(config).name == "sentiment"  # whatever else the server imports
    parts = read_config({**flat, "plugins": own_task})
    assert isinstance(parts.task, TextClassification)


def test_a_node_without_the_module_of_a_task_says_so(own_task):
    config = RunConfig.from_flat({"task": "sentiment", "plugins": "not_here"})
    with pytest.raises(SiteError, match="No module named 'not_here'") as caught:
        client_app._task(config)
    assert "task = 'sentiment': this node does not know it" in caught.value.told
    assert "plugins = 'not_here'" in caught.value.told


def test_keys_are_read_without_torch():
    code = """
import sys
from fedlora_app.config.read import ConfigError, RunConfig, read_config
RunConfig.from_flat({"rounds": 3, "plugins": "not_here"})
try:
    read_config({"round": 3})
except ConfigError:
    print([m for m in ("torch", "flwr", "strategies.aggregation") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
