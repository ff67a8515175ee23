"""How fast the aggregation rules are, beside what others do with the same updates.

python -m benchmarks.aggregation            # some minutes; docs/benchmarks/aggregation.md, .png
python -m benchmarks.aggregation --quick    # seconds; prints only
python -m benchmarks.aggregation --only averaging --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.kin import kin, turning
from benchmarks.measure import (
    PeakMemory,
    machine,
    median_seconds,
    seconds,
    side_by_side,
    size,
    table,
)
from benchmarks.updates import RANKS, SCALE, adapter
from strategies.aggregation import Update, make_aggregator
from strategies.lora import Adapter
from strategies.lora.lowrank import compact_svd
from strategies.messages import from_record, to_record

Section = Callable[[bool], tuple[str, dict[str, dict[str, float]]]]


def stacks(adapters: list[Adapter], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [a.pairs[module] for a in adapters]
    weight = SCALE / len(pairs)
    return torch.cat([p.A for p in pairs]), torch.cat([p.B for p in pairs], dim=1) * weight


# ----- (a) one layer: the truncated SVD of the mean update --------------------------------


def dense_reference(adapters: list[Adapter], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What published codes do: the dense mean, then a full SVD."""
    total = sum(a.pairs["layer.0"].delta() / len(adapters) for a in adapters)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def peft_runs(adapters: list[Adapter], d: int) -> dict[str, Callable[[], None]]:
    """PEFT's own merge of the same adapters, in a model of one layer."""
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(d, d, bias=False))
    names = [f"client{k}" for k in range(len(adapters))]
    merged = None
    for name, update in zip(names, adapters, strict=True):
        pair = update.pairs["layer.0"]
        config = LoraConfig(
            r=pair.rank, lora_alpha=int(SCALE * pair.rank), target_modules=["layer"]
        )
        if merged is None:
            merged = get_peft_model(model, config, adapter_name=name)
        else:
            merged.add_adapter(name, config)
        target = merged.base_model.model.layer
        target.lora_A[name].weight.data.copy_(pair.A)
        target.lora_B[name].weight.data.copy_(pair.B)
    weights = [1 / len(names)] * len(names)

    def run(kind: str) -> None:
        options = {"svd_rank": max(RANKS)} if kind == "svd" else {}
        merged.base_model.add_weighted_adapter(
            names, weights, "merged", combination_type=kind, **options
        )
        merged.base_model.delete_adapter("merged")

    return {"PEFT svd": lambda: run("svd"), "PEFT cat": lambda: run("cat")}


def one_layer(quick: bool) -> tuple[str, dict[str, dict[str, float]]]:
    rows, chart = [], {}
    for d in (256, 768) if quick else (768, 2048, 4096):
        rng = torch.Generator().manual_seed(0)
        adapters = [adapter(r, d, 1, rng) for r in RANKS]
        current = adapter(max(RANKS), d, 1, rng)
        flexlora = make_aggregator("flexlora")

        def ours(flexlora=flexlora, current=current, adapters=adapters):
            return flexlora.aggregate(current, [(a, 1.0) for a in adapters])

        slow = 1 if d > 2048 else 3
        rank = max(RANKS)
        times = {"flexlora": median_seconds(ours, 3 if quick else 15)}
        dense = [None]

        def reference(adapters=adapters, dense=dense, rank=rank):
            dense[0] = dense_reference(adapters, rank)

        times["dense SVD"] = median_seconds(reference, slow)
        peft = peft_runs(adapters, d)
        times["PEFT svd"] = median_seconds(peft["PEFT svd"], slow)
        times["PEFT cat"] = median_seconds(peft["PEFT cat"], 3)
        expected = dense[0][0] @ dense[0][1]
        got = ours().adapter.pairs["layer.0"].delta()
        rows.append([
            str(d),
            *(seconds(times[k]) for k in ("flexlora", "dense SVD", "PEFT svd", "PEFT cat")),
            f"{times['dense SVD'] / times['flexlora']:.0f}×",
            f"{float((got - expected).norm() / expected.norm()):.0e}",
        ])  # fmt: skip
        chart[f"d = {d}"] = times
    head = ["d", "flexlora", "dense SVD", "PEFT svd", "PEFT cat", "faster than dense", "difference"]
    text = (
        "One layer d×d, ten clients of ranks 4, 4, 8, 8, 16, 16, 32, 32, 64, 64, result of rank "
        "64. `PEFT cat` only stacks (rank 248), the others cut back to rank 64.\n\n"
    )
    return text + table(head, rows), chart


# ----- (m) how to take the SVD of B A ------------------------------------------------------


