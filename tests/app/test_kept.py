"""What is computed from rows once, and taken from the cache by other processes and runs."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fedlora_app.config.keys import RunConfig
from fedlora_app.data import kept as module
from fedlora_app.data.kept import encoded, kept, shares_of
from fedlora_app.data.partition import shares
from fedlora_app.tasks import Rows, make_task
from fedlora_app.tasks.base import Task


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    return tmp_path / "rows"


@dataclass(frozen=True)
class Made:
    ids: list
    whole: torch.Tensor
    sizes: np.ndarray
    factor: float
    padding: int
    types: torch.Tensor | None = None


class Some(Task):
    name = "some"
    state = "files"
    asked = 0

    def encode(self, rows):
        self.asked += 1
        ids = [np.arange(len(text), dtype=np.int32) for text in rows.items]
        sizes = np.array([len(text) for text in rows.items])
        return Made(ids, torch.from_numpy(sizes), sizes, 0.1, 7)

    def fingerprint(self, rows):
        return repr([self.state, rows.items]).encode() if self.state else None

    def restored(self, fields):
        return Made(**fields)

    def rows(self, table, about, place): ...
    def model(self, about, *, seed, precision="float32", shapes_only=False): ...
    def losses(self, logits, batch): ...


def texts(*items):
    return Rows(list(items), np.zeros(len(items), np.int64))


def same(a, b):
    assert len(a.ids) == len(b.ids)
    assert all(map(np.array_equal, a.ids, b.ids))
    assert all(x.dtype == y.dtype for x, y in zip(a.ids, b.ids, strict=True))
    assert torch.equal(a.whole, b.whole)
    assert a.whole.dtype == b.whole.dtype
    assert np.array_equal(a.sizes, b.sizes)
    assert (a.factor, a.padding) == (b.factor, b.padding)
    assert a.types is b.types is None


@pytest.mark.parametrize("items", [("one", "", "three"), ("",), ()])
def test_rows_are_encoded_once_and_come_back_as_they_were(items):
    task = Some(RunConfig())
    first, again = (encoded(task, texts(*items)) for _ in range(2))
    assert task.asked == 1
    same(first, again)
    same(first, task.encode(texts(*items)))


def test_other_rows_files_or_keys_are_encoded_anew():
    task = Some(RunConfig())
    encoded(task, texts("one"))
    encoded(task, texts("two"))
    task.state = "changed"
    encoded(task, texts("one"))
    task.config = replace(task.config, data=replace(task.config.data, max_length=9))
    encoded(task, texts("one"))
    assert task.asked == 4


def test_who_wants_no_copies_leaves_none(cache):
    task = Some(RunConfig())
    task.config = replace(task.config, data=replace(task.config.data, cache=False))
    rows = Rows(["a"] * 50, np.arange(50) % 2, {"labels": ["x", "y"]})
    encoded(task, rows)
    task.state = None
    task.config = replace(task.config, data=replace(task.config.data, cache=True))
    encoded(task, rows)
    assert task.asked == 2
    assert not cache.exists()


def test_what_is_broken_or_cannot_be_written_is_computed(cache, monkeypatch):
    made = {"a": np.arange(3)}
    assert np.array_equal(kept(["k"], lambda: made)["a"], made["a"])
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert cache.stat().st_mode & 0o077 == 0
    file.write_bytes(file.read_bytes()[:-4])
    assert np.array_equal(kept(["k"], lambda: made)["a"], made["a"])
    assert np.array_equal(kept(["k"], lambda: {})["a"], made["a"])  # whole again
    monkeypatch.setenv("FEDLORA_CACHE", str(file))  # no folder
    assert np.array_equal(kept(["k"], lambda: made)["a"], made["a"])


def test_the_oldest_make_room(cache, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 10_000)
    for number in range(8):
        kept([number], lambda: {"a": np.zeros(3000, np.uint8)})
    assert sum(file.stat().st_size for file in cache.iterdir()) <= 10_000
    assert kept([7], lambda: {})  # the newest is there


def test_a_text_that_moved_between_rows_is_another(cache):
    task = Some(RunConfig())
    assert len(encoded(task, texts("a", "b")).ids) == 2
    assert len(encoded(task, texts("ab")).ids) == 1
    assert task.asked == 2


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "double-imbalance", "natural"])
def test_shares_are_those_of_the_partition(partition, cache):
    config = RunConfig()
    config = replace(config, data=replace(config.data, partition=partition, min_samples=2))
    labels = np.arange(60) % 3
    names = np.array([f"site {n}" for n in np.arange(60) % 4])
    rows = Rows([f"t{i}" for i in range(60)], labels, {"labels": ["a", "b", "c"]}, names)
    task = make_task(config)
    wanted = shares(task, rows, 4)
    for _ in range(2):
        for found, part in zip(shares_of(task, rows, 4), wanted, strict=True):
            assert np.array_equal(found, part)
    assert len(list(cache.iterdir())) == 1
    shares_of(make_task(replace(config, seed=1)), rows, 4)
    assert len(list(cache.iterdir())) == 2


class Otherwise(Some):
    """Encodes otherwise, and says nothing of what that depends on."""

    def encode(self, rows):
        return replace(super().encode(rows), padding=8)


def test_what_a_class_says_of_its_encoding_is_not_inherited(cache):
    for _ in range(2):
        task = Otherwise(RunConfig())
        assert encoded(task, texts("one")).padding == 8
    assert not cache.exists()


def test_names_of_groups_are_told_apart_where_they_have_line_breaks():
    config = RunConfig()
    config = replace(config, data=replace(config.data, partition="natural", min_samples=2))
    for names in (["x\nx", "x", "x", "x\nx"], ["x", "x\nx", "x", "x\nx"]):
        rows = Rows(list("abcd"), np.arange(4) % 2, {"labels": ["x", "y"]}, np.array(names))
        task = make_task(config)
        for found, part in zip(shares_of(task, rows, 2), shares(task, rows, 2), strict=True):
            assert np.array_equal(found, part)
