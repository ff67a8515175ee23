"""Which number format a machine computes the frozen model in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from fedlora_app.config.keys import RunConfig
from strategies.aggregation import AGGREGATIONS

#: bfloat16 products must be this many times as fast as float32 ones to be taken, where torch
#: does not say whether the CPU has instructions for them.
WORTH = 1.5

#: What of ``torch.cpu.get_capabilities()`` multiplies bfloat16: x86 (two kinds) and Arm.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def with_precision(config: RunConfig) -> RunConfig:
    """Return the config with ``train.precision = "auto"`` as what it becomes on this machine.

    bfloat16 where the device multiplies it natively or the base has fewer bits, else float32, and
    always float32 for rules that merge into the frozen weights, since bfloat16 would round every
    merge. Each node
    chooses for itself: LoRA weights, optimiser and sums are float32 everywhere, so that
    updates from both kinds of machine can be averaged (this project's decision).
    """
    if config.train.precision != "auto":
        return config
    rule = AGGREGATIONS.get(config.aggregation)  # a plug-in that this node lacks: who knows
    merges = getattr(rule, "merges_base", True)
    few_bits = config.model.quantization != "none"
    found = "bfloat16" if few_bits or (not merges and native_bfloat16()) else "float32"
    return replace(config, train=replace(config.train, precision=found))


@lru_cache(maxsize=1)
def native_bfloat16() -> bool:
    """Return whether the GPU, or without one the CPU, computes bfloat16 natively."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # What the hardware says does not depend on what else runs on it; a stop-watch does.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if any(name in known for name in INSTRUCTIONS):
        return any(known.get(name) for name in INSTRUCTIONS)
    return _speed(torch.float32) > WORTH * _speed(torch.bfloat16)


def _speed(dtype: torch.dtype) -> float:
    """Return the shortest of some times of one product, in seconds."""
    a = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return min(times)
