"""What is checked in seconds, before anything starts or is written.

At the command line, and in the ServerApp, which ``flwr run`` reaches without us.

    python -m fedlora_app.launch.door QUESTION

answers for ``run_simulation.py``, whose own process imports nothing that takes seconds.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch

from fedlora_app.config.build import Parts
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.launch.folders import output_problems
from fedlora_app.launch.inspection import Report, inspect
from fedlora_app.models.bits import BITS, INSTALL, OPTIMIZERS, installed
from fedlora_app.models.loading import trained_parts
from fedlora_app.models.lora import add_lora
from fedlora_app.models.starts import STARTS, check_start
from fedlora_app.report.trackers import tracking_problems
from fedlora_app.resuming import check_resume
from strategies.client import check_mergeable
from strategies.surroundings import checkpointed


def check_run(parts: Parts, folder: Path, data: Report) -> str:
    """Refuse what could not end well, without reading weights or writing anything.

    Parameters
    ----------
    parts : Parts
        As ``read_config`` judged them.
    folder : Path
        Where the run is to write.
    data : Report
        The rows, as ``inspect`` read them; a few are encoded.

    Returns
    -------
    str
        What of the model was loaded and what made new.

    Raises
    ------
    FileNotFoundError or ValueError
        With file or key, what is wrong and what to do.
    """
    config = parts.config
    problems = output_problems(folder, resumed=bool(config.resume_from)) + _optional(config)
    size = parts.validation_rows
    if size and size >= len(data.test):
        problems.append(
            f"ranks.validation-rows: the test set has {len(data.test)} rows, so {size} leave none "
            "to test on"
        )
    if problems:
        raise ConfigError(problems)
    check_resume(config, folder, data.about)
    return check_model(parts, data)


def check_model(parts: Parts, data: Report) -> str:
    """Refuse a model, rows and targets that do not go together; see ``check_run``."""
    config, rank = parts.config, parts.policy.max_rank
    base = data.task.model(data.about, seed=0, shapes_only=True)
    line: str = base.loaded.line()  # type: ignore[union-attr, operator]
    if problems := data.task.problems(base, data.train):
        raise ConfigError(problems)
    if config.train.gradient_checkpointing:
        with checkpointed(base):  # or an error says what cannot
            pass
    if config.method == "head" and not trained_parts(base):
        raise ConfigError(
            [f"method = 'head': {config.model.name!r} has no head that could be trained alone"]
        )
    model = add_lora(base, config.lora, rank=1, seed=0)
    width = max(max(p.shape) for n, p in model.named_parameters() if ".lora_" in n)
    if config.method != "head" and rank > width:
        raise ConfigError(
            [
                f"ranks.policy = {config.ranks.policy!r} gives ranks up to {rank}, and the "
                f"widest layer with LoRA has {width}, all that a rank can be; lower it"
            ]
        )
    starts = config.lora.variant in STARTS
    if starts:
        check_start(model, config.lora.variant, rank)
    if parts.rule.merges_base or starts:
        check_mergeable(model)
    return line


def resource_problems(cpus: int, gpus: float) -> list[str]:
    """Return what one simulated client asks for that this machine does not have."""
    problems = []
    have = os.cpu_count() or 1
    if cpus > have:
        problems.append(
            f"--cpus-per-client: a client would need {cpus} CPUs, and this machine has {have}; "
            f"give at most {have}"
        )
    if not (math.isfinite(gpus) and gpus >= 0) or (gpus > 1 and gpus != int(gpus)):
        problems.append(
            f"--gpus-per-client: expected a share between 0 and 1 or a whole number, got {gpus:g}"
        )
    elif gpus and gpus > (found := torch.cuda.device_count()):
        problems.append(
            f"--gpus-per-client: a client would need {gpus:g} GPUs, and this machine has {found}; "
            + (f"give at most {found}" if found else "leave it out")
        )
    return problems


def idle_gpus(cpus: int, gpus: float) -> str:
    """Return how clients would use a GPU that is here and none of them uses; empty: nothing is."""
    found = torch.cuda.device_count()
    if gpus or not found:
        return ""
    share = found / max(1, (os.cpu_count() or 1) // cpus)
    return (
        f"{found} GPU{'s' * (found > 1)} here, and no client has a share: "
        f"--gpus-per-client {min(1.0, share):.3g} gives each one"
    )


def _optional(config: RunConfig) -> list[str]:
    """Return what else the run would need and does not find."""
    problems = tracking_problems(config)
    wanted = (
        ("model.quantization", config.model.quantization, BITS),
        ("train.optimizer", config.train.optimizer, OPTIMIZERS),
    )
    if not installed():
        problems += [f"{key} = {value!r}: {INSTALL}" for key, value, own in wanted if value in own]
    return problems


def main(question: str) -> int:
    """Check a run before it starts, print what was found, and return the exit code.

    Parameters
    ----------
    question : str
        JSON: ``config`` (flat), ``folder``, ``clients``, and ``resources``, the CPUs and GPUs of
        a client, or null. Who asks has inspected the rows already.
    """
    asked = json.loads(question)
    try:
        if asked["resources"] and (problems := resource_problems(*asked["resources"])):
            raise ConfigError(problems)
        parts = read_config(asked["config"])
        data = inspect(parts.task, clients=asked["clients"], looked=True)
        print(data.shared_out, flush=True)
        line = check_run(parts, Path(asked["folder"]), data)
        print(f"{parts.config.model.name}: {line}", flush=True)
        if asked["resources"] and (hint := idle_gpus(*asked["resources"])):
            print(hint, flush=True)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
