"""Files as others write them: read right, or refused with file, line and what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedlora_app.config.keys import DataConfig, RunConfig
from fedlora_app.discretion import DataError
from fedlora_app.launch.inspection import inspect
from fedlora_app.tasks import make_task
from tests.app.texts import load_own, load_test, load_train

HEADER = "text,label\n"
ROWS = "".join(f"line {i} about it,{'ab'[i % 2]}\n" for i in range(12))
TEXTS, IDS = [f"line {i}" for i in range(12)], [i % 2 for i in range(12)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def own(path, content, names=None):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_own(path, DataConfig(), names)


def objects(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            parquet.write_table(pa.table(content), path / name)
        else:
            (path / name).write_text(content)
    return DataConfig(name=str(path))


# ----- encodings and line ends ---------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        HEADER + ROWS,
        "\ufeff" + HEADER + ROWS,
        "\ufeff\ufeff" + HEADER + ROWS,
        '\ufeff"text","label"\n' + ROWS,
        (HEADER + ROWS).replace("\n", "\r\n"),
        (HEADER + ROWS).replace("\n", "\r"),
        "\n \n" + HEADER + "\n" + ROWS.replace("\n", "\n\n   \n"),
        HEADER + ROWS.rstrip("\n"),
    ],
)
def test_marks_line_ends_and_empty_lines_change_nothing(tmp_path, content):
    rows = own(tmp_path / "d.csv", content)
    assert list(rows.texts) == [f"line {i} about it" for i in range(12)]
    assert rows.label_names == ("a", "b")
    assert rows.labels.tolist() == IDS


@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n", "\n \n"])
def test_the_same_of_json_lines(tmp_path, between):
    lines = [json.dumps({"text": t, "label": i}) for t, i in zip(TEXTS, IDS, strict=True)]
    rows = own(tmp_path / "d.jsonl", "\ufeff" + between.join(lines))
    assert list(rows.texts) == TEXTS


def test_line_separators_within_texts_end_no_row(tmp_path):
    text = "one\u2028two\u0085three\x0bfour\x0cfive"
    assert list(own(tmp_path / "d.csv", f"text,label\n{text},a\nx,b\n").texts) == [text, "x"]
    line = json.dumps({"text": text, "label": "a"}, ensure_ascii=False)
    assert list(own(tmp_path / "d.jsonl", line).texts) == [text]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("d.csv", "text,label\nx,a\ncaf\u00e9,b\n".encode("cp1252"),
         r"d\.csv, line 3: expected UTF-8, got byte 0xe9; save it as UTF-8"),
        ("d.tsv", "text\tlabel\r\n\u00fcber\tb\r\n".encode("latin-1"), r"line 2: .* byte 0xfc"),
        ("d.jsonl", b'{"text": "a", "label": "x"}\n\n{"text": "\x93", "label": "x"}',
         "line 3: expected UTF-8, got byte 0x93"),
        ("d.csv", (HEADER + ROWS + "caf\u00e9").encode()[:-1], "line 14: .* byte 0xc3"),
        ("d.csv", (HEADER + ROWS).encode("utf-16"), "this is UTF-16; save it as UTF-8"),
        ("d.jsonl", "{}".encode("utf-32"), "this is UTF-32"),
        ("d.csv", (HEADER + ROWS).encode("utf-16-le"), "line 1: .* NUL byte; save it as UTF-8"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\0"}\n', "line 2: .* NUL byte"),
        ("d.csv", b"", "the file is empty"),
        ("d.csv", b"\xef\xbb\xbf \n", "the file is empty"),
        ("d.jsonl", b"\n\n", "expected rows, but the file is empty"),
        ("d.csv", gzip.compress(ROWS.encode(), mtime=0), "this is a gzip archive; unpack it"),
        ("d.jsonl", bz2.compress(ROWS.encode()), "a bzip2 archive; unpack it"),
        ("d.parquet", lzma.compress(b"x"), "an xz archive; unpack it"),
        ("d.tsv", b"PK\x03\x04\x14\0\x06\0", "a zip archive or an Excel file; .*as csv in UTF-8"),
        ("d.csv", b"PAR1\x15\x04", r"a parquet file; name it \.parquet"),
        ("d.parquet", b"<!DOCTYPE HTML>\n<p>404", "a web page; download the file itself"),
        ("d.csv.gz", gzip.compress(ROWS.encode(), mtime=0), r"got '\.gz'; unpack it"),
        ("d.parquet", b"PAR1 cut off", "expected a parquet file, got .*; is it cut off"),
        *((f"d{end}", POINTER.encode(), "Git LFS pointer .*`git lfs pull`")
          for end in (".csv", ".tsv", ".jsonl", ".parquet")),
    ],
)  # fmt: skip
def test_files_of_another_kind(tmp_path, name, content, match):
    with pytest.raises(DataError, match=match):
        own(tmp_path / name, content)


# ----- quotes and delimiters -----------------------------------------------------------


def many(delimiter, order="{label}{d}{text}"):
    names = ["food", "sport", "travel"] * 10
    rows = [order.format(label=n, d=delimiter, text=f"story {i}") for i, n in enumerate(names)]
    return "\n".join(rows) + "\n"


def test_tabs_without_quoting_keep_every_row(tmp_path):
    """GLUE's files: a quote is a character, wherever a later one may stand."""
    for odd in ('food\t"bread', 'food\t"bread\nsport\tmatch "today"', 'food\t"b\nsport\tm"'):
        rows = own(tmp_path / "d.tsv", f"label\tsentence\n{many(chr(9))}{odd}\n{many(chr(9))}")
        assert len(rows) == 60 + len(odd.split("\n"))
        assert max(map(len, rows.texts)) < 20
        assert rows.origin.notes == ("read without quoting",)
    rows = own(tmp_path / "d.tsv", f'label\tsentence\n{many(chr(9))}food\t"two\nlines"\n')
    assert rows.texts[-1] == "two\nlines"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("label,text\n" + many(",") + 'food,"soup of the day\n' + many(","), 32),
        ("label,text\n" + 'food,"soup\n' + many(",") + 'sport,late" goal\n' + many(","), 2),
        ("text,label\n" + '"soup,food\n' + many(",", "{text}{d}{label}") + 'goal",sport\n', 2),
        ('id,text,label\n1,"soup,food\n2,goal,sport\n3,trip",other\n'
         + "".join(f"{i},story {i},{['food', 'sport'][i % 2]}\n" for i in range(4, 20)), 2),
    ],
)  # fmt: skip
def test_a_quote_that_eats_rows_is_refused_where_it_opens(tmp_path, content, line):
    with pytest.raises(DataError, match=rf"line {line}: a quote.*twice"):
        own(tmp_path / "d.csv", content)


