"""Judge a run config once: its keys, what they name, and whether that goes together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedlora_app.config.keys import ConfigError, RunConfig, Scalar
from fedlora_app.config.plugins import load

if TYPE_CHECKING:
    from fedlora_app.config.build import Parts


def read_config(flat: Mapping[str, Scalar]) -> Parts:
    """Return what a run consists of, made from its flat config, ``config`` among it.

    Parameters
    ----------
    flat : Mapping[str, bool, int, float or str]
        As ``RunConfig.from_flat`` takes them.

    Raises
    ------
    ConfigError
        With every key that is wrong by itself; else with every plug-in that cannot be imported;
        else with every name and option of which nothing can be made; else with every
        combination that cannot work.
    """
    config = RunConfig.from_flat(flat)
    if problems := load(config.plugins):
        raise ConfigError(problems)
    from fedlora_app.config.build import make_parts  # the rules, and with them torch
    from fedlora_app.config.checks import impossible

    parts = make_parts(config)
    if problems := impossible(parts):
        raise ConfigError(problems)
    return parts
