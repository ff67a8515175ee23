"""A site's own model: a run's global adapter, trained on a little on the site's rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_app.after.run import LoadedRun, load_run
from fedlora_app.config.keys import Scalar
from fedlora_app.data.rows import train_validation_split
from fedlora_app.discretion import DataError
from fedlora_app.report.folder import save_model
from fedlora_app.report.records import write_json
from fedlora_app.tasks import LOSS, Inputs

HELD_OUT = 0.2  # of a site's rows to judge when to stop, and as many to compare with
FEWEST = 10  # rows of which the parts still say something
PATIENCE = 2  # looks in a row that were no better


def personalise(
    run: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    steps: int = 100,
    every: int = 10,
    base: str | None = None,
    config: Mapping[str, Scalar] | None = None,
) -> dict[str, Any]:
    """Train on from a run's model on a site's own rows, as far as that helps.

    A fifth of the rows says when to stop, another fifth compares both models in the end; the rest
    trains, at the rates that the run's next rounds would have had. Where no look at the first
    fifth is better than the global model's, that stays the site's.

    Parameters
    ----------
    run : str or Path
        The run's folder.
    data : str or Path
        The site's file or folder, at least ``FEWEST`` rows with answers.
    output : str or Path
        A folder that is not there yet, for a run's folder of the personal model: ``load_run``,
        ``predict`` and the like take it.
    steps : int (default: 100)
        Optimiser steps at most.
    every : int (default: 10)
        Steps between two looks.
    base, config
        As of ``load_run``; ``train.learning-rate`` and the like may differ from the run's.

    Returns
    -------
    dict
        ``rows`` of the three parts; ``steps`` that were kept; ``looks``, the loss on the rows that
        stop, the first that of the global model; ``global`` and ``personal``, the scores on the
        rows that compare; ``names`` of scores, for people. It is in ``personal.json``, too.

    Raises
    ------
    FileExistsError
        If ``output`` is there.
    FileNotFoundError or ValueError
        As of ``load_run``; if the rows are too few, or have labels that the run has not.
    """
    target = Path(output).expanduser().absolute()
    if target.exists():
        raise FileExistsError(f"{target}: expected a folder that is not there yet; name another")
    if steps < 1 or every < 1:
        raise ValueError(f"expected steps and every of at least 1, got {steps} and {every}")
    loaded = load_run(run, base=base, config=config)
    task, seed = loaded.task, loaded.config.seed
    rows = task.own_rows(str(data), loaded.about)
    if len(rows) < FEWEST:
        raise DataError(
            data, f"expected at least {FEWEST} rows, some of them to compare with", str(len(rows)),
            "add some, or use the global model",
        )  # fmt: skip
    rest, compared = train_validation_split(np.arange(len(rows)), HELD_OUT, seed)
    share = HELD_OUT / (1 - HELD_OUT)
    trained, judging = train_validation_split(rest, share, seed)
    judge, compare = (task.encode(rows.take(part)) for part in (judging, compared))
    before = _scores(loaded, compare)
    inputs = task.for_training(task.encode(rows.take(trained)))
    kept, looks = _train(loaded, inputs, judge, steps, every)
    found = {
        "run": loaded.folder.name,
        "data": str(data),
        "rows": {"trained": len(trained), "stopping": len(judging), "compared": len(compared)},
        "steps": kept,
        "looks": looks,
        "global": before,
        "personal": _scores(loaded, compare) if kept else before,
        "names": {score.name: score.label for score in (LOSS, *task.scores)},
    }
    _save(loaded, target, found)
    return found


def _train(
    loaded: LoadedRun, inputs: Inputs, judge: Inputs, steps: int, every: int
) -> tuple[int, list[float]]:
    """Train in place, leave the best model there; return its steps and the loss at each look."""
    from fedlora_app.models.lora import training_scale
    from fedlora_app.training import train
    from strategies.client import adapter_state, load_adapter, trained_at
    from strategies.lora import Adapter
    from strategies.messages import ROUND_KEY

    config, model = loaded.config, loaded.model
    scale = training_scale(config.lora)
    looks, best, done = [_scores(loaded, judge)["loss"]], 0, 0
    held: Adapter | None = None

    def now() -> Adapter:
        state = {key: tensor.cpu().clone() for key, tensor in adapter_state(model).items()}
        return Adapter.from_state_dict(state, config=model.peft_config["default"])

    start = now()
    while done < steps and len(looks) - 1 - best < PATIENCE:
        number = config.rounds + len(looks)
        settings = config.train.in_round(number)
        settings = replace(settings, steps=min(every, steps - done))
        with trained_at(model, scale) if scale else nullcontext():
            train(model, inputs, settings, {ROUND_KEY: number}, seed=config.seed)
        done += settings.steps
        looks.append(_scores(loaded, judge)["loss"])
        if looks[-1] < looks[best]:
            best, held = len(looks) - 1, now()
    load_adapter(model, held or start)
    return min(best * every, steps), looks


def _scores(loaded: LoadedRun, inputs: Inputs) -> dict[str, float]:
    from fedlora_app.evaluation import evaluate

    config = loaded.config
    return evaluate(
        loaded.task,
        loaded.model,
        inputs,
        batch_size=config.evaluate.batch_size,
        precision=config.train.precision,
    )


def _save(loaded: LoadedRun, target: Path, found: Mapping[str, Any]) -> None:
    """Write the folder of a run, whole or not at all."""
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write_json(new / "config.json", loaded.config.to_flat())
        save_model(new, loaded.model, loaded.task, loaded.about, loaded.columns)
        write_json(new / "personal.json", found)
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
