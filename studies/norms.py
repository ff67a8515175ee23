"""Print how large a run's final adapter is: the norm of B A over all layers, whole and by entries.

python -m studies.norms runs/language/four/support/seed-1 [more runs]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from strategies.lora import Adapter

PARTS = (0, 4), (4, 8), (8, 16), (16, 32)


def norm(adapter: Adapter, low: int, high: int | None) -> float:
    """Return that of entries ``low`` to ``high`` of the rank axis."""
    pairs = (pair for pair in adapter.pairs.values() if pair.rank > low)
    parts = (replace(p, A=p.A[low:high], B=p.B[:, low:high]) for p in pairs)
    return float(np.sqrt(sum(part.norm() ** 2 for part in parts)))


for run in map(Path, sys.argv[1:]):
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    adapter = Adapter.from_state_dict(state, 1.0)
    told = (f"{low + 1}-{high}: {norm(adapter, low, high):.2f}" for low, high in PARTS)
    print(run, f"all: {norm(adapter, 0, None):.2f}", *told, sep="  ")
