"""A node's short probe of what it can train: free memory, and the time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import MetricRecord, RecordDict

from strategies.capacity import (
    CAPACITY_KEY,
    DEVICE_FREE_BYTES,
    ECHO_KEY,
    FREE_BYTES,
    PROBE_RANK,
    PROBE_SECONDS,
    PROCESS_SECONDS,
    STEP_SECONDS,
)

# Where a client keeps what it measured.
MEASURED_KEY = "fedlora.capacity"
#: The probe ends after so many steps, or when so many seconds are over.
MOST_STEPS, MOST_SECONDS = 5, 2.0


def capacity(
    state: RecordDict,
    config: Mapping[str, Any],
    make_step: Callable[[], Callable[[], object]],
    *,
    rank: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return what a node can train, measured once and kept in its Flower state.

    Parameters
    ----------
    state : RecordDict
        ``context.state``; what is measured is kept there as ``fedlora.capacity``.
    config : Mapping[str, Any]
        Of the query. Where it does not ask (``capacity``) nothing is measured and nothing said.
    make_step : callable
        Returns a training step, forward and backward, on a batch as in training, of a model that
        is loaded and of rank ``rank``. Called where nothing is kept.
    rank : int (default: 1)
    device : torch.device or str (default: "cpu")
        Where the step runs.

    Returns
    -------
    dict
        The fields of ``strategies.capacity``, and the text that the server sent, back.
    """
    if not config.get(CAPACITY_KEY):
        return {}
    began = time.perf_counter()
    if MEASURED_KEY not in state:
        state[MEASURED_KEY] = MetricRecord(dict(probe(make_step(), rank=rank, device=device)))
    found: dict[str, Any] = dict(state.metric_records[MEASURED_KEY])
    found[PROBE_SECONDS] = time.perf_counter() - began
    found[PROCESS_SECONDS] = max(0.0, time.time() - _psutil().Process().create_time())
    if ECHO_KEY in config:
        found[ECHO_KEY] = config[ECHO_KEY]
    return found


def probe(
    step: Callable[[], object], *, rank: int = 1, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Return free memory and the seconds of a step: the quickest of a few after a first one.

    See ``capacity`` for the parameters.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    step()  # the first one also allocates, and compiles on some devices
    quickest = float("inf")
    began = time.perf_counter()
    for _ in range(MOST_STEPS):
        before = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        quickest = min(quickest, time.perf_counter() - before)
        if time.perf_counter() - began > MOST_SECONDS:
            break
    found = {
        FREE_BYTES: float(_psutil().virtual_memory().available),
        STEP_SECONDS: max(quickest, 1e-9),
        PROBE_RANK: float(rank),
    }
    if cuda:
        torch.cuda.empty_cache()
        found[DEVICE_FREE_BYTES] = float(torch.cuda.mem_get_info(device)[0])
    return found


def _psutil() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise ImportError("to measure what a node can train, install psutil there") from error
    return psutil
