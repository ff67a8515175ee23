"""The demo from its command to its end by part, and a study's arms, each beside a bare loop.

    python -m benchmarks.simulation [demo] [study] [--rounds 10] [--arms 4]

Without a name it does both. The bare loop (``benchmarks.bare_loop``) does the same steps and
evaluations right after, on the same machine, in as many processes; a ratio is of one run of this
script. Prints what docs/benchmarks/simulation.md has of it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, table

PROJECT = Path(__file__).parents[1]
ARM_ROUNDS = 8

#: What is there when a line of the demo's log says so, in this order.
LINES = (
    ("the data as they were read", r"train: |train \("),
    ("the check is over", r"\d+ simulated clients, "),
    ("the run is submitted", r"Successfully started run|Starting logstream"),
    ("the server has its model", r"FedLoRA$"),
)


def stamped(command: Sequence[str]) -> Iterator[tuple[float, str]]:
    """Run a command; yield its lines with the seconds they came after."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=PROJECT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            yield time.perf_counter() - began, re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip("\n"))
    yield time.perf_counter() - began, ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")


class Watch:
    """Notes when the records of a run are written, by looking every few hundredths of a second."""

    def __init__(self, folder: Path) -> None:
        import threading

        self.began = time.perf_counter()
        self.seen: list[tuple[float, dict[str, Any]]] = []
        self.done: float | None = None
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def first(self, kind: str, number: int) -> float:
        return next(t for t, r in self.seen if r["kind"] == kind and r.get("round") == number)

    def first_step(self) -> float:
        """Return about when a client began to train: its answer less what it says it took."""
        came = {r["node"]: t for t, r in self.seen if r["kind"] == "arrived" and r["round"] == 1}
        took = {
            r["node"]: r["compute_seconds"]
            for _, r in self.seen
            if r["kind"] == "client" and r["round"] == 1 and r["status"] == "ok"
        }
        return min(came[node] - took[node] for node in took)

    def _look(self) -> None:
        position, file = 0, self._folder / "metrics.jsonl"
        while not self._over.wait(0.03):
            now = time.perf_counter() - self.began
            if file.exists():
                with file.open("rb") as stream:
                    stream.seek(position)
                    whole, end, _ = stream.read().rpartition(b"\n")
                position += len(whole) + len(end)
                self.seen += [(now, json.loads(line)) for line in whole.splitlines() if line]
            if self.done is None and (self._folder / "summary.json").exists():
                self.done = now


def bare(folder: Path) -> dict[str, Any]:
    """Run the bare loop over a run's steps."""
    command = [sys.executable, "-m", "benchmarks.bare_loop", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def demo(folder: Path, rounds: int) -> None:
    output = folder / "demo"
    watch = Watch(output)
    parts, end = {}, 0.0
    command = [sys.executable, "run_simulation.py", "--verbose", "--rounds", str(rounds)]
    for seconds, line in stamped([*command, "--output", str(output)]):
        end = seconds
        for name, pattern in LINES:
            if name not in parts and re.search(pattern, line):
                parts[name] = seconds
    watch.close()
    parts["the first clients are asked"] = watch.first("round-start", 1)
    parts["a client begins to train"] = watch.first_step()
    parts["the initial model is evaluated"] = watch.first("round", 0)
    parts["the first round is over"] = watch.first("round", 1)
    last = parts["the last round is over"] = watch.first("round", rounds)
    parts["the results are written"] = watch.done or float("nan")
    parts["the end"] = end
    print("### Start and end\n")
    print(table(["what is there", "seconds"], [[k, f"{v:.1f}"] for k, v in parts.items()]))

    loop = bare(output)
    own = [r["seconds"] for _, r in watch.seen if r["kind"] == "round" and r["round"]]
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    first = next(name for name in ("accuracy", *summary) if name in summary)
    before = parts["the first clients are asked"]
    lines = [
        ("until the first round", before, loop["start"]),
        ("a round, median", statistics.median(own), statistics.median(loop["rounds"])),
        ("all rounds", last - before, sum(loop["rounds"])),
        ("after the last round", end - last, loop["end"]),
        ("from command to end", end, loop["seconds"]),
    ]
    print(f"### Beside a bare loop\n\n{rounds} rounds.\n")
    rows = [[name, f"{a:.1f} s", f"{b:.1f} s", f"{a / b:.3f}"] for name, a, b in lines]
    rows.append([f"{first} at the end", f"{summary[first]:.3f}", f"{loop['accuracy']:.3f}", ""])
    print(table(["", "demo", "bare loop", "ratio"], rows))


def study(folder: Path, arms: int) -> None:
    file = folder / "bench.toml"
    lines = [
        "clients = 10", "seeds = [42]", "target = 0.9", "[config]", f"rounds = {ARM_ROUNDS}",
        "[settings.demo]", "data.alpha = 0.5",
    ]  # fmt: skip
    for number in range(arms):  # the same work under another name: times can be compared
        lines += [f"[arms.arm-{number + 1}]", f'ranks.list = "4,8,16,{32 - number}"']
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "fedlora_app.compare", str(file), "--output", str(folder)]
    starts, end = [], 0.0
    for seconds, line in stamped(command):
        end = seconds
        if re.match(r"\[\d+/\d+\] ", line) or line.startswith("**demo**"):
            starts.append(seconds)
    ran = starts[-1] - starts[0]
    loops = [bare(folder / "bench" / "demo" / f"arm-{n + 1}" / "seed-42") for n in range(arms)]
    steps = sum(sum(loop["rounds"]) + loop["end"] for loop in loops)
    print(f"### A study\n\n{arms} arms of {ARM_ROUNDS} rounds; until the first arm "
          f"{starts[0]:.1f} s, tables and plots {end - starts[-1]:.1f} s.\n")  # fmt: skip
    rows = [[f"{ran / arms:.1f} s", f"{steps / arms:.1f} s", f"{ran / steps:.3f}"]]
    print(table(["compare, an arm", "bare loop, without its start", "ratio"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", nargs="*", default=[], help="demo, study")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--arms", type=int, default=4)
    args = parser.parse_args()
    if unknown := set(args.what) - {"demo", "study"}:
        parser.error(f"expected demo or study, got {', '.join(sorted(unknown))}")
    print(f"{machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not args.what or "demo" in args.what:
            demo(Path(folder), args.rounds)
        if not args.what or "study" in args.what:
            study(Path(folder), args.arms)


if __name__ == "__main__":
    main()