def by_qr(A: torch.Tensor, B: torch.Tensor, rank: int, cholesky: bool = False):
    def orthogonal(X):
        if not cholesky:
            return torch.linalg.qr(X)
        Q, R = X, torch.eye(X.shape[1], dtype=X.dtype)
        for _ in range(2):
            step = torch.linalg.cholesky(Q.T @ Q).T
            Q = torch.linalg.solve_triangular(step, Q, upper=True, left=False)
            R = step @ R
        return Q, R

    Qb, Rb = orthogonal(B)
    Qa, Ra = orthogonal(A.T)
    P, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    return Qb @ P[:, :rank], S[:rank], Vh[:rank] @ Qa.T


def methods(quick: bool) -> tuple[str, dict[str, dict[str, float]]]:
    rows, rank = [], max(RANKS)
    for d in (768,) if quick else (768, 2048, 4096):
        rng = torch.Generator().manual_seed(0)
        A, B = stacks([adapter(r, d, 1, rng) for r in RANKS], "layer.0")
        runs = {
            "Gram, float64 (used)": lambda A=A, B=B: compact_svd(A, B, rank),
            "QR, float32": lambda A=A, B=B: by_qr(A, B, rank),
            "QR, float64": lambda A=A, B=B: by_qr(A.double(), B.double(), rank),
            "CholeskyQR2, float32": lambda A=A, B=B: by_qr(A, B, rank, cholesky=True),
        }
        U, S, Vh = runs["QR, float64"]()
        best = (U * S) @ Vh
        times = side_by_side(runs, 3 if quick else 15)
        for name, run in runs.items():
            U, S, Vh = (x.float().double() for x in run())  # as it is sent
            error = float(((U * S) @ Vh - best).norm() / best.norm())
            rows.append([str(d), name, seconds(times[name]), f"{error:.0e}"])
    text = "The same truncated SVD (ρ = 248, rank 64); the error is against QR in float64.\n\n"
    return text + table(["d", "method", "time", "error"], rows), {}


# ----- (b) averaging beside Flower's FedAvg ------------------------------------------------


def averaging(quick: bool) -> tuple[str, dict[str, dict[str, float]]]:
    rng = torch.Generator().manual_seed(0)
    d, modules, clients = (256, 8, 4) if quick else (768, 48, 10)
    adapters = [adapter(16, d, modules, rng) for _ in range(clients)]
    current = adapters[0]
    replies = [
        RecordDict({
            "arrays": to_record(a.to_state_dict()),
            "metrics": MetricRecord({"num-examples": 10 + k}),
        })
        for k, a in enumerate(adapters)
    ]  # fmt: skip
    arrays = [{k: t.numpy() for k, t in a.to_state_dict().items()} for a in adapters]
    tensors = [list(a.tensors()) for a in adapters]

    def fedavg_arithmetic() -> None:  # the loop of aggregate_arrayrecords, records taken away
        out = {}
        for one in arrays:
            for key, value in one.items():
                if key not in out:
                    out[key] = value * 0.1
                else:
                    out[key] += value * 0.1

    def from_records(rule: str) -> None:
        aggregator = make_aggregator(rule)
        state = aggregator.init(current)
        for reply in replies:
            read = from_record(reply.array_records["arrays"])
            update = Adapter.from_state_dict(read, SCALE, check_finite=False)
            weight = float(reply.metric_records["metrics"]["num-examples"])
            aggregator.add(state, Update(update, weight))
        to_record(aggregator.finish(state).adapter.to_state_dict())

    rules = ("fedit", "zero-padding", "rbla", "replication")
    pairs = [(a, 10.0 + k) for k, a in enumerate(adapters)]
    records = side_by_side(
        {"Flower FedAvg": lambda: aggregate_arrayrecords(replies, "num-examples")}
        | {rule: lambda rule=rule: from_records(rule) for rule in rules},
        3 if quick else 11,
    )
    pure = side_by_side(
        {"Flower FedAvg": fedavg_arithmetic}
        | {rule: lambda rule=rule: make_aggregator(rule).aggregate(current, pairs)
           for rule in rules}
        | {"one copy of all updates": lambda: [[t.clone() for t in one] for one in tensors]},
        3 if quick else 11,
    )  # fmt: skip
    rows = [[n, seconds(records[n]) if n in records else "", seconds(pure[n])] for n in pure]
    text = (
        f"{clients} clients of rank 16, {modules} modules {d}×{d}, "
        f"{size(sum(a.nbytes for a in adapters))} of updates. Ours look for NaN and Inf "
        "in every update; FedAvg does not.\n\n"
    )
    return text + table(["rule", "records to record", "arithmetic alone"], rows), {}


# ----- (c) and (d) size --------------------------------------------------------------------


