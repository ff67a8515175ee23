"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_app.config.keys import ConfigError, RunConfig, Scalar
from fedlora_app.tasks import make_task, primary
from strategies.checkpoint import Checkpoints
from strategies.saving import Saver, matching


def make_saver(config: RunConfig, path: Path, about: Mapping[str, Any]) -> Saver | None:
    """Return what saves the run, with the checkpoint it goes on from; None if neither is asked."""
    if not (config.checkpoint_every or config.resume_from) or config.method == "local":
        return None
    try:
        return Saver(
            _checkpoints(config, path),
            resume_from=config.resume_from,
            fingerprint=_settings(config, about),
            fatal=_fatal(about),
            ignored=config.keys_on_resume("ignore"),
        )
    except (OSError, ValueError) as error:
        raise ConfigError([f"resume-from: {error}"]) from error


def check_resume(config: RunConfig, path: Path, about: Mapping[str, Any]) -> None:
    """Read what the run would go on from, and touch nothing.

    Raises
    ------
    ConfigError
        If there is no such checkpoint, or one of a run with other settings, or of another task.
    """
    if not config.resume_from or config.method == "local":
        return
    try:
        matching(
            _checkpoints(config, path),
            config.resume_from,
            _settings(config, about),
            fatal=_fatal(about),
            ignored=config.keys_on_resume("ignore"),
        )
    except (OSError, ValueError) as error:
        raise ConfigError([f"resume-from: {error}"]) from error


def resumed_here(saver: Saver | None, path: Path) -> int | None:
    """Return the round after which a run in this very folder goes on; None for a new folder."""
    if saver is None or saver.resumed is None:
        return None
    return saver.round if path in saver.resumed.path.parents else None


def best_score(config: RunConfig) -> str:
    """Return the score by which one checkpoint is the best, with a minus where lower is better."""
    if config.checkpoint_best != "auto":
        return config.checkpoint_best
    score = primary(make_task(config))
    return score.name if score.higher_is_better else f"-{score.name}"


def _checkpoints(config: RunConfig, path: Path) -> Checkpoints:
    return Checkpoints(
        path / "checkpoints",
        every=config.checkpoint_every or config.rounds,
        keep=config.checkpoint_keep,
        best=best_score(config),
    )


def _settings(config: RunConfig, about: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return what a run must have in common with the checkpoint it goes on from."""
    said = {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}
    return {**config.to_flat(), **said}


def _fatal(about: Mapping[str, Any]) -> list[str]:
    # The same number of classes in another order would train the head for other words.
    return [*RunConfig.keys_on_resume("fatal"), *about]
