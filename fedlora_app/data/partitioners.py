"""Ways of sharing rows out that ``flwr_datasets`` lacks, or in which it loses rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import Partitioner
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class _Listed(Partitioner):  # type: ignore[misc]  # flwr_datasets has no types
    """A partitioner that lists the rows of all partitions at once, when first asked."""

    def __init__(self) -> None:
        super().__init__()
        self._indices: list[Indices] = []

    def load_partition(self, partition_id: int) -> Dataset:
        """Return the rows of one partition."""
        if not self._indices:
            self._indices = self._split()
        return self.dataset.select(self._indices[partition_id])

    def _split(self) -> list[Indices]:
        raise NotImplementedError


class ClassSetsPartitioner(_Listed):
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

    @property
    def num_partitions(self) -> int:
        """Number of class sets."""
        return len(self._class_sets)

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


class ShardsPartitioner(_Listed):
    """McMahan's shards: rows sorted by class, cut into pieces, so many pieces a partition.

    ``flwr_datasets.partitioner.ShardPartitioner`` cuts pieces of one size and drops the rows
    that are left over, or a piece; here pieces differ by a row.

    Parameters
    ----------
    num_partitions : int
        Number of partitions.
    shards : int
        Pieces of each.
    partition_by : str
        Column of the class ids (default: "label").
    seed : int or None
        Decides who gets which pieces (default: 42).
    """

    def __init__(
        self,
        num_partitions: int,
        shards: int,
        partition_by: str = "label",
        seed: int | None = 42,
    ) -> None:
        super().__init__()
        self._num_partitions = num_partitions
        self._shards = shards
        self._partition_by = partition_by
        self._seed = seed

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return self._num_partitions

    def _split(self) -> list[Indices]:
        by_class = np.argsort(np.asarray(self.dataset[self._partition_by]), kind="stable")
        pieces = np.array_split(by_class, self._num_partitions * self._shards)
        dealt = np.random.default_rng(self._seed).permutation(len(pieces))
        hands = dealt.reshape(self._num_partitions, self._shards)
        return [np.concatenate([pieces[piece] for piece in hand]) for hand in hands]


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


class MixesPartitioner(_Listed):
    """Partitions of given sizes, whose class mixes are drawn from Dirichlet(alpha * C * p).

    p are the C classes' shares of all rows, as in Hsu et al. (2019, arXiv:1909.06335), so that
    a large alpha means alike. Rows are taken in a random order of the places in all partitions;
    once a class is used up, those that wanted it take what else is in their mix.

    ``flwr_datasets.partitioner.InnerDirichletPartitioner`` fills small partitions first and
    leaves the rest to the large ones, and at small alpha ends in 0/0.

    Parameters
    ----------
    sizes : sequence of int
        They add up to the rows.
    alpha : float
        Concentration; smaller is more skewed.
    partition_by : str
        Column of the class ids (default: "label").
    seed : int or None
        Decides the mixes and who gets which rows (default: 42).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        alpha: float,
        partition_by: str = "label",
        seed: int | None = 42,
    ) -> None:
        super().__init__()
        self._sizes = list(sizes)
        self._alpha = alpha
        self._partition_by = partition_by
        self._seed = seed

    @property
    def num_partitions(self) -> int:
        """Number of sizes."""
        return len(self._sizes)

    def _split(self) -> list[Indices]:
        rng = np.random.default_rng(self._seed)
        labels = np.unique(np.asarray(self.dataset[self._partition_by]), return_inverse=True)[1]
        left = np.bincount(labels)
        mean = self._alpha * len(left) * left / left.sum()
        # Not all zero, which a Dirichlet of small numbers can be: then any class will do.
        mixes = np.nan_to_num(rng.dirichlet(mean, size=len(self._sizes)))
        owners = rng.permutation(np.repeat(np.arange(len(self._sizes)), self._sizes))
        taken = np.empty(len(owners), np.int64)  # the class in each place
        done = 0
        while done < len(owners):
            wanted = np.where(left > 0, mixes, 0.0)
            nothing = wanted.sum(1) <= 0
            wanted[nothing] = left
            upper = np.cumsum(wanted / wanted.sum(1, keepdims=True), axis=1)
            upper[:, np.flatnonzero(left)[-1] :] = 1.0  # whatever rounding made of the sum
            drawn = (rng.random(len(owners) - done)[:, None] >= upper[owners[done:]]).sum(1)
            # Draws hold until a class has run out; from there on they are drawn anew.
            order, counts = (
                np.argsort(drawn, kind="stable"),
                np.bincount(drawn, minlength=len(left)),
            )
            over = np.flatnonzero(counts > left)
            first = order[np.cumsum(counts)[over] - counts[over] + left[over]]
            good = int(first.min(initial=len(drawn)))
            taken[done : done + good] = drawn[:good]
            left = left - np.bincount(drawn[:good], minlength=len(left))
            done += good
        rows = np.empty(len(owners), np.int64)
        for label in range(len(left)):
            rows[taken == label] = rng.permutation(np.flatnonzero(labels == label))
        return [rows[owners == client] for client in range(len(self._sizes))]


def dirichlet_sizes(
    rows: int, num_clients: int, *, alpha: float, least: int, seed: int
) -> list[int]:
    """Return sizes that add up to ``rows``: ``least`` each, the rest as a Dirichlet draws it.

    Drawing until nobody is below ``least``, as others do, never ends with many clients and a
    small ``alpha``.

    Parameters
    ----------
    rows : int
        At least ``num_clients * least``.
    num_clients : int
        Number of clients.
    alpha : float
        Concentration; smaller is more unequal.
    least : int
        Everyone's rows before the rest is drawn.
    seed : int
        Same seed, same sizes.
    """
    rest = rows - num_clients * least
    exact = np.random.default_rng(seed).dirichlet(np.full(num_clients, alpha)) * rest
    sizes = np.floor(exact).astype(np.int64)
    # Rows lost by rounding down go to those who lost most.
    losers = np.argsort(sizes - exact, kind="stable")[: rest - int(sizes.sum())]
    sizes[losers] += 1
    return [int(size) + least for size in sizes]


def group_names(groups: NDArray[np.str_]) -> list[str]:
    """Return the different groups in the order of the clients: numbers by value, then words."""

    def order(name: str) -> tuple[bool, float, str]:
        number = float(name) if name.lstrip("-").isdecimal() else 0.0
        return not name.lstrip("-").isdecimal(), number, name

    return sorted(set(groups.tolist()), key=order)
