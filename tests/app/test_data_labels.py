"""Labels and columns: one rule for every format, server and site; nothing guessed in silence."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from deploy.share_out import share_out
from fedlora_app.config.keys import DataConfig, RunConfig
from fedlora_app.data.labels import label_name
from fedlora_app.discretion import DataError
from fedlora_app.launch.inspection import check_own_data, inspect
from fedlora_app.tasks import make_task
from tests.app.texts import load_own, load_test, load_train

FORMATS = ["csv", "tsv", "jsonl", "parquet"]


def written(folder, labels, kind="jsonl", texts=None, stem="d"):
    """A file of rows with these labels, as they are where the format can tell."""
    texts = texts or [f"words {i}" for i in range(len(labels))]
    path = folder / f"{stem}.{kind}"
    if kind == "jsonl":
        rows = zip(texts, labels, strict=True)
        path.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in rows))
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": texts, "label": labels}), path)
    else:
        d = "," if kind == "csv" else "\t"
        lines = [f'"{t}"{d}{"" if v is None else v}' for t, v in zip(texts, labels, strict=True)]
        path.write_text("\n".join([f"text{d}label", *lines]) + "\n")
    return path


def read(path, known=None):
    return load_own(path, DataConfig(), known)


# ----- names and numbers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1, "1"), (1.0, "1"), ("1", "1"), ("1.0", "1"), ("1.", "1"), ("+1", "1"), (" 1 ", "1"),
        (-1, "-1"), (-1.0, "-1"), ("\u22121", "-1"), ("-0", "0"), (Decimal(3), "3"),
        (True, "True"), ("TRUE", "True"), ("false", "False"), ("x ", "x"), ("\u00a0x", "x"),
        ("cafe\u0301", "caf\u00e9"), ("01", "01"), ("0.5", "0.5"), (0.5, "0.5"),
        ("9" * 5000, "9" * 5000), (None, None), ("", None), (float("nan"), None),
        (float("inf"), None), (Decimal("NaN"), None),
    ],
)  # fmt: skip
def test_the_name_of_a_label(value, name):
    assert label_name(value) == name


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "values", [[-1, 1], [-1, 0, 1], [1, 2, 3], [10, 9], [0.0, 1.0], [-2, -1, 0, 1, 2]]
)
def test_whole_numbers_are_names_and_never_shifted(tmp_path, kind, values):
    labels = values * 5
    rows = read(written(tmp_path, labels, kind))
    names = [str(int(v)) for v in sorted(values)]
    assert rows.label_names == tuple(names)
    assert [rows.label_names[i] for i in rows.labels] == [str(int(v)) for v in labels]
    # A site whose file writes them otherwise, or has some of them only, means the same.
    site = written(tmp_path, [f"{values[0]:+.1f}", str(values[-1])], "csv", stem="site")
    found = read(site, rows.label_names).labels.tolist()
    assert found == [names.index(str(int(values[0]))), names.index(str(int(values[-1])))]


@pytest.mark.parametrize("kind", FORMATS)
def test_truth_values(tmp_path, kind):
    rows = read(written(tmp_path, [True, False, True], kind))
    assert rows.label_names == ("False", "True")
    assert rows.labels.tolist() == [1, 0, 1]
    site = written(tmp_path, ["true", "FALSE"], "csv", stem="site")
    assert read(site, rows.label_names).labels.tolist() == [1, 0]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("labels", [[0, 1, None], ["a", "b", None], [0, 1, float("nan")]])
def test_a_missing_label_is_named_with_its_row(tmp_path, kind, labels):
    if kind in ("csv", "tsv") and labels[-1] is not None:
        labels = [0, 1, ""]
    where = "row 3" if kind == "parquet" else "line 3" if kind == "jsonl" else "line 4"
    with pytest.raises(DataError, match=rf"d\.{kind}, {where}: expected a label, got "):
        read(written(tmp_path, labels, kind))


HOLES = ["nan", "NaN", "NULL", "None", "NA", "N/A", "<NA>", "#N/A", "?", "-", "nil", "missing"]


@pytest.mark.parametrize("hole", HOLES)
def test_a_word_for_nothing_among_numbers_is_refused(tmp_path, hole):
    path = written(tmp_path, [0, 1, 2, hole, 1, hole], "csv")
    with pytest.raises(DataError, match=r"line 5: expected a number as label, got '"):
        read(path)


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["food", "nan", "sport", "nan"], "a label that looks like a missing one: nan"),
        (["food", "?", "sport"], r"a label that looks like a missing one: \?"),
        ([1, 2, "other", 1], "labels that are words beside numbers: other"),
        (["Food", "food", "x"], "case, blanks or width alone: Food, food"),
        (["hot food", "hot  food", "x"], "case, blanks or width alone: hot  food, hot food"),
        (["1", "\uff11", "2"], "case, blanks or width alone: 1, \uff11"),
        (["food ", "food", "\tx"], "8 labels had blanks around them: stripped"),
    ],
)
def test_doubtful_labels_are_said(tmp_path, labels, note):
    path = written(tmp_path, labels * 4)
    text = str(inspect(make_task(RunConfig(data=DataConfig(name=str(path))))))
    assert re.search(note, text)


def test_blanks_around_labels_make_no_class_on_either_side(tmp_path):
    path = written(tmp_path, ["food", "food ", " sport", "food\u00a0"] * 3)
    rows = load_train(DataConfig(name=str(path)))
    assert rows.label_names == ("food", "sport")
    site = written(tmp_path, ["sport ", "food"], stem="site")
    assert read(site, rows.label_names).labels.tolist() == [1, 0]


# ----- what is no class ----------------------------------------------------------------


def scores(kind):
    rng = random.Random(4)
    several = [rng.uniform(1, 5) for _ in range(90)]
    return {
        "floats": several,
        "two digits": [f"{x:.2f}" for x in several],
        "a comma": [f"{x:.2f}".replace(".", ",") for x in several],
        "per cent": [f"{x:.1f} %" for x in several],
        "signed": [f"{x - 3:+.2f}" for x in several],
        "exponents": [f"{x:.3e}" for x in several],
        "no leading digit": [f"{x / 10:.3f}".lstrip("0") for x in several],
        "few digits, many rows": [f"{x:.1f}" for x in several * 9],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["floats", "two digits", "a comma", "per cent", "signed", "exponents", "no leading digit",
     "few digits, many rows"],
)  # fmt: skip
def test_scores_are_no_classes(tmp_path, kind):
    with pytest.raises(DataError, match=r"line 1: .* numbers in \d+ rows are scores.* got .*turn"):
        read(written(tmp_path, scores(kind)))


@pytest.mark.parametrize(
    "labels",
    [
        [f"an own text {i}" for i in range(60)],
        [f"2024-01-{i % 28 + 1:02d}T{i}" for i in range(60)],
        [100 + i for i in range(60)],
    ],
)
def test_texts_ids_and_dates_are_no_classes(tmp_path, labels):
    with pytest.raises(DataError, match="labels that come again; 60 different ones in 60 rows"):
        read(written(tmp_path, labels))


def test_halves_and_many_whole_numbers_are_classes(tmp_path):
    assert read(written(tmp_path, [0.5, 1.5, 1] * 5)).label_names == ("0.5", "1", "1.5")
    assert len(read(written(tmp_path, list(range(40)) * 3)).label_names) == 40


@pytest.mark.parametrize(
    ("labels", "kind", "match"),
    [
        ([[0, 1], [1]], "jsonl", "line 1: expected one label a row, .*got .0, 1.; choose one"),
        (["x", ["x", "y"]], "jsonl", "line 2: expected one label a row"),
        ([{"x": 1}, {"x": 0}], "jsonl", "line 1: expected one label a row"),
        ([[0], [1]], "parquet", "row 1: expected one label a row"),
        (['"[0, 1]"', "[1]"], "csv", "line 2: expected one label a row"),
        (["['a', 'b']", "['a']"], "tsv", "line 2: expected one label a row"),
        ([True, 0, False, 1], "jsonl", "line 2: expected truth values alone or numbers alone"),
        (["x\ud83d", "y"], "jsonl", "line 1: expected a label of printable characters"),
        (["x\u200b", "y"], "jsonl", "line 1: expected a label of printable characters"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, kind, match):
    with pytest.raises(DataError, match=match):
        read(written(tmp_path, labels, kind))


def test_words_in_brackets_are_labels(tmp_path):
    assert read(written(tmp_path, ["[POS]", "[NEG]"])).label_names == ("[NEG]", "[POS]")


# ----- splits --------------------------------------------------------------------------


def splits(folder, **files):
    for stem, labels in files.items():
        written(folder, labels, "csv", stem=stem)
    return DataConfig(name=str(folder))


@pytest.mark.parametrize("labels", [["zzz", "a"], ["a", "b", "c"], ["2"]])
def test_a_class_that_training_lacks_is_refused_at_the_door(tmp_path, labels):
    config = splits(tmp_path, train=["a", "b"] * 5, test=labels)
    with pytest.raises(DataError, match=r"test\.csv, line \d: .* where a, b are known; correct"):
        inspect(make_task(RunConfig(data=config)))


@pytest.mark.parametrize("hidden", [["-1", "-1"], [None, None], ["", ""]])
def test_hidden_labels_are_passed_over_and_said(tmp_path, hidden):
    config = splits(tmp_path, train=["a", "b"] * 6, test=hidden, dev=["a"])
    assert len(load_test(config)) == 1
    assert "test.csv (test) passed over: labels hidden" in str(
        inspect(make_task(RunConfig(data=config)))
    )


def test_minus_one_is_not_hidden_where_it_is_a_class(tmp_path):
    config = splits(tmp_path, train=["-1", "1"] * 6, test=["-1", "-1"], dev=["1"])
    assert load_test(config).labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("id,text\n1,a\n", "no column of labels"), ("text,label\n", "no rows")],
)
def test_a_test_file_without_labels_or_rows_is_passed_over(tmp_path, content, reason):
    config = splits(tmp_path, train=["a", "b"] * 6, valid=["b"])
    (tmp_path / "test.csv").write_text(content)
    assert load_test(config).labels.tolist() == [1]
    assert len(load_train(config)) == 12  # nothing is held out
    assert f"test.csv (test) passed over: {reason}" in str(
        inspect(make_task(RunConfig(data=config)))
    )
    (tmp_path / "valid.csv").unlink()
    assert len(load_train(config)) == 11  # now a tenth is


# ----- texts ---------------------------------------------------------------------------


KNOWN = [("question", "sentence"), ("text", "text_pair"), ("question", "answer"),
         ("Premise", "Hypothesis"), ("sentence1", "sentence2")]  # fmt: skip
DOUBTFUL = [("review", "summary"), ("title", "body"), ("text", "translation")]


def pair(folder, one, two, words="who won it this time {}", stem="d"):
    rows = [f"{words.format(i)},of course it was {i} again,{'ab'[i % 2]}" for i in range(12)]
    path = folder / f"{stem}.csv"
    path.write_text("\n".join([f"{one},{two},label", *rows]))
    return path


@pytest.mark.parametrize(("one", "two"), KNOWN)
def test_pairs_of_usual_names_are_taken_whole(tmp_path, one, two):
    path = pair(tmp_path, two, one)  # the order of the file does not count
    config = DataConfig(name=str(path))
    rows = load_train(config)
    assert dict(rows.origin.columns) == {"text": one, "second text": two, "label": "label"}
    assert rows.rows.about == {"labels": ["a", "b"], "pairs": True}
    assert all(texts[0].startswith("of course") and len(texts) == 2 for texts in rows.texts)
    text = str(inspect(make_task(RunConfig(data=config))))
    assert f"text from {one!r}, second text from {two!r}" in text
    assert re.search(r"first: 'of course .* again' \+ 'who won .*' → [ab]", text)
    assert "second text from" in check_own_data({"data-path": str(path)})


@pytest.mark.parametrize(("one", "two"), DOUBTFUL)
def test_the_second_text_of_a_pair_is_not_dropped_in_silence(tmp_path, one, two):
    path = pair(tmp_path, one, two)
    with pytest.raises(DataError, match=r"of several .* set data\.text-column .*comma") as info:
        read(path)
    assert repr(one) in str(info.value)
    assert repr(two) in str(info.value)
    assert two not in info.value.told
    chosen = load_own(path, DataConfig(text_column=two), None)
    assert chosen.origin.left == (one,)
    chosen = load_own(path, DataConfig(text_column=f"{one}, {two}"), None)
    assert chosen.texts[1] == ("who won it this time 1", "of course it was 1 again")


@pytest.mark.parametrize("columns", [("premise", "statement"), ("tweet", "reply")])
def test_pairs_without_a_known_name(tmp_path, columns):
    path = pair(tmp_path, *columns)
    with pytest.raises(DataError, match=r"of the columns text, .* set data\.text-column"):
        read(path)
    assert "has to name its columns" in check_own_data({"data-path": str(path)})
    named = RunConfig(data=DataConfig(text_column=",".join(columns)))
    assert "12 rows" in check_own_data({"data-path": str(path)}, named)


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ("tweet,replies", "expected a column 'replies', got tweet, reply, label; set data.text-"),
        ("tweet,", "expected a column '', got tweet, reply, label"),
        ("tweet,tweet", "two different ones for pairs of texts, got 'tweet,tweet'"),
        ("tweet,reply,label", "one column of texts, or two different ones"),
        ("tweet,label", "in different columns, got 'label' for both"),
    ],
)
def test_columns_that_make_no_pair(tmp_path, wanted, match):
    with pytest.raises(DataError, match=match) as info:
        load_own(pair(tmp_path, "tweet", "reply"), DataConfig(text_column=wanted), None)
    assert not re.search("tweet|repl|'label'", info.value.told)


def test_a_third_text_and_a_comma_in_the_name_of_a_column(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("question,answer,context,label\nwho was it,it was me,he said so,x\n")
    with pytest.raises(
        DataError, match="of several is not to be guessed, got 'question', 'answer', "
    ):
        read(path)
    path.write_text('"a,b",label\none text,x\ntwo text,y\n')
    assert load_own(path, DataConfig(text_column="a,b"), None).texts == ["one text", "two text"]


def test_a_site_and_a_test_split_hold_pairs_where_the_run_does(tmp_path):
    pairs, single = pair(tmp_path, "premise", "hypothesis"), pair(tmp_path, "id", "text", stem="s")
    single.write_text(single.read_text().replace("who won it this time ", ""))
    config, about = DataConfig(), {"labels": ["a", "b"]}
    task = make_task(RunConfig(data=config))
    assert task.own_rows(str(single), about).about == about
    paired = {**about, "pairs": True}
    for path, known, expected in [(pairs, about, "single texts"), (single, paired, "pairs of")]:
        with pytest.raises(DataError, match=f"expected {expected}.*, which the run") as info:
            task.own_rows(str(path), known)
        assert not re.search("premise|'text'", info.value.told)
    (tmp_path / "both").mkdir()
    pair(tmp_path / "both", "premise", "hypothesis", stem="train")
    (tmp_path / "both" / "test.csv").write_text(single.read_text())
    with pytest.raises(DataError, match=r"test\.csv: expected pairs of texts"):
        load_test(DataConfig(name=str(tmp_path / "both")))


def test_pairs_with_half_a_text_are_left_out_and_others_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    halves = [("a b", "c d"), ("a b", None), (" ", "c d"), ("e", "f"), ("g", "h")]
    rows = [{"text": t, "text_pair": p, "label": "xy"[i % 2]} for i, (t, p) in enumerate(halves)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "3 rows (2 left out: no text)" in check_own_data({"data-path": str(path)})
    path.write_text(path.read_text().replace('"h"', "3"))
    with pytest.raises(DataError, match="line 5: expected a text, got 3 in column 'text_pair'"):
        read(path)


def test_what_is_left_beside_a_text_is_said(tmp_path):
    path = pair(tmp_path, "headline", "text")
    assert "left: headline" in str(inspect(make_task(RunConfig(data=DataConfig(name=str(path))))))
    path = pair(tmp_path, "author", "text", words="Jane Doe")
    assert read(path).origin.left == ("author",)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("goal \ud83d", "line 2: .*half a character .* write U[+]FFFD"),
        ("\udc80 goal", "line 2: .*half a character"),
        (["two", "texts"], "line 2: expected a text, got .* write it as a string"),
        ({"en": "text"}, "line 2: expected a text"),
        (3, "line 2: expected a text, got 3 in column 'text'"),
    ],
)
def test_texts_that_are_none(tmp_path, text, match):
    with pytest.raises(DataError, match=match) as info:
        read(written(tmp_path, ["a", "b"], texts=["fine", text]))
    assert "goal" not in info.value.told


def test_rows_without_text_are_counted(tmp_path):
    path = written(tmp_path, ["a", "b"] * 4, texts=["x", None, " ", "y", "\n", "z", "u", "v"])
    rows = read(path)
    assert (len(rows), rows.origin.blank) == (5, 3)
    assert "5 rows (3 left out: no text)" in check_own_data({"data-path": str(path)})


@pytest.mark.parametrize("rows", [[], ["a"]])
def test_a_site_of_too_few_rows_says_so_when_it_starts(tmp_path, rows):
    path = written(tmp_path, rows, "csv")
    with pytest.raises(DataError, match=r"d\.csv: expected"):
        check_own_data({"data-path": str(path)})


def test_pairs_are_shared_out_among_sites_as_pairs(tmp_path):
    config = DataConfig(name=str(pair(tmp_path, "premise", "hypothesis")), partition="iid")
    files = share_out(replace(config, min_samples=2), 2, tmp_path / "sites")
    task = make_task(RunConfig(data=config))
    rows = task.train_rows()
    kept = [texts for file in files for texts in task.own_rows(str(file), rows.about).items]
    assert sorted(kept) == sorted(rows.items)


def test_a_column_says_among_how_many_sites_rows_are_shared_out(tmp_path):
    rows = [f"word {i},{'ab'[i % 2]},ward {i % 4}" for i in range(40)]
    (tmp_path / "d.csv").write_text("\n".join(["text,label,ward", *rows]))
    config = DataConfig(
        name=str(tmp_path / "d.csv"), partition="natural", partition_column="ward", min_samples=2
    )
    files = share_out(config, None, tmp_path / "sites")
    assert len(files) == 4
    first = [line.split(",")[0] for line in files[0].read_text().splitlines()[1:]]
    assert {int(text.split()[1]) % 4 for text in first} == {0}
