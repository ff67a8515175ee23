"""Rules beside what does most nearly the same work; sections of ``benchmarks.aggregation``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.measure import median_seconds, seconds, side_by_side, table
from benchmarks.updates import RANKS, adapter
from strategies.aggregation import Aggregator, Update, make_aggregator
from strategies.lora import Adapter, LoraPair

#: A rule with its options, and what does most nearly the same work.
KIN: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("support", {}, "none", "rbla"),
    ("replication", {"donors": "highest"}, "none", "replication by quality"),
    ("fedsvd", {}, "none", "flexlora"),
    ("fedmomentum", {}, "none", "fedex"),
    ("fold", {}, "none", "fslora"),
    ("rbla", {"align": True}, "none", "rbla"),
    ("rbla", {}, "median", "numpy's median"),
    ("rbla", {}, "trimmed-mean", "numpy's median"),
    ("rbla", {}, "norm-filter", "flexlora"),
    ("rbla", {}, "krum", "flexlora"),
)


def made(rule: str, options: dict[str, Any], robust: str) -> Aggregator[Any]:
    aggregator = make_aggregator(rule, **options)
    aggregator.server_round = 2
    aggregator.protect(robust)
    return aggregator


def given(aggregator: Aggregator[Any], current: Adapter, ranks: tuple[int, ...]) -> list[Update]:
    """Updates of what the rule sends, each number moved."""
    updates = []
    for k, rank in enumerate(ranks):
        sent = aggregator.download(current, rank, np.random.default_rng(k))
        rng = torch.Generator().manual_seed(k)
        pairs = {
            m: LoraPair(
                p.A + 0.01 * torch.randn(p.A.shape, generator=rng),
                p.B + 0.01 * torch.randn(p.B.shape, generator=rng),
                p.scale,
            )
            for m, p in sent.adapter.pairs.items()
        }
        updates.append(Update(Adapter(pairs), 10.0 + k, quality=1.0, sent=sent))
    return updates


def numpy_median(updates: list[Update]) -> None:
    """The median of each entry over its holders, as Flower's FedMedian takes it."""
    arrays = [
        {m: (p.A.numpy(), p.B.numpy().T) for m, p in u.adapter.pairs.items()} for u in updates
    ]
    levels = sorted({u.adapter.rank for u in updates})
    for module in arrays[0]:
        for factor in range(2):
            for low, high in zip([0, *levels], levels, strict=False):
                held = [a[module][factor][low:high] for a in arrays if len(a[module][0]) >= high]
                np.median(np.stack(held), axis=0)


def kin(quick: bool) -> tuple[str, dict[str, dict[str, float]]]:
    d, modules = (256, 4) if quick else (768, 24)
    current = adapter(max(RANKS), d, modules, torch.Generator().manual_seed(0))
    rows = []
    for rule, options, robust, other in KIN:
        own = made(rule, options, robust)
        updates = given(own, current, RANKS)
        if other == "numpy's median":
            beside = partial(numpy_median, updates)
        else:
            name, _, quality = other.partition(" by ")
            near = made(name, {"holder_weights": quality} if quality else {}, "none")
            beside = partial(near.aggregate, current, given(near, current, RANKS))
        times = side_by_side(
            {"own": partial(own.aggregate, current, updates), "kin": beside}, 3 if quick else 7
        )
        said = [f"{key} = {value}" for key, value in options.items()]
        name = ", ".join([rule, *said, *([] if robust == "none" else [robust])])
        ratio = times["own"] / times["kin"]
        rows.append([name, seconds(times["own"]), other, seconds(times["kin"]), f"{ratio:.2f}"])
    text = (
        f"{modules} modules {d}×{d}, ten clients of ranks {', '.join(map(str, RANKS))}; each "
        "beside what does most nearly the same work, in turns.\n\n"
    )
    return text + table(["rule", "time", "beside", "its time", "ratio"], rows), {}


def turning(quick: bool) -> tuple[str, dict[str, dict[str, float]]]:
    d, modules = (512, 8) if quick else (4096, 64)
    current = adapter(max(RANKS), d, modules, torch.Generator().manual_seed(0))
    rows = []
    for align in (False, True):
        aggregator = made("rbla", {"align": align}, "none")
        updates = given(aggregator, current, RANKS)
        took = median_seconds(partial(aggregator.aggregate, current, updates), 3)
        rows.append([f"rbla, align = {str(align).lower()}", seconds(took)])
    text = f"The same {modules} modules {d}×{d}, ten clients of ranks 4 to 64.\n\n"
    return text + table(["rule", "time"], rows), {}
