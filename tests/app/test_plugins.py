"""Rules, policies and samplers of one's own, by name in the run config."""

import re
import sys
from pathlib import Path

import pytest

from fedlora_app.compare.retiming import training_of
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.config.read import read_config
from strategies.aggregation import AGGREGATIONS
from strategies.ranks import RANK_POLICIES
from strategies.sampling import SAMPLERS

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
OWN = {
    "aggregation": "median",
    "ranks.policy": "by-rows",
    "ranks.options": "low=2, high=16",
    "sampling.policy": "turns",
    "sampling.options": "size=4",
}


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Put the examples of docs/extending.md into modules; return what `plugins` is to be."""
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (AGGREGATIONS, RANK_POLICIES, SAMPLERS):
        for name in ("median", "by-rows", "turns"):
            monkeypatch.delitem(registry, name, raising=False)
    names = []
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for i, code in enumerate(blocks):
        names.append(f"{tmp_path.name.replace('-', '_')}_{i}")
        (tmp_path / f"{names[-1]}.py").write_text(code, encoding="utf-8")
    before = [dict(registry) for registry in (AGGREGATIONS, RANK_POLICIES, SAMPLERS)]
    yield ", ".join(names)
    for name in names:
        sys.modules.pop(name, None)
    for registry, kept in zip((AGGREGATIONS, RANK_POLICIES, SAMPLERS), before, strict=True):
        registry.clear()
        registry.update(kept)


def test_the_config_finds_them_by_name(plugins):
    parts = read_config({**OWN, "plugins": plugins})
    assert parts.rule.name == "median"
    policy, sampler = parts.policy, parts.sampler
    assert (policy.name, policy.low, policy.high) == ("by-rows", 2, 16)
    assert (sampler.name, sampler.size) == ("turns", 4)
    assert policy.max_rank == 16
    # It may look at the clock, so that no run is timed again on another network.
    assert training_of({**OWN, "plugins": plugins, "clock.profile": "lab"}) is None
    assert RunConfig.from_flat(parts.config.to_flat()) == parts.config


def test_a_client_neither_needs_nor_imports_them(plugins):
    config = RunConfig.from_flat({**OWN, "plugins": f"{plugins}, not_there"})
    assert config.aggregation == "median"
    assert not [name for name in plugins.split(", ") if name in sys.modules]
    with pytest.raises(ConfigError, match="unknown key"):
        RunConfig.from_flat({"agregation": "median"})


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({}, "aggregation: expected one of .*; got 'median'"),
        ({"aggregation": "rbla"}, "ranks.policy: expected one of .*; got 'by-rows'"),
        ({"plugins": "not_there"}, "plugins: cannot import 'not_there': ModuleNotFoundError"),
    ],
)
def test_without_the_module_nothing_is_known(flat, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**OWN, **flat})


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"ranks.options": "lowest=2"}, "ranks.options: .*unexpected keyword argument 'lowest'"),
        ({"ranks.options": "low"}, "ranks.options: expected key=value, got 'low'"),
        ({"sampling.options": "sizes=2"}, "sampling.options: .*unexpected keyword"),
        ({"sampling.policy": "turn"}, "sampling.policy: .*did you mean 'turns'"),
        (
            {"ranks.policy": "uniform"},
            "ranks.options: 'uniform' has keys of its own in .ranks.; options are for",
        ),
        (
            {"sampling.policy": "weighted", "sampling.options": ""},
            "aggregation 'median' cannot be used with sampling 'weighted'",
        ),
    ],
)
def test_what_is_wrong_is_said(plugins, flat, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**OWN, "plugins": plugins, **flat})


def test_a_broken_module_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot import 'broken_plugin': ZeroDivisionError"):
        read_config({"plugins": "broken_plugin"})


def test_a_plugin_that_declares_it_is_blind_to_the_clock_is_timed_again(plugins, monkeypatch):
    read_config({**OWN, "plugins": plugins})
    turns = SAMPLERS["turns"]
    flat = {**OWN, "plugins": plugins, "clock.profile": "lab"}
    monkeypatch.setattr(turns, "clock_blind", True)
    assert training_of(flat) == training_of({**flat, "clock.profile": "rural"}) is not None
    assert training_of({**flat, "clock.deadline": 3.0}) is None
    SAMPLERS["turns"] = type("Heir", (turns,), {})
    assert training_of(flat) is None


def test_a_policy_that_judges_needs_whole_adapters_whatever_its_name(plugins, monkeypatch):
    read_config({**OWN, "plugins": plugins})
    flat = {**OWN, "plugins": plugins, "aggregation": "fedsa"}
    read_config(flat)
    monkeypatch.setattr(RANK_POLICIES["by-rows"], "judges", True)
    with pytest.raises(ConfigError, match=r"'by-rows' judges whole adapters .* keeps B on the"):
        read_config(flat)
