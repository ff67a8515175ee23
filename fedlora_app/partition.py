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
)
from numpy.typing import NDArray

from fedlora_app.config import DataConfig
from fedlora_app.tasks.base import Rows, Task

ATTEMPTS = 20  # seeds tried; each lets flwr_datasets draw a Dirichlet partition 11 times

Indices = NDArray[np.int64]


class ClassSetsPartitioner(Partitioner):  # type: ignore[misc]  # flwr_datasets has no types
    """Partition i holds the classes of set i; a class is split equally over its holders.

    Parameters
    ----------
    class_sets : sequence of sequences of int
        Class ids of each partition. A class in no set is in no partition.
    partition_by : str
        Column of the class ids (default: "label").
    seed : int or None
        Decides which rows of a class go to which holder (default: 42).
    """

    def __init__(
        self,
        class_sets: Sequence[Sequence[int]],
        partition_by: str = "label",
        seed: int | None = 42,
    ) -> None:
        super().__init__()
        self._class_sets = [set(classes) for classes in class_sets]
        self._partition_by = partition_by
        self._seed = seed
        self._indices: list[Indices] = []

    @property
    def num_partitions(self) -> int:
        """Number of class sets."""
        return len(self._class_sets)

    def load_partition(self, partition_id: int) -> Dataset:
        """Return the rows of one partition, in the order of the data set."""
        if not self._indices:
            self._indices = self._split()
        return self.dataset.select(self._indices[partition_id])

    def _split(self) -> list[Indices]:
        rng = np.random.default_rng(self._seed)
        labels = np.asarray(self.dataset[self._partition_by])
        parts: list[list[Indices]] = [[] for _ in self._class_sets]
        for label in np.unique(labels):
            holders = [i for i, classes in enumerate(self._class_sets) if label in classes]
            rows = rng.permutation(np.flatnonzero(labels == label))
            for holder, share in zip(
                holders, np.array_split(rows, max(1, len(holders))), strict=False
            ):
                parts[holder].append(share)
        return [np.sort(np.concatenate([*part, np.empty(0, np.int64)])) for part in parts]


def double_imbalance(num_clients: int, classes: Sequence[int]) -> list[list[int]]:
    """Return the class sets of AutoRank's "double imbalance": volume grows with variety.

    As many clients as classes: client i holds the first i + 1 classes. Otherwise client i
    holds the first ``ceil((i + 1) * len(classes) / num_clients)``, so that the number of
    classes still grows evenly, up to all of them on the last client.

    Parameters
    ----------
    num_clients : int
        Number of clients.
    classes : sequence of int
        Class ids, the most widely held first.
    """
    held = [-(-(i + 1) * len(classes) // num_clients) for i in range(num_clients)]
    return [list(classes[:count]) for count in held]


def shares(task: Task, rows: Rows, num_clients: int) -> list[Indices]:
    """Return the row numbers of each simulated client; see ``partition``.

    Raises
    ------
    ValueError
        If the rows cannot be shared out so.
    """
    config, strata = task.config, task.strata(rows)
    if strata is None and config.data.partition != "iid":
        raise ValueError(
            f"data.partition = {config.data.partition!r} shares rows out by their classes, and "
            f"those of {task.name} have none; use 'iid'"
        )
    return partition(
        np.zeros(len(rows), np.int64) if strata is None else strata,
        config.data,
        num_clients=num_clients,
        seed=config.seed,
        label_names=task.strata_names(rows.about),
    )


def partition(
    labels: NDArray[np.int64],
    config: DataConfig,
    *,
    num_clients: int,
    seed: int,
    label_names: Sequence[str] = (),
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
          that of the classes).
    num_clients : int
        Number of clients.
    seed : int
        Same seed, same shares.
    label_names : sequence of str
        Names for errors (default: the labels' numbers).

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
    if rows < num_clients * config.min_samples:
        raise _too_small(config, num_clients, f"there are only {rows} rows in all", at_all=True)
    # The order of the rows decides who gets them in the partitioners that do not shuffle.
    order = np.random.default_rng(seed).permutation(rows)
    dataset = Dataset.from_dict({"row": order, "label": labels[order]}).with_format("numpy")
    reason = ""
    attempts = ATTEMPTS if config.partition in ("dirichlet", "pathological") else 1
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
        case other:
            raise ValueError(
                "data.partition: expected one of iid, dirichlet, pathological, double-imbalance; "
                f"got {other!r}"
            )


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