def test_verses_and_letters_in_quotes_are_texts(tmp_path):
    for text in ("roses, red\nviolets, blue", "Dear Sir,\nyours truly", 'a ""b"", c\n\nd, e\nf'):
        content = f'text,label\n"{text}",food\n' + many(",", "{text}{d}{label}")
        rows = own(tmp_path / "d.csv", content)
        assert rows.texts[0] == text.replace('""', '"')
        assert len(rows) == 31


@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
@pytest.mark.parametrize("delimiter", [";", "|", "\t", ","])
def test_another_delimiter_is_seen_in_the_header_and_said(tmp_path, name, delimiter):
    d = delimiter
    content = f'"text{d}s"{d}label\n"soup{d} hot"{d}food\nmatch{d}sport\n'.replace(
        f"text{d}s", "text"
    )
    rows = own(tmp_path / name, content)
    assert list(rows.texts) == [f"soup{d} hot", "match"]
    usual = "," if name == "d.csv" else "\t"
    assert rows.origin.notes == (() if d == usual else (f"separated by {d!r}",))


def test_a_delimiter_in_a_quoted_name_is_none(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('"text";"label, main"\na, b;x\nc;y\n')
    rows = load_own(path, DataConfig(label_column="label, main"), None)
    assert list(rows.texts) == ["a, b", "c"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("text, long;label\na;x\n", "line 2: expected 2 columns .*, got 1; .* if it is ';'"),
        ("text,label\na,b\n\na,b,c\n", "line 4: expected 2 columns as in the header, got 3"),
        ("text,label\na,x\ntext,label\nb,y\n", "line 3: .* the header once more; remove it"),
        ("sep=;\ntext;label\na;x\n", "line 1: .* for Excel alone; remove the line"),
        ("text,label,label\na,x,y\n", "line 1: .* different names, got 'label' twice"),
        ("text,label, label\na,x,y\n", "line 1: .* different names, got 'label' twice"),
        ("text,Label,label\na,x,y\n", "differ in more than upper and lower case, got 'Label'"),
        ("a match today,sport\na soup,food\n", "expected one of the columns label, .*got a match"),
    ],
)
def test_headers_and_rows_that_cannot_be(tmp_path, content, match):
    with pytest.raises(DataError, match=match):
        own(tmp_path / "d.csv", content)


def test_a_column_without_a_name_is_left_and_said(tmp_path):
    rows = own(tmp_path / "d.csv", ",text,label\n0,soup,food\n1,match,sport\n")
    assert rows.origin.notes == ("column 1 has no name: left",)
    assert own(tmp_path / "d.csv", "text,label,\nsoup,food,\n").origin.notes == ()


# ----- folders and shards --------------------------------------------------------------


SHARD = {"text": TEXTS, "label": IDS}


