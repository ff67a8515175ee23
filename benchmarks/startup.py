"""Where the time of one training message goes on a SuperNode, and what a warm start spares.

    python -m benchmarks.startup [--repeat 5] [--config key=value …]

First the parts: each repetition starts a new interpreter that does what a message makes it do.
Then rounds of one training step on a real SuperLink with one SuperNode: Flower's, one that imports
once, and one whose client stays with model and rows.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = (
    "interpreter and flwr",
    "import of the client app",
    "model",
    "rows",
    "receive",
    "train",
    "send",
)


def one_message(flat: dict, site: str) -> dict[str, float]:
    """Do in this process what a training message asks for, and time it."""
    import psutil

    began = psutil.Process().create_time()
    seconds: dict[str, float] = {}

    def mark(part: str) -> None:
        seconds[part] = time.time() - began - sum(seconds.values())

    import flwr.client
    import flwr.clientapp
    import flwr.supernode.cli  # noqa: F401

    mark(PARTS[0])
    from flwr.app import RecordDict

    from fedlora_app.client_app import INFO_KEY, LoRAClient
    from fedlora_app.config.keys import RunConfig
    from fedlora_app.config.precision import with_precision

    config = with_precision(RunConfig.from_flat(flat))
    labels = ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]
    client = LoRAClient(config, {"data-path": site}, RecordDict())
    mark(PARTS[1])
    told = {INFO_KEY: json.dumps({"labels": labels})}
    model = client._model(told)
    mark(PARTS[2])
    rows, _ = client._rows(told)
    mark(PARTS[3])
    from strategies.client import adapter_state, receive, send
    from strategies.lora import Adapter

    state = {k: t.clone() for k, t in adapter_state(model).items()}
    sent = Adapter.from_state_dict(state, 2.0).with_rank(8).to_state_dict()
    receive(model, sent, {"lora-scale": 2.0})
    mark(PARTS[4])
    from fedlora_app.training import train

    train(model, rows, config.train, seed=1)
    mark(PARTS[5])
    send(model, {})
    mark(PARTS[6])
    return seconds


def write_rows(file: Path, count: int = 500) -> None:
    """Write the first rows of the packaged data as a site would have them."""
    from fedlora_app.config.keys import RunConfig
    from fedlora_app.tasks import make_task

    rows = make_task(RunConfig()).train_rows()
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label"])
        for text, label in zip(rows.items[:count], rows.targets[:count], strict=True):
            writer.writerow([text, rows.about["labels"][label]])


NODES: dict[str, dict] = {
    "flower-supernode": {"warm": False},
    "fedlora supernode --keep 0": {"warm": True, "options": ["--keep", "0"]},
    "fedlora supernode": {"warm": True},
}


def rounds(site: Path, repeat: int, name: str) -> list[float]:
    """Return the seconds of rounds in which one SuperNode, of ``NODES``, trains for one step."""
    from fedlora_app.launch.superlink import SuperLink

    folder = site.parent / name
    config = {
        "output": str(folder),
        "rounds": repeat + 1,
        "min-nodes": 1,
        "train.steps": 1,
        "data.max-length": 16,
        "evaluate.every": repeat + 1,
        "checkpoint-every": 0,
    }
    with SuperLink() as link:
        link.start_supernode(f'data-path="{site}"', **NODES[name])
        run_id = link.run(Path(__file__).parents[1], config)
        log = list(link.stream(run_id))
        if not link.status(run_id).completed:
            raise RuntimeError("\n".join(log))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    # Without the first one, in which the SuperNode may still have been starting.
    return [
        r["seconds"] for r in records if r["kind"] == "round" and r["round"] in range(2, repeat + 1)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--config", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        pairs = (item.split("=", 1) for item in args.config)
        print(json.dumps(one_message({k: json.loads(v) for k, v in pairs}, args.one)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site.csv"
        write_rows(site)
        command = [sys.executable, "-m", "benchmarks.startup", "--one", str(site)]
        for _ in range(args.repeat):
            done = subprocess.run(
                [*command, "--config", *args.config], check=True, capture_output=True, text=True
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        seconds = {name: rounds(site, args.repeat, name) for name in NODES}
    print(f"| part | seconds (median of {args.repeat}) |\n|---|---|")
    for part in PARTS:
        print(f"| {part} | {statistics.median(run[part] for run in runs):.2f} |")
    total = statistics.median(sum(run.values()) for run in runs)
    print(f"| all | {total:.2f} |")
    print(f"\n| SuperNode | seconds a round of one step (median of {args.repeat - 1}) |\n|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.2f} |")


if __name__ == "__main__":
    main()
