"""FedLoRA on a small model of ones, with checkpoints and a ``metrics.jsonl``."""

import json
import resource
import time
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from strategies import FedLoRA
from strategies.checkpoint import Checkpoints
from strategies.messages import from_record, to_record
from strategies.ranks import UniformRank
from strategies.round.waiting import Waiting
from strategies.sampling import FractionSampling
from strategies.saving import Saver

HEAD = 30_000  # numbers; a checkpoint holds them, and no other file is nearly as large

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    folder = Path(str(config["output"]))
    folder.mkdir(parents=True, exist_ok=True)
    metrics = (folder / "metrics.jsonl").open("a", buffering=1)

    def listen(record) -> None:
        metrics.write(json.dumps(record) + "\n")
        if record["kind"] == "round-start":
            limit_files(full=record["round"] == config["full-disk-round"])
        if record["kind"] == "round" and record["round"] + 1 == config["newcomer-round"]:
            while len(list(grid.get_node_ids())) <= int(config["min-nodes"]):
                time.sleep(0.2)

    strategy = FedLoRA(
        ranks=UniformRank(4),
        sampling=FractionSampling(1.0),
        min_replies=int(config["min-replies"]),
        min_available_nodes=int(config["min-nodes"]),
        clip_norm=float(config["clip-norm"]),
        evaluate_fraction=0.0,
        query=True,
        query_timeout=300.0,
        saver=Saver(
            Checkpoints(folder / "checkpoints"),
            resume_from=str(config["resume-from"]),
            fingerprint={"rank": 4},
        ),
        waiting=Waiting(quorum=float(config["quorum"]), staleness=float(config["staleness"])),
        listeners=[listen],
    )
    initial = {
        "layer.lora_A.weight": torch.ones(4, 6),
        "layer.lora_B.weight": torch.ones(5, 4),
        "head.bias": torch.ones(HEAD),
    }
    result = strategy.start(
        grid, to_record(initial), int(config["rounds"]), float(config["round-timeout"])
    )
    final = {k: [float(v.min()), float(v.max())] for k, v in from_record(result.arrays).items()}
    (folder / "final.json").write_text(json.dumps(final))


def limit_files(*, full: bool) -> None:
    """Let this process write small files only, as on a disk that is nearly full; or any."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * HEAD if full else most, most))
