"""All arrays of a message as one: what comes out is what went in, and nothing else gets in."""

import json
import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from strategies.bundles import KIND, MARK, bundle, mark, marked, unbundle
from strategies.client import bundled
from strategies.flower import TaskIdentity


def content() -> RecordDict:
    arrays = {
        "layers.0.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "steps": np.array([-1, 127], np.int8),
        "bits": np.array([[1], [2]], np.int16),
        "none": np.zeros((0, 4), np.float16),
        "0": np.array(3.5),
        "é": np.array([True]),
    }
    return RecordDict(
        {
            "arrays": ArrayRecord({key: Array(value) for key, value in arrays.items()}),
            "one": ArrayRecord({"x": Array(np.ones(3))}),
            "nothing": ArrayRecord({}),
            "config": ConfigRecord({"rank": 3}),
        }
    )


def told(record: ArrayRecord) -> list:
    return [(key, a.dtype, tuple(a.shape), a.stype, a.data) for key, a in record.items()]


def test_what_comes_out_is_what_went_in_to_the_last_byte() -> None:
    given, before = content(), content()
    bundle(given)
    assert list(given["arrays"]) == [KIND]
    assert told(given["one"]) == told(before["one"])  # one array is one already
    (only,) = given["arrays"].values()
    assert len(only.data) == only.shape[0]
    bundle(given)  # a second time nothing happens
    unbundle(given)
    assert list(given) == list(before)
    for key in ("arrays", "one", "nothing"):
        assert told(given[key]) == told(before[key])
    np.testing.assert_array_equal(given["arrays"]["columns first"].numpy(), [[0, 1, 2], [3, 4, 5]])
    unbundle(given)
    assert told(given["arrays"]) == told(before["arrays"])


def of(data: bytes, **more: Array) -> RecordDict:
    array = Array("uint8", (len(data),), KIND, data)
    return RecordDict({"arrays": ArrayRecord({KIND: array, **more})})


def header(about: object, rest: bytes = b"") -> bytes:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    return len(text).to_bytes(8, "big") + text + rest


ENTRY = ["x", "float32", [1], "numpy.ndarray", 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff" * 40, "cannot be read"),
        (header(b"[" * 200_000), "cannot be read"),
        (header({"x": 1}), "does not say"),
        (header([ENTRY[:4]]), "does not say"),
        (header([["x", "float32", [1], "numpy.ndarray", -4]]), "does not say"),
        (header([["x", "float32", [1], "numpy.ndarray", True]], b"1"), "does not say"),
        (header([["x", "float32", [1.5], "numpy.ndarray", 4]], b"1234"), "does not say"),
        (header([["x", "float32", "1", "numpy.ndarray", 4]], b"1234"), "does not say"),
        (header([[1, "float32", [1], "numpy.ndarray", 4]], b"1234"), "does not say"),
        (header([["x", "uint8", [1], KIND, 4]], b"1234"), "does not say"),  # one in the other
        (header([ENTRY], b"123"), "not those of its arrays"),
        (header([ENTRY], b"12345"), "not those of its arrays"),
        (header([["x", "float32", [1], "numpy.ndarray", 1 << 62]], b"1"), "not those of its"),
        (header([ENTRY, ENTRY], b"12345678"), "two arrays of one name"),
    ],
)
def test_a_bundle_that_is_none_is_refused(data, message) -> None:
    with pytest.raises(ValueError, match=message):
        unbundle(of(data))


def test_a_bundle_beside_others_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a bundle of arrays alone, got 2 arrays"):
        unbundle(of(header([ENTRY], b"1234"), more=Array(np.ones(1))))


def test_rubbish_raises_nothing_but_a_value_error() -> None:
    rng, good = random.Random(7), content()
    bundle(good)
    (whole,) = good["arrays"].values()
    for _ in range(2000):
        data = bytearray(whole.data)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        broken = of(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
        try:
            unbundle(broken)
        except ValueError:
            continue
        found = broken["arrays"].values()
        assert sum(len(array.data) for array in found) <= len(data)


def test_a_mark_is_read_once() -> None:
    given = content()
    assert not marked(given)
    mark(given)
    assert given["config"][MARK] is True
    assert marked(given)
    assert dict(given["config"]) == {"rank": 3}
    bare = RecordDict({"arrays": ArrayRecord({})})
    mark(bare)
    assert list(bare) == ["arrays"]


@pytest.mark.parametrize("able", [False, True])
def test_an_app_sees_and_returns_arrays_as_ever(able) -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    seen = []
    app = ClientApp(mods=[bundled])

    @app.train()
    def train(message, context):
        seen.append(message.content)
        return Message(content(), reply_to=message)

    @app.query()
    def query(message, context):
        return Message(RecordDict({"config": ConfigRecord({"name": 1})}), reply_to=message)

    sent = content()
    if able:
        bundle(sent)
        mark(sent)
    context = Context(1, 7, {}, RecordDict(), {})
    reply = app(Message(sent, 7, "train"), context).content
    (got,) = seen
    assert told(got["arrays"]) == told(content()["arrays"])
    assert dict(got["config"]) == {"rank": 3}
    assert marked(reply) is able
    assert len(reply["arrays"]) == (1 if able else 7)
    unbundle(reply)
    assert told(reply["arrays"]) == told(content()["arrays"])

    asked = RecordDict({"config": ConfigRecord()})
    if able:
        mark(asked)
    assert marked(app(Message(asked, 7, "query"), context).content) is able
