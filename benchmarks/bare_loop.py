"""The work of a finished run in a bare loop: torch, transformers and PEFT in a pool of processes.

    python -m benchmarks.bare_loop RUN_FOLDER [--processes 2] [--plain-dropout]

No Flower, no Ray, no messages: what a run costs above this is the price of the federation. The
loop takes from the run's folder which clients trained in which round at which rank, and does as
many steps on as many rows; it evaluates what and when the run did, on as many threads. Of this
project it takes what both would read the same way (rows, their shares, weights from files), and
the run's faster dropout, without which the loop would have the longer steps.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
A, B = "lora_A", "lora_B"


class Loop:
    """What every process holds: the frozen model, all rows as token ids, and who has which."""

    def __init__(self, flat: dict[str, Any], clients: int, quick: bool) -> None:
        import numpy as np
        import torch

        from fedlora_app.config.keys import RunConfig
        from fedlora_app.data.partition import shares
        from fedlora_app.tasks import make_task

        torch.set_num_threads(1)
        self.config = config = RunConfig.from_flat(flat)
        self.quick = quick
        self.dtype = {"bfloat16": torch.bfloat16}.get(config.train.precision, torch.float32)
        task = make_task(config)
        rows, test = task.train_rows(), task.test_rows()
        self.rows, self.test = task.encode(rows), task.encode(test)
        self.base = task.model(rows.about, seed=config.seed, precision=config.train.precision)
        self.own = []  # of each client: rows to train on, rows to evaluate on
        for share in shares(task, rows, clients):
            mixed = np.random.default_rng(config.seed).permutation(share)
            held = max(1, round(len(mixed) * config.data.validation_fraction))
            self.own.append((mixed[held:], mixed[:held]))

    @cache  # noqa: B019
    def model(self, rank: int) -> Any:
        """Return a PEFT model of this rank; there is one of each in a process."""
        import peft

        lora = self.config.lora
        heads = ["classifier"]
        settings = peft.LoraConfig(
            r=rank, lora_alpha=lora.scale * rank, lora_dropout=lora.dropout,
            target_modules=["query", "value"], modules_to_save=heads,
        )  # fmt: skip
        return peft.get_peft_model(copy.deepcopy(self.base), settings)

    def train(self, order: tuple[int, int, int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        """Train one client for one round; return how many rows it has, and what it trained."""
        import numpy as np
        import torch

        client, rank, server_round, state = order
        t, model = self.config.train, self.model(rank)
        put(model, state, rank)
        model.train()
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        slower = t.round_decay ** (server_round - 1)
        groups = [
            {"params": [p for n, p in trained if "lora_" in n], "lr": t.learning_rate * slower},
            {"params": [p for n, p in trained if "lora_" not in n],
             "lr": t.head_learning_rate * slower},
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, weight_decay=t.weight_decay)
        mine = self.own[client][0]
        rng = np.random.default_rng([self.config.seed, server_round, client])
        wanted = t.steps * t.batch_size or round(t.epochs * len(mine))
        passes = -(-wanted // len(mine))
        seen = np.concatenate([rng.permutation(mine) for _ in range(passes)])[:wanted]
        with self.dropout():
            for start in range(0, wanted, t.batch_size):
                batch = self.rows.batch(seen[start : start + t.batch_size])
                with self.autocast():
                    loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                if t.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_([p for _, p in trained], t.max_grad_norm)
                optimizer.step()
        return len(mine), {n: p.detach().clone().numpy() for n, p in trained}

    def look(self, order: tuple[int, int, dict[str, Any]]) -> float:
        """Return the accuracy of the model at a client's rank on the rows it keeps for that."""
        client, rank, state = order
        model = self.model(rank)
        put(model, state, rank)
        return self.accuracy(model, self.rows.take(self.own[client][1]))

    def accuracy(self, model: Any, rows: Any) -> float:
        import numpy as np
        import torch

        model.eval()
        order, right, start = np.argsort(-rows.sizes, kind="stable"), 0, 0
        while start < len(rows):  # rows of like length together, no more than fit the cache
            tokens = 1024 * torch.get_num_threads()
            size = max(1, min(self.config.evaluate.batch_size, tokens // rows.sizes[order[start]]))
            batch = rows.batch(order[start : start + size])
            labels = batch.pop("labels")
            with torch.inference_mode(), self.autocast():
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
            start += size
        return right / len(rows)

    def autocast(self) -> Any:
        import torch

        low = self.dtype == torch.bfloat16
        return torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext()

    def dropout(self) -> Any:
        from strategies.dropout import QuickDropout

        return QuickDropout(0) if self.quick else contextlib.nullcontext()


def put(model: Any, state: dict[str, Any], rank: int) -> None:
    """Copy a state of the largest rank into a model: its first ``rank`` rows of A, columns of B."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                value = torch.from_numpy(state[name])
                part = value[:rank] if A in name else value[:, :rank] if B in name else value
                parameter.copy_(part)


def mean(found: list[tuple[int, dict[str, Any]]], before: dict[str, Any]) -> dict[str, Any]:
    """Return the mean by rows; of each row of A and column of B over those that trained it."""
    import numpy as np

    out = {}
    for name, old in before.items():
        total, weight = np.zeros_like(old), np.zeros_like(old)
        for rows, state in found:
            value = state[name]
            where = tuple(slice(0, n) for n in value.shape)
            total[where] += rows * value
            weight[where] += rows
        out[name] = np.where(weight > 0, total / np.maximum(weight, 1), old)
    return out


def schedule(folder: Path) -> Iterator[tuple[list[tuple[int, int]], bool, dict[int, int]]]:
    """Yield of each round who trained at which rank, whether it was evaluated, and by whom."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    ranks: dict[int, int] = {}
    for book in (r for r in records if r["kind"] == "ranks"):
        ranks |= {entry["client"]: entry["rank"] for entry in book["clients"]}
    for done in (r for r in records if r["kind"] == "round" and r["round"]):
        mine = [r for r in records if r.get("round") == done["round"]]
        chosen = [(r["client"], r["rank"]) for r in mine if r["kind"] == "client"]
        looked = {r["client"]: ranks[r["client"]] for r in mine if r["kind"] == "client-evaluation"}
        yield chosen, done.get("server_accuracy") is not None, looked


_loop: Loop


def _train(order: Any) -> Any:
    return _loop.train(order)


def _look(order: Any) -> float:
    return _loop.look(order)


def run(folder: Path, processes: int, quick: bool) -> dict[str, Any]:
    """Do the work of the run in ``folder``; return seconds and accuracies."""
    import numpy as np
    import torch

    global _loop
    flat = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    flat |= {"output": "", "resume-from": ""}
    rounds = list(schedule(folder))
    clients = 1 + max(client for chosen, _, _ in rounds for client, _ in chosen)
    books = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    clients = max([clients, *(len(b["clients"]) for b in books if b["kind"] == "ranks")])
    _loop = Loop(flat, clients, quick)
    # Copies of this process, before it has threads: what is read is there once.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        top = max(rank for chosen, _, _ in rounds for _, rank in chosen)
        model = _loop.model(top)
        state = {
            n: p.detach().clone().numpy() for n, p in model.named_parameters() if p.requires_grad
        }
        torch.set_num_threads(os.cpu_count() or 1)
        few = _loop.test
        if 0 < _loop.config.data.test_rows < len(few):
            chosen_rows = np.random.default_rng(0).permutation(len(few))
            few = few.take(np.sort(chosen_rows[: _loop.config.data.test_rows]))
        curve = [_loop.accuracy(model, few)]
        ready = time.perf_counter()
        seconds = []
        for number, (chosen, evaluated, looked) in enumerate(rounds, start=1):
            clock = time.perf_counter()
            orders = [(client, rank, number, state) for client, rank in chosen]
            state = mean(pool.map(_train, orders, chunksize=1), state)
            if looked:
                pool.map(_look, [(c, rank, state) for c, rank in looked.items()], chunksize=1)
            if evaluated:
                put(model, state, top)
                curve.append(_loop.accuracy(model, few))
            seconds.append(time.perf_counter() - clock)
        put(model, state, top)
        final = _loop.accuracy(model, _loop.test)
    end = time.perf_counter()
    return {
        "start": ready - BEGAN, "rounds": seconds, "end": end - ready - sum(seconds),
        "seconds": end - BEGAN, "curve": curve, "accuracy": final,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="of a finished run with the packaged model")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--plain-dropout", action="store_true", help="that of torch")
    args = parser.parse_args()
    print(json.dumps(run(args.folder, args.processes, not args.plain_dropout)))


if __name__ == "__main__":
    main()
