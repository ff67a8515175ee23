"""Clients a second on one GPU: one at a time, with a share of it each, and in one batch.

    python -m benchmarks.shares [--clients 16] [--share 8] [--rounds 5] [KEY=VALUE …]

Whole runs on Flower's Ray engine, of the demo's model and data unless the keys say otherwise; all
clients train in every round. Nothing is evaluated in the rounds that count, which are all but the
first, where the workers start, and the last. Without a GPU the clients share the cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import machine, table
from fedlora_app.report.records import of_kind, read_records

PROJECT = Path(__file__).parents[1]
STEPS = 20


def seconds(folder: Path, args: argparse.Namespace, gpus: float, together: int) -> list[float]:
    """Run a simulation; return what its rounds took but the first and the last."""
    keys = {
        "sampling.fraction": 1.0, "evaluate.every": args.rounds, "evaluate.clients": 0.0,
        "data.test-rows": 16, "train.steps": STEPS, "ranks.list": "4,8,16,32",
        "simulate.clients-per-process": together,
    }  # fmt: skip
    pairs = [f"{key}={value}" for key, value in keys.items()]
    command = [
        sys.executable, "run_simulation.py", "--clients", str(args.clients), "--rounds",
        str(args.rounds), "--output", str(folder), "--gpus-per-client", str(gpus), "--verbose",
        "--config", *pairs, *args.keys,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=PROJECT, env=os.environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-5000:]}{done.stderr[-5000:]}")
    records = read_records(folder / "metrics.jsonl")
    bad = [r for r in of_kind(records, "client") if r["status"] != "ok"]
    if bad:
        raise RuntimeError(f"a client did not train: {bad[0]}")
    rounds = {r["round"]: r["seconds"] for r in of_kind(records, "round")}
    return [rounds[number] for number in range(2, args.rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("keys", nargs="*", help="of the run configuration, as KEY=VALUE")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--share", type=int, default=8, help="so many clients share a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f"--rounds: expected at least 3, got {args.rounds}")
    one = float(torch.cuda.is_available())
    print(f"{machine()}\n", flush=True)
    kinds = {
        "one at a time, the GPU its own": (one, 1),
        f"{args.share} processes, a share each": (one / args.share, 1),
        f"{args.share} clients in one batch": (one / args.share, args.share),
    }
    rows, first = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (gpus, together)) in enumerate(kinds.items()):
            took = statistics.median(seconds(Path(folder) / str(number), args, gpus, together))
            speed = args.clients / took
            first = first or speed
            rows.append((name, f"{took:.2f}", f"{speed:.2f}", f"{speed / first:.2f}"))
            print(name, rows[-1][1:], file=sys.stderr, flush=True)
    print(f"{args.clients} clients of {STEPS} steps a round {' '.join(args.keys)}\n")
    print(table(("", "seconds a round", "clients a second", "ratio"), rows))


if __name__ == "__main__":
    main()
