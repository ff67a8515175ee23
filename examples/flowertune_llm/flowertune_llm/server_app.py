"""A FlowerTune server with another strategy: clients of different rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flowertune_llm.client_app import build_model
from strategies import FedLoRA
from strategies.client import adapter_state, load_adapter
from strategies.messages import from_record, to_record
from strategies.model import GlobalModel
from strategies.ranks import ReportedRank

SCALE = 2.0  # lora_alpha / r, the same at every rank

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Tune, and leave the adapter and a record of every client in every round."""
    run = context.run_config
    torch.manual_seed(int(run["seed"]))
    model = build_model(str(run["model"]), rank=int(run["max-rank"]))
    folder = Path(str(run["output"]))
    folder.mkdir(parents=True, exist_ok=True)

    def write(record: Mapping[str, Any]) -> None:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)

    strategy = FedLoRA(  # in place of FedAvg
        aggregation=str(run["aggregation"]),
        ranks=ReportedRank(int(run["max-rank"])),
        scale=SCALE,
        seed=int(run["seed"]),
        min_available_nodes=int(run["min-nodes"]),
        evaluate_fraction=0.0,
        listeners=[write],
    )
    result = strategy.start(
        grid=grid, initial_arrays=to_record(adapter_state(model)), num_rounds=int(run["rounds"])
    )
    # As one adapter, whatever the rule: some merge a part into the base.
    load_adapter(model, GlobalModel.from_tensors(from_record(result.arrays), SCALE).combined())
    model.save_pretrained(folder / "adapter")
