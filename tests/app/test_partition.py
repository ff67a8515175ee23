"""How simulated clients share rows: by a column, by size, by shards, by size and label."""

import csv

import numpy as np
import pytest

from fedlora_app.config.keys import ConfigError, DataConfig, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.data.partition import partition, shares
from fedlora_app.data.partitioners import dirichlet_sizes, group_names
from fedlora_app.data.rows import read_train
from fedlora_app.launch.inspection import clients_of, inspect
from fedlora_app.tasks import Rows, make_task

LABELS = np.random.default_rng(0).choice(8, 3000, p=[0.5, 0.25, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])


def parts_of(way, clients, labels=LABELS, seed=1, groups=None, **options):
    config = DataConfig(partition=way, min_samples=options.pop("min_samples", 5), **options)
    return partition(labels, config, num_clients=clients, seed=seed, groups=groups)


def all_once(parts, rows=3000):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


@pytest.mark.parametrize("clients", [3, 100])
@pytest.mark.parametrize("alpha", [1e-4, 0.3, 100.0])
def test_both_skews_at_once_use_every_row_once(alpha, clients):
    parts = parts_of("dirichlet-quantity", clients, alpha=alpha, size_alpha=alpha)
    assert all_once(parts)
    assert min(map(len, parts)) >= 5


def test_each_skew_follows_its_own_alpha():
    def skews(alpha, size_alpha):
        parts = parts_of("dirichlet-quantity", 10, alpha=alpha, size_alpha=size_alpha)
        mixes = [np.bincount(LABELS[part], minlength=8) / len(part) for part in parts]
        overall = np.bincount(LABELS) / len(LABELS)
        return np.abs(np.array(mixes) - overall).sum(1).mean(), np.std([len(p) for p in parts])

    (apart, even), (alike, unequal) = skews(0.05, 1e6), skews(1e6, 0.3)
    assert alike < 0.3 < 0.7 < apart
    assert even < 10 < 100 < unequal


def test_classes_without_rows_here_are_no_obstacle():
    labels = np.array([0, 2, 7] * 40)
    assert all_once(parts_of("dirichlet-quantity", 4, labels), 120)


def test_quantity_changes_sizes_alone():
    parts = parts_of("quantity", 10, size_alpha=0.5)
    sizes = sorted(map(len, parts))
    assert sizes == sorted(dirichlet_sizes(3000, 10, alpha=0.5, least=5, seed=1))
    assert sizes[-1] > 5 * sizes[0]
    largest = max(parts, key=len)
    assert np.mean(LABELS[largest] == 0) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(("rows", "clients", "least"), [(10, 10, 1), (11, 3, 2), (5000, 100, 20)])
def test_sizes_add_up(rows, clients, least):
    sizes = dirichlet_sizes(rows, clients, alpha=0.01, least=least, seed=0)
    assert (sum(sizes), len(sizes)) == (rows, clients)
    assert min(sizes) >= least


def test_shards_hold_few_classes_and_lose_no_row():
    labels = np.repeat(np.arange(10), 103)  # 1,030 rows in 20 pieces: 51 or 52 each
    parts = parts_of("shards", 10, labels, shards_per_client=2)
    assert all_once(parts, 1030)
    assert {len(part) for part in parts} <= {102, 103, 104}
    assert all(len(np.unique(labels[part])) <= 4 for part in parts)
    with pytest.raises(ValueError, match="1030 rows cannot be cut into 200 pieces for each of 10"):
        parts_of("shards", 10, labels, shards_per_client=200)


def test_a_client_for_each_group_in_order():
    groups = np.array(["10", "9", "Ada", "9", "10", "Ada", "-1", "-1"])
    assert group_names(groups) == ["-1", "9", "10", "Ada"]
    parts = parts_of("natural", 4, np.zeros(8, np.int64), groups=groups, min_samples=2)
    assert [part.tolist() for part in parts] == [[6, 7], [1, 3], [0, 4], [2, 5]]


