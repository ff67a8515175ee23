"""What numbers become on the wire, against numpy that rounds by its own means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.aggregation import make_aggregator
from strategies.lora import Adapter, AdapterError, LoraPair
from strategies.messages import from_record, record_bytes, to_record
from strategies.wire import WIRE_DTYPES, check_wire_dtype, decode, encode
from tests.fakes import random_adapter, same

FLOATS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20)


def round_trip(tensors, wire):
    return decode(from_record(to_record(encode(tensors, wire))), wire)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ----- float types ---------------------------------------------------------------------


@given(values=FLOATS)
@settings(max_examples=50, deadline=None)
def test_float32_is_exact(values):
    x = torch.tensor(values, dtype=torch.float32)
    y = round_trip({"x": x}, "float32")["x"]
    assert y.numpy().tobytes() == x.numpy().tobytes()


@given(values=FLOATS)
@settings(max_examples=50, deadline=None)
def test_float16_rounds_to_the_nearest_and_cuts_its_range(values):
    x = torch.tensor(values, dtype=torch.float32)
    y = round_trip({"x": x}, "float16")["x"].numpy()
    finite = np.isfinite(x.numpy())
    cut = np.clip(x.numpy()[finite].astype(np.float64), -65504.0, 65504.0)
    np.testing.assert_array_equal(y[finite], cut.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(y[~finite], x.numpy()[~finite])


@given(values=FLOATS)
@settings(max_examples=50, deadline=None)
def test_bfloat16_rounds_to_the_nearest_even(values):
    x = np.array(values, dtype=np.float32)
    y = round_trip({"x": torch.from_numpy(x)}, "bfloat16")["x"].numpy()
    bits = x.view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    expected = (upper << 16).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_arrives_as_such_and_is_refused(wire, bad):
    current, good = random_adapter(3, seed=1), random_adapter(3, seed=2)
    tensors = good.to_state_dict()
    key = "square.lora_B.weight"
    tensors[key] = tensors[key].clone()
    tensors[key][2, 1] = bad
    got = round_trip(tensors, wire)
    wrong = ~got[key].isfinite()
    assert bool(wrong[2, 1])
    if wire != "int8":  # there the whole rank entry shares a step
        assert torch.equal(wrong, ~tensors[key].isfinite())
    update = Adapter.from_state_dict(got, 2.0, check_finite=False)
    with pytest.raises(AdapterError, match=f"'{key}' holds NaN or Inf"):
        make_aggregator("rbla").aggregate(current, [(update, 1.0)])


# ----- int8 ----------------------------------------------------------------------------

# (key, shape, the axis of the rank)
FACTORS = [
    ("x.lora_A.weight", (4, 9), 0),
    ("x.lora_B.weight", (9, 4), 1),
    ("x.lora_embedding_A", (4, 20), 0),
    ("x.lora_embedding_B", (6, 4), 1),
    ("x.lora_A.weight", (4, 8, 3, 3), 0),
    ("x.lora_B.weight", (9, 4, 1, 1), 1),
    ("x.lora_A.weight", (4, 5, 3), 0),
    ("x.lora_B.weight", (5, 4, 1), 1),
    ("merged.x.lora_A.weight", (3, 9), 0),
    ("merged.x.lora_B.weight", (9, 3), 1),
    ("x.lora_A.weight", (1, 1), 0),
    ("x.lora_A.weight", (6, 6), 0),
]
# Shapes that do not tell which axis is the rank: only the name does.
BY_NAME = [
    ("x.lora_B.weight", (6, 6), 1),  # a layer as wide as its rank
    ("x.lora_embedding_B", (6, 6), 1),
    ("x.lora_B.weight", (3, 8), 1),  # fewer outputs than rank
    ("x.lora_A.weight", (8, 3), 0),  # fewer inputs than rank
    ("x.lora_A.weight", (8, 3, 3, 3), 0),  # a first convolution: three colours
    ("merged.x.lora_B.weight", (4, 4), 1),
]


def uneven(shape, axis, seed=0):
    """Random values whose size differs a thousandfold along the rank axis, and one zero."""
    x = normal(*shape, seed=seed)
    factors = torch.logspace(-3, 3, shape[axis])
    if shape[axis] > 2:
        factors[1] = 0
    return x * factors.reshape([-1 if d == axis else 1 for d in range(len(shape))])


def assert_int8(key, shape, axis):
    x = uneven(shape, axis)
    sent = encode({key: x}, "int8")
    y = round_trip({key: x}, "int8")[key]
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert sent[key].dtype == torch.int8
    assert [t.numel() for k, t in sent.items() if k != key] == [shape[axis]]
    rows, back = np.moveaxis(x.double().numpy(), axis, 0), np.moveaxis(y.double().numpy(), axis, 0)
    for row, got in zip(rows, back, strict=True):
        step = abs(row).max() / 127
        assert (abs(got - row) <= step / 2 * (1 + 1e-5)).all()
        if step == 0:
            assert not got.any()
        else:  # the largest survives
            largest = abs(row).argmax()
            np.testing.assert_allclose(got.flat[largest], row.flat[largest], rtol=1e-6)


@pytest.mark.parametrize(("key", "shape", "axis"), FACTORS)
def test_int8_keeps_every_rank_entry_to_half_a_step(key, shape, axis):
    assert_int8(key, shape, axis)


@pytest.mark.parametrize(("key", "shape", "axis"), BY_NAME)
def test_int8_finds_the_rank_axis_by_name(key, shape, axis):
    assert_int8(key, shape, axis)


def test_int8_rounds_like_numpy():
    x = uneven((4, 50), 0)
    step = (abs(x.numpy()).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    steps = np.divide(x.numpy(), step, out=np.zeros_like(x.numpy()), where=step > 0)
    expected = np.rint(steps) * step
    np.testing.assert_array_equal(round_trip({"x.lora_A.weight": x}, "int8")["x.lora_A.weight"],
                                  expected)  # fmt: skip


def test_a_single_value_keeps_its_shape():
    for wire in WIRE_DTYPES:
        x = round_trip({"temperature.weight": torch.tensor(1.5)}, wire)["temperature.weight"]
        assert torch.equal(x, torch.tensor(1.5))


@pytest.mark.parametrize("shape", [(1,), (7,)])
def test_int8_leaves_vectors_alone(shape):
    x = normal(*shape)
    sent = encode({"head.bias": x}, "int8")
    assert list(sent) == ["head.bias"]
    assert torch.equal(round_trip({"head.bias": x}, "int8")["head.bias"], x)


def test_int8_of_other_matrices_and_of_zeros():
    x = normal(3, 40)
    y = round_trip({"head.weight": x, "zero.weight": torch.zeros(2, 3)}, "int8")
    assert float((y["head.weight"] - x).abs().max()) <= float(x.abs().max()) / 254 * 1.00001
    assert torch.equal(y["zero.weight"], torch.zeros(2, 3))


def test_int8_is_stable_from_the_first_round_trip_on():
    adapter = random_adapter(3, seed=4).to_state_dict()
    once = round_trip(adapter, "int8")
    twice = round_trip(once, "int8")
    for key, x in once.items():
        torch.testing.assert_close(twice[key], x, rtol=1e-6, atol=0)


# ----- both sides ----------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_an_adapter_comes_back_as_one(wire):
    adapter = random_adapter(3, seed=1)
    before = [t.clone() for t in adapter.tensors()]
    got = Adapter.from_state_dict(round_trip(adapter.to_state_dict(), wire), 2.0)
    assert not got.differences(adapter, 3)
    assert list(got.to_state_dict()) == list(adapter.to_state_dict())
    assert same(got, adapter) == (wire == "float32")
    for x, y in zip(got.tensors(), adapter.tensors(), strict=True):
        assert float((x - y).norm() / y.norm()) < 0.01
    assert all(torch.equal(x, y) for x, y in zip(before, adapter.tensors(), strict=True))


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_can_be_sent(wire, dtype):
    x = normal(4, 9).to(dtype)
    y = round_trip({"x.lora_A.weight": x}, wire)["x.lora_A.weight"]
    assert y.dtype == torch.float32
    assert float((y - x.float()).abs().max()) < 0.02


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("declared", WIRE_DTYPES)
def test_another_type_than_declared_is_refused(wire, declared):
    sent = encode({"x.lora_A.weight": normal(4, 9)}, wire)
    if wire == declared:
        decode(sent, declared)
    elif (wire, declared) == ("float32", "int8"):
        decode(sent, declared)  # how int8 sends vectors, and NaN
    else:
        with pytest.raises(ValueError, match=f"'x.lora_A.weight' is .*{declared}"):
            decode(sent, declared)


def test_missing_steps_and_unknown_types_are_refused():
    sent = encode({"x.lora_A.weight": normal(4, 9)}, "int8")
    (step,) = [k for k in sent if k != "x.lora_A.weight"]
    del sent[step]
    with pytest.raises(ValueError, match=f"'x.lora_A.weight' came without its steps, '{step}'"):
        decode(sent, "int8")
    for call in (lambda: check_wire_dtype("int4"), lambda: encode({}, "int4")):
        with pytest.raises(ValueError, match=r"expected one of float32, .*int8; got 'int4'"):
            call()


def test_steps_of_another_shape_are_refused():
    """One row and four steps make no adapter of rank 4: rank 1 is never broadcast."""
    sent = encode({"x.lora_A.weight": normal(1, 9)}, "int8")
    (step,) = [k for k in sent if k != "x.lora_A.weight"]
    sent[step] = torch.ones(4, 1)
    with pytest.raises(ValueError, match="steps"):
        decode(sent, "int8")


# ----- bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "bytes_each"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)]
)
def test_bytes_grow_with_the_rank_and_nothing_else(wire, bytes_each):
    shapes = {"q": (64, 48), "v": (32, 48)}
    low, high = (
        encode(random_adapter(r, seed=1, shapes=shapes, dense=False).to_state_dict(), wire)
        for r in (4, 16)
    )
    assert size(low) * 4 == size(high)
    values = 4 * sum(m + n for m, n in shapes.values())
    steps = 4 * 4 * 4 if wire == "int8" else 0  # a float32 for each entry of four factors
    assert size(low) == bytes_each * values + steps
    record = to_record(low)
    assert size(low) < record_bytes(record) <= size(low) + 128 * len(low)


def test_convolutions_and_embeddings_of_an_adapter_travel():
    adapter = Adapter(
        {
            "conv": LoraPair(normal(4, 3, 2, 2), normal(5, 4, 1, 1), 1.0),
            "table": LoraPair(normal(4, 11), normal(6, 4), 1.0, embedding=True),
        }
    )
    for wire in WIRE_DTYPES:
        got = Adapter.from_state_dict(round_trip(adapter.to_state_dict(), wire), 1.0)
        assert not got.differences(adapter, 4)
        for module in adapter.pairs:
            error = got.delta(module) - adapter.delta(module)
            assert float(error.norm() / adapter.delta(module).norm()) < 0.02