@pytest.mark.parametrize("where", ["", "data/"])
def test_shards_of_a_hub_are_one_split(tmp_path, where):
    config = folder(tmp_path, {
        f"{where}train-00000-of-00002.parquet": SHARD,
        f"{where}train-00001-of-00002.parquet": {"text": ["last"], "label": [1]},
        f"{where}validation-00000-of-00001-0a1b2c3d.parquet": SHARD,
    })  # fmt: skip
    assert [*load_train(config).texts] == [*TEXTS, "last"]
    assert [*load_test(config).texts] == TEXTS
    assert "train-00000-of-00002.parquet, train-00001-of-00002.parquet" in str(
        inspect(make_task(RunConfig(data=config)))
    )


def test_shards_of_csv_and_the_line_of_an_error_in_the_second(tmp_path):
    first, second = "train-00000-of-00002.csv", "train-00001-of-00002.csv"
    assert len(load_train(folder(tmp_path, {first: HEADER + ROWS, second: HEADER + ROWS}))) == 22
    (tmp_path / second).write_text(HEADER + "x,a\n\ny,\n")
    with pytest.raises(DataError, match=rf"{second}, line 4: expected a label, got ''"):
        load_train(DataConfig(name=str(tmp_path)))


def test_splits_of_several_formats_and_upper_case(tmp_path):
    files = {
        "Train.TSV": HEADER.replace(",", "\t") + ROWS.replace(",", "\t"),
        "TEST.jsonl": objects([{"text": "q", "label": "b"}]),
        "notes.txt": "x",
        "._train.csv": "x",
    }
    config = folder(tmp_path, files)
    assert len(load_train(config)) == 12
    assert [*load_test(config).texts] == ["q"]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"data/train-00000-of-00002.parquet": SHARD}, "or add the missing shards"),
        ({"train.csv": HEADER + ROWS, "train.jsonl": objects([{"text": "a", "label": "b"}])},
         "got train.csv, train.jsonl for train; remove what is superfluous"),
        ({"train-00000-of-00002.csv": HEADER + ROWS, "train-00001-of-00002.jsonl": "{}"},
         "all shards of one"),
        ({"train.csv": HEADER + ROWS, "train-00000-of-00001.csv": HEADER + ROWS}, "all shards"),
        ({"train-00000-of-00002.parquet": SHARD,
          "train-00001-of-00002.parquet": {**SHARD, "extra": IDS}},
         "train-00001.* of the first shard, got text, label, extra; write all shards alike"),
        ({"train.csv": HEADER + ROWS, "data/test.csv": HEADER + ROWS},
         r"all splits in one place, got train\.csv, data/test\.csv"),
        ({"sst2/train-00000-of-00001.parquet": SHARD}, "got sst2; rename the files, or name"),
        ({"train_1.csv": HEADER + ROWS}, r"got train_1\.csv; rename the files"),
        ({"train.csv": HEADER + ROWS, "test.csv": POINTER}, r"test\.csv: .* Git LFS pointer"),
        ({"test.csv": HEADER + ROWS}, "expected a split 'train', got test"),
    ],
)  # fmt: skip
def test_folders_that_leave_a_choice(tmp_path, files, match):
    config = folder(tmp_path, files)
    with pytest.raises(ValueError, match=match):
        inspect(make_task(RunConfig(data=config)))


# ----- parquet -------------------------------------------------------------------------


def table(path, columns, names, told=None):
    made = pa.Table.from_arrays([pa.array(c) for c in columns], names=names)
    if told is not None:
        made = made.replace_schema_metadata({"huggingface": told})
    parquet.write_table(made, path)
    return path


def test_a_column_twice_in_parquet(tmp_path):
    path = table(tmp_path / "d.parquet", [TEXTS, IDS, IDS], ["text", "label", "label"])
    with pytest.raises(DataError, match="columns of different names, got 'label' twice; rename"):
        load_own(path, DataConfig(), None)


def test_folders_called_key_value_give_no_column(tmp_path):
    (tmp_path / "label=sport").mkdir()
    path = table(tmp_path / "label=sport" / "d.parquet", [TEXTS, IDS], ["text", "label"])
    assert load_own(path, DataConfig(), None).label_names == ("0", "1")
    path = table(tmp_path / "label=sport" / "e.parquet", [TEXTS], ["text"])
    with pytest.raises(DataError, match=r"expected one of the columns label, .*, got text;"):
        load_own(path, DataConfig(), None)


@pytest.mark.parametrize("told", ["not json", '{"info": null}', "[]", '{"info": {"features": 3}}'])
def test_what_is_stored_beside_the_columns_may_be_broken(tmp_path, told):
    path = table(tmp_path / "d.parquet", [TEXTS, IDS], ["text", "label"], told)
    with pytest.raises(DataError, match=r"d\.parquet: expected what `datasets` writes"):
        load_own(path, DataConfig(), None)
