"""Records and tensors: what goes in comes out, what is broken is said."""

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from strategies.claims import ReplyError
from strategies.messages import from_record, record_bytes, reply_error, to_record
from tests.fakes import FakeGrid


def record_of(**arrays):
    return ArrayRecord({name: Array(np.asarray(a)) for name, a in arrays.items()})


def test_round_trip_keeps_values_shapes_and_names():
    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "transposed": torch.randn(3, 4).T,
        "conv": torch.randn(2, 3, 1, 1),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bytes": torch.tensor([-3, 7], dtype=torch.int8),
    }
    record = to_record(tensors)
    back = from_record(record)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert record_bytes(record) == sum(len(a.data) for a in record.values())


def test_bfloat16_travels_as_float32():
    tensor = torch.randn(4).bfloat16()
    assert torch.equal(from_record(to_record({"x": tensor}))["x"], tensor.float())


def test_arrays_as_numpy_clients_write_them():
    transposed = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert torch.equal(from_record(record_of(x=transposed))["x"], torch.from_numpy(transposed))


def test_what_cannot_be_read_is_named():
    good = record_of(x=np.ones(4, np.float32))["x"]
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    for data in (good.data[:-1], good.data + b"x", good.data[:20], b"", b"nonsense",
                 objects.getvalue()):  # fmt: skip
        array = Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=data)
        with pytest.raises(ReplyError, match="array 'x' cannot be read"):
            from_record(ArrayRecord({"x": array}))


def test_what_a_client_says_of_its_error_stays_on_one_line():
    said = "<class 'ValueError'>:<'no\nINFO :  round 3/3 | acc 1.0 \x1b[2J\u2028'> " + 10_000 * "x"
    FakeGrid([], None)  # messages need a run's identity
    asked = Message(RecordDict(), 1, "train")
    reason = reply_error(Message(Error(2, said), reply_to=asked))
    assert reason.startswith("error 2: <class 'ValueError'>:<'no INFO : round 3/3")
    assert reason.isprintable()
    assert len(reason) < 600
    assert reply_error(Message(Error(2), reply_to=asked)) == "error 2: "
