"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedlora_app.config import ConfigError, RunConfig, Scalar
from strategies.checkpoint import Checkpoints
from strategies.saving import Saver, matching

LABELS = "labels"  # in a checkpoint's settings: the names of the classes, in order


def make_saver(config: RunConfig, path: Path, label_names: Sequence[str]) -> Saver | None:
    """Return what saves the run, with the checkpoint it goes on from; None if neither is asked."""
    if not (config.checkpoint_every or config.resume_from) or config.method == "local":
        return None
    try:
        return Saver(
            _checkpoints(config, path),
            resume_from=config.resume_from,
            fingerprint=_settings(config, label_names),
            fatal=_fatal(),
            ignored=config.keys_on_resume("ignore"),
        )
    except (OSError, ValueError) as error:
        raise ConfigError([f"resume-from: {error}"]) from error


def check_resume(config: RunConfig, path: Path, label_names: Sequence[str]) -> None:
    """Read what the run would go on from, and touch nothing.

    Raises
    ------
    ConfigError
        If there is no such checkpoint, or one of a run with other settings or labels.
    """
    if not config.resume_from or config.method == "local":
        return
    try:
        matching(
            _checkpoints(config, path),
            config.resume_from,
            _settings(config, label_names),
            fatal=_fatal(),
            ignored=config.keys_on_resume("ignore"),
        )
    except (OSError, ValueError) as error:
        raise ConfigError([f"resume-from: {error}"]) from error


def resumed_here(saver: Saver | None, path: Path) -> int | None:
    """Return the round after which a run in this very folder goes on; None for a new folder."""
    if saver is None or saver.resumed is None:
        return None
    return saver.round if path in saver.resumed.path.parents else None


def _checkpoints(config: RunConfig, path: Path) -> Checkpoints:
    return Checkpoints(
        path / "checkpoints",
        every=config.checkpoint_every or config.rounds,
        keep=config.checkpoint_keep,
        best=config.checkpoint_best,
    )


def _settings(config: RunConfig, label_names: Sequence[str]) -> dict[str, Scalar]:
    """Return what a run must have in common with the checkpoint it goes on from."""
    return {**config.to_flat(), LABELS: json.dumps(list(label_names), ensure_ascii=False)}


def _fatal() -> list[str]:
    # The same number of classes in another order would train the head for other words.
    return [*RunConfig.keys_on_resume("fatal"), LABELS]
