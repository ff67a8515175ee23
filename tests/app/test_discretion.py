"""What a client answers, and above all fails with, never holds what its data hold."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common import EvaluateIns, FitIns, GetPropertiesIns, ndarrays_to_parameters
from flwr.compat.common import recorddict_compat as compat
from flwr.supercore.task_identity import TaskIdentity

from fedlora_app import client_app
from fedlora_app.config.keys import RunConfig
from fedlora_app.discretion import DataError, NoDataError, told
from fedlora_app.launch.inspection import check_own_data
from fedlora_app.tasks import TASKS, make_task
from tests.app.test_images import classes

SECRET = "Jane Placeholder"
LABELS = json.dumps({"labels": ["food", "sport"]})
CONFIG = {
    "task-info": LABELS,
    "array-names": json.dumps(["a"]),
    "model-round": 1,
    "report-num-examples": True,
    "server-round": 1,
    "client-index": 0,
}


def ask(kind, node):
    """Return what a node answers to one message."""
    arrays = ndarrays_to_parameters([np.zeros(1, np.float32)])
    content = {
        "query": lambda: compat.getpropertiesins_to_recorddict(GetPropertiesIns(dict(CONFIG))),
        "train": lambda: compat.fitins_to_recorddict(FitIns(arrays, dict(CONFIG)), True),
        "evaluate": lambda: compat.evaluateins_to_recorddict(
            EvaluateIns(arrays, dict(CONFIG)), True
        ),
    }[kind]()
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    message = Message(content, 1, "get_properties" if kind == "query" else kind)

    context = Context(1, 1, node, RecordDict(), {})
    return client_app.app(message, context)


def test_rows_are_read_once_a_run(tmp_path):
    path = tmp_path / "rows.csv"

    def count(rows, run_id):
        path.write_text("text,label\n" + "soup,food\nball,sport\n" * rows)
        content = compat.getpropertiesins_to_recorddict(GetPropertiesIns(dict(CONFIG)))
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        context = Context(run_id, 1, {"data-path": str(path)}, RecordDict(), {})
        reply = client_app.app(Message(content, 1, "get_properties"), context)
        return compat.recorddict_to_getpropertiesres(reply.content).properties["num-examples"]

    first = count(20, 501)
    assert count(40, 501) == first  # one run, whatever becomes of the file
    assert count(40, 502) == 2 * first
    assert count(20, 501) == first  # nothing is kept of two runs at once


BAD_FILES = {
    "d.csv": [
        f"{SECRET},1 Example Road\nordered soup,food\n",
        f"text,{SECRET}\nsoup,food\n",
        f"text,label\nsoup,{SECRET}\nbread,food\n",
        f"text,label\n{SECRET},food\n",
        f'text,label\n"{SECRET},food\nbread,food\n',
        f'text,label\n"{SECRET}" x,food\nbread,food\n',
        f"text,label\n{SECRET},food,sport\n",
        f"text,label,{SECRET},{SECRET}\na,food,b,c\n",
        f"text,label\n{SECRET}\0,food\n",
        f"text,question,label\nsoup is good,{SECRET} said so,food\n",
        f"text,label\n{SECRET},\n{SECRET},food\n",
    ],
    "d.tsv": [f'text\tlabel\n"{SECRET}\tfood\nbread\t{SECRET}\n'],
    "d.jsonl": [
        f'{{"text": "{SECRET}", "label": \n',
        f'["{SECRET}"]\n',
        f'{{"text": ["{SECRET}"], "label": "food"}}\n',
        f'{{"text": "{SECRET}", "label": ["{SECRET}"]}}\n',
        f'{{"text": "{SECRET}\\ud83d", "label": "food"}}\n',
        f'{{"{SECRET}": 1, "{SECRET}": 2}}\n',
        f'{{"text": "{SECRET}", "label": 0.5}}\n{{"text": "{SECRET}", "label": "{SECRET}"}}\n',
    ],
    "d.parquet": [f"PAR1{SECRET}"],
    f"d.{SECRET}": ["text"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, many in BAD_FILES.items() for content in many]
)
def test_an_error_in_a_file_tells_the_file_and_never_its_contents(tmp_path, caplog, name, content):
    folder = tmp_path / SECRET
    folder.mkdir()
    path = folder / name
    path.write_text(content)
    with caplog.at_level(logging.ERROR, "flwr"):
        reply = ask("query", {"data-path": str(path)})
    assert reply.has_error()
    reason = reply.error.reason.replace(path.name, "")
    assert SECRET not in reason
    assert "Placeholder" not in reason
    assert "Error: " in reply.error.reason
    assert path.name in reply.error.reason
    assert str(path) in caplog.text  # the site's own log has it all


def test_lines_that_are_no_utf8_or_not_there_tell_no_folder(tmp_path):
    path = tmp_path / SECRET / "d.csv"
    assert SECRET not in ask("query", {"data-path": str(path)}).error.reason
    path.parent.mkdir()
    path.write_bytes(f"text,label\n{SECRET} ".encode() + b"\xe9,food\n")
    reason = ask("query", {"data-path": str(path)}).error.reason
    assert reason == "DataError: d.csv, line 2: expected UTF-8; save it as UTF-8"
    assert SECRET not in ask("query", {"other": SECRET}).error.reason


@pytest.mark.parametrize(
    "place",
    ["_task", "_about", "_held", "train_validation_split", "_own_rows", "_resident_model",
     "receive_parameters", "train_rounds", "evaluate", "fit_reply", "add_lora", "block"],
)  # fmt: skip
@pytest.mark.parametrize(
    "error",
    [
        ValueError(SECRET),
        KeyError(SECRET),
        RuntimeError({"text": SECRET}),
        OSError(2, SECRET, SECRET),
        UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
        ExceptionGroup(SECRET, [ValueError(SECRET)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_exception_carries_text_out(tmp_path, monkeypatch, place, error):
    def fails(*args, **kwargs):
        raise error

    path = tmp_path / "d.csv"
    path.write_text(f"text,label\n{SECRET},food\n{SECRET},sport\n")
    monkeypatch.setattr(client_app, place, fails)
    if place not in ("_resident_model", "receive_parameters", "add_lora"):
        monkeypatch.setattr(client_app.LoRAClient, "_receive", lambda *args: None)
    for kind in ("query", "train", "evaluate"):
        reply = ask(kind, {"data-path": str(path)})
        told_to_server = str(reply.error.reason if reply.has_error() else reply.content)
        assert "Placeholder" not in told_to_server
        if place == "_held" and kind == "query":
            assert told_to_server.startswith(type(error).__name__)
            assert "client_app.py, line" in told_to_server


def test_a_good_answer_holds_numbers_alone(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(f"text,label\n{SECRET},food\n{SECRET} again,sport\nmore,food\n")
    reply = ask("query", {"data-path": str(path), "max-rank": 4, "name": SECRET})
    assert "Placeholder" not in str(reply.content)
    found = compat.recorddict_to_getpropertiesres(reply.content).properties
    assert found == {"num-examples": 2, "max-rank": 4}


def test_one_row_is_too_few_and_the_file_is_named(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("text,label\nsoup,food\n")
    reason = ask("query", {"data-path": str(path)}).error.reason
    assert "one.csv: expected at least 2 rows" in reason
    with pytest.raises(ValueError, match=r"one\.csv: expected at least 2 rows .* got 1; add rows"):
        check_own_data({"data-path": str(path)})


@pytest.mark.parametrize("kind", [DataError, NoDataError])
def test_errors_survive_a_pickle(kind):
    error = kind("/a/b.csv", "expected x", "y", "do z", "line 3")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "/a/b.csv, line 3: expected x, got y; do z"
    assert told(again) == f"{kind.__name__}: b.csv, line 3: expected x; do z"


@pytest.mark.parametrize(
    ("node", "match"),
    [
        ({}, "this node has no data"),
        ({"data-path": "no/such.csv"}, "not there; correct data-path"),
        ({"data-path": "x", "max-rank": 0}, "max-rank: expected a whole number of at least 1"),
        ({"data-path": "x", "max-rank": "4"}, "max-rank: expected a whole number of at least 1"),
        ({"data-path": "x", "dp-clip": -1.0}, "dp-clip: expected a number above 0"),
        ({"partition-id": 3, "num-partitions": 3}, "partition-id: expected 0 to 2, got 3"),
    ],
)
def test_a_supernode_checks_its_own_data_and_limits(node, match):
    with pytest.raises(ValueError, match=match):
        check_own_data(node)


def test_a_supernode_shows_its_own_rows(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("text,label,id\nsoup,food,1\n ,food,2\na match,sport,3\n")
    shown = check_own_data({"data-path": str(path)})
    assert "own.csv, text from 'text', label from 'label'; left: id" in shown
    assert "2 rows (1 left out: no text): food 1, sport 1" in shown
    path.write_text("body,kind\nsoup,food\n")
    assert "the run has to name its columns" in check_own_data({"data-path": str(path)})


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("kind", ["images", "body,label", "question,answer"])
def test_a_node_whose_data_are_of_another_task_says_so(tmp_path, task, kind):
    if (task, kind) in {("image-classification", "images"), ("causal-lm", "question,answer")}:
        pytest.skip("they are of this task")
    path = tmp_path / "d.csv"
    if kind == "images":
        path = classes(tmp_path / "d", "ab", each=2)
    else:
        path.write_text(f"{kind}\n" + "as it goes on,a\nand on it goes,b\n" * 4)
    own = make_task(RunConfig.from_flat({"task": task}))
    with pytest.raises((ValueError, FileNotFoundError), match="another task") as caught:
        own.own_rows(str(path), {"labels": ["a", "b"]})
    assert "another task" in caught.value.told  # what the server hears
    assert str(tmp_path) not in caught.value.told
    try:
        said = check_own_data({"data-path": str(path)}, own.config)  # as its SuperNode starts
    except FileNotFoundError as error:
        said = str(error)
    assert "another task" in said
