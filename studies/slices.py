"""Test leading slices of a run's final adapter: which rank entries help, and which hurt.

python -m studies.slices runs/autorank/double-imbalance/reversed/seed-1 [more runs]
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from fedlora_app.config.precision import with_precision
from fedlora_app.config.read import read_config
from fedlora_app.held_out import HeldOut
from fedlora_app.server_app import initial_model
from strategies.client import load_adapter
from strategies.lora import Adapter

for run in map(Path, sys.argv[1:]):
    judged = read_config(json.loads((run / "config.json").read_text()))
    parts = judged.with_config(with_precision(judged.config))
    task = parts.task
    rows = task.test_rows()
    test, score = HeldOut(task, rows, parts.validation_rows), task.scores[0].name
    model, _ = initial_model(parts, rows.about)
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    adapter = Adapter.from_state_dict(state, parts.config.lora.scale)
    scores = []
    for rank in (r for r in (2, 4, 8, 16, 32, 64) if r <= adapter.rank):
        load_adapter(model, adapter.with_rank(rank))
        scores.append(f"rank {rank}: {test.evaluate(model)[score]:.3f}")
    print(run, *scores, sep="  ")
