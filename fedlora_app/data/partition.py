"""How simulated clients share the training rows.

Apart from ``rows.py`` because ``flwr_datasets`` takes over a second to import, and a
deployed node, which has rows of its own, never needs it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    Partitioner,
    PathologicalPartitioner,
    SizePartitioner,
)
from numpy.typing import NDArray

from fedlora_app.config.keys import DataConfig
from fedlora_app.data.partitioners import (
    ClassSetsPartitioner,
    MixesPartitioner,
    ShardsPartitioner,
    dirichlet_sizes,
    double_imbalance,
    group_names,
)
from fedlora_app.tasks.base import Rows, Task

ATTEMPTS = 20  # seeds tried; each lets flwr_datasets draw a Dirichlet partition 11 times
BLIND = ("iid", "quantity", "natural")  # these look at no classes
SEVERAL = ("dirichlet", "pathological")  # another seed may do better

Indices = NDArray[np.int64]


def shares(task: Task, rows: Rows, num_clients: int) -> list[Indices]:
    """Return the row numbers of each simulated client; see ``partition``.

    Raises
    ------
    ValueError
        If the rows cannot be shared out so.
    """
    config, strata = task.config, task.strata(rows)
    if strata is None and config.data.partition not in BLIND:
        raise ValueError(
            f"data.partition = {config.data.partition!r} shares rows out by their classes, and "
            f"those of {task.name} have none; use {', '.join(BLIND[:-1])} or {BLIND[-1]}"
        )
    return partition(
        np.zeros(len(rows), np.int64) if strata is None else strata,
        config.data,
        num_clients=num_clients,
        seed=config.seed,
        label_names=task.strata_names(rows.about),
        groups=rows.groups,
    )


def partition(
    labels: NDArray[np.int64],
    config: DataConfig,
    *,
    num_clients: int,
    seed: int,
    label_names: Sequence[str] = (),
    groups: NDArray[np.str_] | None = None,
) -> list[Indices]:
    """Share the training rows out to simulated clients.

    Parameters
    ----------
    labels : ndarray of int64, shape (n,)
        Label of each row.
    config : DataConfig
        ``partition`` is one of

        - ``iid``: equal shares of the shuffled rows;
        - ``dirichlet``: each class is shared in proportions drawn from Dirichlet(alpha);
        - ``pathological``: each client holds ``classes_per_client`` classes;
        - ``double-imbalance``: client i holds the first i + 1 classes, each class split
          equally over its holders (see ``double_imbalance`` for a number of clients other than
          that of the classes);
        - ``shards``: rows sorted by label are cut into pieces, ``shards_per_client`` each;
        - ``quantity``: sizes drawn from Dirichlet(size_alpha), labels as they come;
        - ``dirichlet-quantity``: sizes as in ``quantity``, and each client's mix of labels
          drawn from a Dirichlet around that of all rows, as long as there are rows of a label;
        - ``natural``: a client for each value of ``groups``.
    num_clients : int
        Number of clients.
    seed : int
        Same seed, same shares.
    label_names : sequence of str
        Names for errors (default: the labels' numbers).
    groups : ndarray of str, shape (n,), optional
        Whose each row is, for ``natural``: the values of ``config.partition_column``.

    Returns
    -------
    list of ndarray of int64
        Sorted row numbers per client; every row is in exactly one of them, and each has
        at least ``config.min_samples``.

    Raises
    ------
    ValueError
        If that cannot be had.
    """
    rows = len(labels)
    if num_clients < 1:
        raise ValueError(f"number of clients: expected at least 1, got {num_clients}")
    if config.partition == "natural":
        return _owned(groups, config, num_clients)
    if rows < num_clients * config.min_samples:
        raise _too_small(config, num_clients, f"there are only {rows} rows in all", at_all=True)
    # The order of the rows decides who gets them in the partitioners that do not shuffle.
    order = np.random.default_rng(seed).permutation(rows)
    dataset = Dataset.from_dict({"row": order, "label": labels[order]}).with_format("numpy")
    reason = ""
    attempts = ATTEMPTS if config.partition in SEVERAL else 1
    for attempt in range(attempts):
        derived = _derived_seed(seed, attempt)
        partitioner = _partitioner(labels, config, num_clients, derived)
        try:
            parts = _apply(partitioner, dataset)
        except ValueError as error:  # flwr_datasets gave up on this seed
            reason = _named(str(error), label_names)
            continue
        smallest = min(map(len, parts))
        if smallest >= config.min_samples:
            return parts
        reason = f"the smallest client got {smallest} (attempts: {attempts})"
    if config.partition == "dirichlet":  # its partitioner does not tell what it got
        anything = _partitioner(labels, replace(config, min_samples=0), num_clients, seed)
        smallest = min(map(len, _apply(anything, dataset)))
        reason = (
            f"in {11 * attempts} draws there was always one with fewer, in the first {smallest}"
        )
    raise _too_small(config, num_clients, reason)


def _partitioner(
    labels: NDArray[np.int64], config: DataConfig, num_clients: int, seed: int
) -> Partitioner:
    classes: list[int] = np.unique(labels).tolist()

    def sizes() -> list[int]:
        return dirichlet_sizes(
            len(labels), num_clients, alpha=config.size_alpha, least=config.min_samples, seed=seed
        )

    match config.partition:
        case "iid":
            return IidPartitioner(num_partitions=num_clients)
        case "dirichlet":
            return DirichletPartitioner(
                num_partitions=num_clients,
                partition_by="label",
                alpha=config.alpha,
                min_partition_size=config.min_samples,
                self_balancing=False,
                seed=seed,
            )
        case "pathological":
            return _pathological(classes, config.classes_per_client, num_clients, seed)
        case "double-imbalance":
            return ClassSetsPartitioner(double_imbalance(num_clients, classes), seed=seed)
        case "shards":
            if num_clients * config.shards_per_client > len(labels):
                raise ValueError(
                    f"data.shards-per-client: {len(labels)} rows cannot be cut into "
                    f"{config.shards_per_client} pieces for each of {num_clients} clients; lower it"
                )
            return ShardsPartitioner(num_clients, config.shards_per_client, seed=seed)
        case "quantity":
            return SizePartitioner(sizes())
        case "dirichlet-quantity":
            return MixesPartitioner(sizes(), config.alpha, seed=seed)
        case other:
            raise ValueError(
                "data.partition: expected one of iid, dirichlet, pathological, double-imbalance, "
                f"shards, quantity, dirichlet-quantity, natural; got {other!r}"
            )


def _owned(groups: NDArray[np.str_] | None, config: DataConfig, num_clients: int) -> list[Indices]:
    """Return the rows of each group, or raise ValueError if there are not as many clients.

    ``NaturalIdPartitioner`` does the same, with a progress bar on every client's console.
    """
    column = config.partition_column
    if groups is None:
        raise ValueError(
            "data.partition = 'natural': expected rows that know whose they are (Rows.groups); "
            "have the task's `rows` fill it with `fedlora_app.data.columns.groups_of`"
        )
    names = group_names(groups)
    counts = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    some = ", ".join(map(repr, names[:6])) + (", …" if len(names) > 6 else "")
    if len(names) < 2:
        raise ValueError(
            f"data.partition-column: expected a column that tells clients apart, but {column!r} "
            f"is {some} in every row; name another column, or set data.partition to another way"
        )
    if len(names) != num_clients:
        ids = ""
        if 2 * len(names) > len(groups):
            ids = "; most values name one row only: is it the rows' own number that is meant?"
        raise ValueError(
            f"data.partition = 'natural': column {column!r} names {len(names)} clients ({some}), "
            f"so expected {len(names)} clients, got {num_clients}; leave out --clients "
            f"(flwr run: num-supernodes={len(names)}), or name a column of {num_clients} values"
            + ids
        )
    few = [name for name in names if counts[name] < config.min_samples]
    if few:
        fewest = min(few, key=counts.__getitem__)
        raise ValueError(
            f"data.partition = 'natural': expected at least {config.min_samples} rows "
            f"(data.min-samples) for each value of {column!r}, but {len(few)} of {len(names)} have "
            f"fewer, {fewest!r} {counts[fewest]}; lower data.min-samples, or take their rows out"
        )
    values, of = np.unique(groups, return_inverse=True)
    rows = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
    found = dict(zip(values.tolist(), rows, strict=True))
    return [found[name] for name in names]


def _pathological(classes: list[int], per_client: int, num_clients: int, seed: int) -> Partitioner:
    if not len(classes) / num_clients <= per_client <= len(classes):
        raise ValueError(
            f"data.classes-per-client: {num_clients} clients share {len(classes)} classes, so "
            f"expected {-(-len(classes) // num_clients)} to {len(classes)}, got {per_client}"
        )
    if num_clients >= len(classes):
        return PathologicalPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            num_classes_per_partition=per_client,
            class_assignment_mode="first-deterministic",
            seed=seed,
        )
    # With fewer clients than classes PathologicalPartitioner leaves classes out, and with
    # them rows. Deal a shuffled deck of the classes round and round instead.
    deck = np.random.default_rng(seed).permutation(classes).tolist()
    hands = [
        [deck[(client * per_client + card) % len(deck)] for card in range(per_client)]
        for client in range(num_clients)
    ]
    return ClassSetsPartitioner(hands, seed=seed)


def _apply(partitioner: Partitioner, dataset: Dataset) -> list[Indices]:
    partitioner.dataset = dataset
    with warnings.catch_warnings():
        # DirichletPartitioner warns at each draw that it repeats; here that is the plan.
        warnings.filterwarnings("ignore", message="The specified min_partition_size")
        parts = [partitioner.load_partition(i)["row"] for i in range(partitioner.num_partitions)]
    return [np.sort(np.asarray(part[:], dtype=np.int64)) for part in parts]


def _derived_seed(seed: int, attempt: int) -> int:
    if attempt == 0:  # the common case stays what flwr_datasets gives for this seed
        return seed
    return int(np.random.SeedSequence([seed, attempt]).generate_state(1)[0])


def _named(reason: str, label_names: Sequence[str]) -> str:
    """Give a class its name where flwr_datasets tells its number."""

    def name(match: re.Match[str]) -> str:
        number = int(match[1])
        return f"Label: {label_names[number] if number < len(label_names) else number}"

    return re.sub(r"Label: (\d+)", name, reason)


def _too_small(
    config: DataConfig, num_clients: int, reason: str, *, at_all: bool = False
) -> ValueError:
    """``at_all``: no way of sharing would do."""
    remedies = (
        {}
        if at_all
        else {
            "dirichlet": "raise data.alpha, ",
            "pathological": "change data.classes-per-client, ",
        }
    )
    remedy = remedies.get(config.partition, "")
    return ValueError(
        f"data.partition = {config.partition!r}: expected at least {config.min_samples} rows "
        f"(data.min-samples) for each of {num_clients} clients, but {reason}; {remedy}"
        "lower data.min-samples or use fewer clients"
    )