@pytest.mark.parametrize(
    ("groups", "clients", "match"),
    [
        (["a"] * 8, 2, "is 'a' in every row; name another column"),
        (
            list("aabbccdd"),
            2,
            r"names 4 clients \('a', 'b', 'c', 'd'\), so expected 4 clients, got",
        ),
        (list("aabbccdd"), 9, "leave out --clients .flwr run: num-supernodes=4"),
        (list("abcdefgh"), 2, "most values name one row only: is it the rows' own number"),
        (list("aaaabbbc"), 3, "2 of 3 have fewer, 'c' 1; lower data.min-samples, or take their"),
        (None, 2, "have the task's `rows` fill it with `fedlora_app.data.columns.groups_of`"),
    ],
)
def test_groups_that_make_no_clients(groups, clients, match):
    found = None if groups is None else np.array(groups)
    with pytest.raises(ValueError, match=match):
        parts_of("natural", clients, np.zeros(8, np.int64), groups=found, min_samples=4)


def test_ten_thousand_values_for_ten_clients_are_one_short_sentence():
    groups = np.array([f"patient {i}" for i in range(10_000)])
    with pytest.raises(ValueError, match="names 10000 clients") as error:
        parts_of("natural", 10, np.zeros(10_000, np.int64), groups=groups)
    assert len(str(error.value)) < 500


# A column of a file.


@pytest.fixture
def hospitals(tmp_path):
    def write(wards):
        with (tmp_path / "train.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "hospital"])
            writer.writerows((f"text {i}", "ab"[i % 2], ward) for i, ward in enumerate(wards))
        with (tmp_path / "test.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], ["one", "a"], ["two", "b"]])
        return str(tmp_path)

    return write


def natural(name, column="hospital"):
    return RunConfig(
        data=DataConfig(name=name, partition="natural", partition_column=column, min_samples=2)
    )


def test_the_column_makes_the_clients(hospitals):
    config = natural(hospitals(["St. Mary ", "Charité", "3", " St. Mary", "3.0", "Charité"]))
    assert clients_of(make_task(config)) == 3
    found = inspect(make_task(config), clients=3)  # whose test rows name no hospital
    assert found.shares == [2, 2, 2]
    assert "client from 'hospital'" in str(found)
    parts = shares(found.task, found.train, 3)
    assert [found.train.items[i] for i in parts[2]] == ["text 0", "text 3"]
    assert clients_of(make_task(RunConfig())) == 10


def test_rows_that_are_nobodys(hospitals):
    config = natural(hospitals(["a", "b", " ", "a", ""]))
    match = r"line 4: expected a word or a number in column 'hospital' .*, got none in 2 of 5"
    with pytest.raises(ValueError, match=match):
        inspect(make_task(config), clients=2)
    with pytest.raises(ValueError, match=r"set data\.partition-column; did you mean 'hospital'"):
        inspect(make_task(natural(config.data.name, "hospitl")), clients=2)


def test_the_config_wants_a_column():
    with pytest.raises(ConfigError, match=r"data\.partition-column names no column"):
        read_config({"data.partition": "natural"})


def test_rows_without_classes_are_shared_by_what_looks_at_none():
    class Unclassed(type(make_task(RunConfig()))):
        def strata(self, rows):
            return None

    rows = Rows(["x"] * 90, np.zeros(90), {"labels": ["a"]}, np.array(["a", "b", "c"] * 30))
    for way in ("iid", "quantity", "natural"):
        config = RunConfig(data=DataConfig(partition=way, partition_column="c"))
        assert all_once(shares(Unclassed(config), rows, 3), 90)
    task = Unclassed(RunConfig(data=DataConfig(partition="shards")))
    with pytest.raises(ValueError, match="have none; use iid, quantity or natural"):
        shares(task, rows, 3)


def test_other_ways_need_no_groups(hospitals):
    name = hospitals(["a", ""] * 4)
    task = make_task(RunConfig(data=DataConfig(name=name)))
    assert read_train(task, name).groups is None