def lazily(ranks: list[int], d: int, modules: int) -> Iterator[tuple[Adapter, float]]:
    """Yield updates one at a time; each is gone when the next is made."""
    rng = torch.Generator().manual_seed(1)
    for k, rank in enumerate(ranks):
        yield adapter(rank, d, modules, rng), 10.0 + k


def timed_rule(rule: str, ranks: list[int], d: int, modules: int) -> tuple[float, float, int]:
    """Return the seconds of all adds, of the finish, and the growth of memory."""
    current = adapter(max(ranks), d, modules, torch.Generator().manual_seed(0))
    aggregator = make_aggregator(rule)
    with PeakMemory() as memory:
        state, adding = aggregator.init(current), 0.0
        for update, weight in lazily(ranks, d, modules):
            adding += median_seconds(
                lambda u=update, w=weight: aggregator.add(state, Update(u, w)), 1
            )
        finishing = median_seconds(lambda: aggregator.finish(state), 1)
    return adding, finishing, memory.growth


def large_model(quick: bool) -> tuple[str, dict[str, dict[str, float]]]:
    d, modules = (512, 8) if quick else (4096, 64)
    ranks = [8, 8, 8, 16, 16, 16, 32, 32, 64, 64]
    adding, finishing, growth = timed_rule("flexlora", ranks, d, modules)
    text = (
        f"flexlora on the q and v projections of a 7B model: {modules} modules {d}×{d}, ten "
        f"clients of ranks {', '.join(map(str, ranks))}.\n\n"
    )
    updates = sum(ranks) * 2 * d * modules * 4
    head = ["all adds", "finish", "together", "peak memory growth", "bytes of all updates"]
    row = [
        seconds(adding),
        seconds(finishing),
        seconds(adding + finishing),
        size(growth),
        size(updates),
    ]
    return text + table(head, [row]), {}


def many_clients(quick: bool) -> tuple[str, dict[str, dict[str, float]]]:
    rows = []
    d, modules = (128, 4) if quick else (768, 12)
    for rule in ("rbla", "flexlora"):
        for clients in (50, 200) if quick else (100, 1000):
            ranks = [(4, 8, 16, 32)[k % 4] for k in range(clients)]
            adding, finishing, growth = timed_rule(rule, ranks, d, modules)
            per_client = adding / clients
            updates = sum(ranks) * 2 * d * modules * 4
            rows.append([
                rule, f"{clients:,}", seconds(adding), seconds(per_client), seconds(finishing),
                size(growth), size(updates),
            ])  # fmt: skip
    text = (
        f"{modules} modules {d}×{d}, ranks 4, 8, 16, 32 in turn; updates are made one at a time, "
        "so memory is the aggregator's (and one update's).\n\n"
    )
    head = [
        "rule",
        "clients",
        "all adds",
        "one add",
        "finish",
        "peak memory growth",
        "bytes of all updates",
    ]
    return text + table(head, rows), {}


SECTIONS: dict[str, tuple[str, Section]] = {
    "large": ("A 7B model", large_model),  # first, while the heap is still small
    "turning": ("Turning factors, for a 7B model", turning),
    "clients": ("Many clients", many_clients),
    "kin": ("Rules beside their nearest kin", kin),
    "averaging": ("Averaging beside Flower's FedAvg", averaging),
    "methods": ("How the SVD is taken", methods),
    "layer": ("Averaging products: one layer", one_layer),
}


def draw(chart: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    names = list(next(iter(chart.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(chart))]
        values = [times[name] for times in chart.values()]
        bars = axes.bar(places, values, width, label=name)
        axes.bar_label(bars, [seconds(v) for v in values], fontsize=6, padding=2)
    axes.set(yscale="log", ylabel="seconds, log scale", xticks=range(len(chart)))
    axes.set_xticklabels(list(chart))
    axes.set_title("Mean product of ten clients, one layer, cut to rank 64", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; print only")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="these sections; print only")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    parts = {}
    chart: dict[str, dict[str, float]] = {}
    for name, (title, section) in SECTIONS.items():
        if not options.only or name in options.only:
            text, bars = section(options.quick)
            chart |= bars
            parts[name] = f"## {title}\n\n{text}"
            print(parts[name], flush=True)
    if options.quick or options.only:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    draw(chart, options.output / "aggregation.png")
    order = ("layer", "methods", "averaging", "kin", "large", "turning", "clients")
    body = "\n".join(parts[name] for name in order)
    (options.output / "aggregation.md").write_text(
        "# Speed and memory of aggregation\n\n"
        f"Written by `python -m benchmarks.aggregation` on {where}. Medians of several runs in one "
        "process; of one run where a run takes many seconds. Random updates.\n\n"
        f"![Times of one layer](aggregation.png)\n\n{body}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
