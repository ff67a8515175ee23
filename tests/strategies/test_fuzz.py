"""Replies that are wrong in every way that a seed can think of: arrays, and all beside them.

Each case is one run of two rounds in which four nodes are honest and two send honest replies that
were spoiled. ``FEDLORA_FUZZ_SEED`` and ``FEDLORA_FUZZ_CASES`` choose other cases and more of them;
a failure says which case it was.
"""

import contextlib
import json
import logging
import math
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS
from strategies.claims import REASON_LENGTH
from strategies.lora import factor_of
from strategies.messages import NAMES_KEY, from_record, to_record
from strategies.model import MERGED, GlobalModel
from strategies.ranks import AutoRank, ListRank, QualityRank, ReportedRank, UniformRank
from strategies.sampling import (
    FractionSampling,
    IndependentSampling,
    StatisticalSampling,
    WeightedSampling,
)
from strategies.wallclock import SimulatedClock
from strategies.wire import WIRE_DTYPES, decode, encode
from tests.fakes import FakeGrid, random_adapter

SEED = int(os.environ.get("FEDLORA_FUZZ_SEED", "42"))
CASES = int(os.environ.get("FEDLORA_FUZZ_CASES", "3"))  # for each rule, client API and wire type
ROUNDS, SCALE, RANK = 2, 2.0, 4
SHAPES = {"tall": (6, 4), "wide": (4, 6)}
HONEST, SPOILED = (3, 4, 5, 6), (1, 7)  # node ids: one comes first, and one last
LONGEST_LINE = 2 * REASON_LENGTH + 200
EVIL = "\n\x1b[31mINFO :  round 9/9 | 6/6 clients | acc 1.000\r\x00\u2028\u202e"
FLOATS = [
    math.nan, math.inf, -math.inf, 1e308, -1e308, 3.4e38, 4e38, 1e30, 1e15, -1.0, -0.0, 0.0, 0.4,
    1e-30, 5e-324, 2**63 - 1, -(2**63), 10**30,
]  # fmt: skip
KEYS = [
    "loss", "accuracy", "train_loss", "seconds", "steps", "quality", "validation-loss",
    "lora-scale", "lora-rank", "status", "kind", "round", "client", "node", "rank", "reason",
    "loss-entropy", "gini-simpson", "partition-id", EVIL, "", 10_000 * "x",
]  # fmt: skip


# ----- honest nodes -------------------------------------------------------------------------


def trained(arrays, config, names, seed):
    """Return what an honest client sends back for what it was sent, as it travels."""
    rng = np.random.default_rng(seed)
    wire = str(config["wire-dtype"])
    record = dict(zip(names, arrays.values(), strict=True))
    own = {n: a for n, a in record.items() if not n.startswith(MERGED)}
    sent = decode(from_record(ArrayRecord(own)), wire)
    out = {}
    for name, tensor in sent.items():
        factor = factor_of(name)
        if factor is None or factor in str(config["lora-send"]):
            moved = factor is None or factor in str(config["lora-train"])
            step = rng.normal(0, 0.1, tensor.shape).astype(np.float32)
            out[name] = tensor + torch.from_numpy(step) if moved else tensor
    return to_record(encode(out, wire))


def answer(message, api):
    """Return an honest reply to any message."""
    node, kind = message.metadata.dst_node_id, message.metadata.message_type
    metrics = {"loss": 0.5, "accuracy": 0.5, "quality": 0.5, "validation-loss": 0.5}
    if kind in ("query", "get_properties"):
        own = {"partition-id": node, "num-examples": 10 + node}
        profile = {"loss-entropy": 1.0 + node, "label-entropy": 1.0, "gini-simpson": 0.1 * node}
        if api == "numpy":
            return RecordDict({
                "getpropertiesres.status": ConfigRecord({"code": 0, "message": ""}),
                "getpropertiesres.properties": ConfigRecord({**own, **profile}),
            })  # fmt: skip
        return RecordDict({"properties": ConfigRecord(own), "profile": MetricRecord(profile)})
    if api == "message":
        content = RecordDict({"metrics": MetricRecord({"num-examples": 10 + node, **metrics})})
        if kind == "train":
            sent = message.content["arrays"]
            content["arrays"] = trained(sent, message.content["config"], list(sent), node)
        return content
    name = "fitres" if kind == "train" else "evaluateres"
    content = RecordDict({
        f"{name}.status": ConfigRecord({"code": 0, "message": ""}),
        f"{name}.num_examples": MetricRecord({"num_examples": 10 + node}),
        f"{name}.metrics": ConfigRecord(dict(metrics)),
    })  # fmt: skip
    if kind == "evaluate":
        content[f"{name}.loss"] = MetricRecord({"loss": 0.5})
        return content
    config = message.content["fitins.config"]
    names = json.loads(config[NAMES_KEY])
    back = trained(message.content["fitins.parameters"], config, names, node)
    content[f"{name}.parameters"] = ArrayRecord({str(i): a for i, a in enumerate(back.values())})
    return content


# ----- what can be wrong --------------------------------------------------------------------


def numpy_array(value):
    return Array(np.asarray(value))


def spoil_value(array, rng):
    """Put one value, or nothing but it, into an array."""
    value = array.numpy().copy()
    bad = rng.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 1e-40, 0.0])
    if value.dtype.kind != "f":
        bad = rng.integers(-128, 127)
    with np.errstate(over="ignore"):
        if value.size and rng.random() < 0.5:
            value.flat[rng.integers(value.size)] = bad
        else:
            value[...] = bad
    return numpy_array(value)


def spoil_shape(array, rng):
    value = array.numpy()
    ways = [
        value.T, value[None], value[:-1], value[..., :-1], value[:0], value.ravel(),
        np.concatenate([value, value]), np.float32(1), np.zeros((1 << 10, 2), value.dtype),
        np.zeros((0, 4), np.float32), np.asfortranarray(value),
    ]  # fmt: skip
    return numpy_array(ways[rng.integers(len(ways))])


def spoil_type(array, rng):
    kinds = ["f8", "f4", "f2", "i8", "i2", "i1", "u1", "u4", "c8", "?", "S3", "U2", ">f4", "M8[s]"]
    with np.errstate(all="ignore"):
        value = array.numpy()
        kind = kinds[rng.integers(len(kinds))]
        if kind == "M8[s]":
            value = value.astype("i8")
        return numpy_array(value.astype(kind))


def spoil_bytes(array, rng):
    data = array.data
    cut = int(rng.integers(len(data)))
    evil = b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,), }"
    ways = [
        data[:cut], data + b"x", b"", bytes(rng.integers(0, 256, 200, np.uint8)), 100 * b"(",
        data[:10] + bytes(rng.integers(0, 256, len(data) - 10, np.uint8)),
        data.replace(b"'shape': (", b"'shape': (-"), data.replace(b"'shape': (", b"'shape': (9999"),
        evil.ljust(128) + b"cos\nsystem\n(S'false'\ntR.", data[:cut] + b"\xff" + data[cut + 1 :],
    ]  # fmt: skip
    return Array("float32", (3,), "numpy.ndarray", ways[rng.integers(len(ways))])


def spoil_array(content, rng):
    record = content.array_records[_one(content.array_records, rng)]
    name = _one(record, rng)
    how = [spoil_value, spoil_shape, spoil_type, spoil_bytes][rng.integers(4)]
    record[name] = how(record[name], rng)


def spoil_names(content, rng):
    """Leave arrays out, send them twice, under other names, or in another order."""
    key = _one(content.array_records, rng)
    items = list(content.array_records[key].items())
    if not items:
        return
    name, array = items[rng.integers(len(items))]
    others = [
        EVIL, 10_000 * "n", "", name + "x", "merged." + name, "module." + name, name.upper(),
        name.replace("lora_A", "lora_B"), name.replace("lora_A", "lora_C"), "head.weight::step",
        name.replace(".weight", ".mine.weight"), name + EVIL, "0", "999", "-1", "_empty",
    ]  # fmt: skip
    other = others[rng.integers(len(others))]
    match rng.integers(6):
        case 0:
            items.remove((name, array))
        case 1:
            items.append((other, array))
        case 2:
            items[items.index((name, array))] = (other, array)
        case 3:
            rng.shuffle(items)
        case 4:
            items += [(f"{other}{i}", array) for i in range(200)]
        case 5:
            items = []
    content[key] = ArrayRecord(dict(items))


def spoil_records(content, rng):
    """Leave whole records out, rename them, or add more."""
    keys = list(content)
    key = keys[rng.integers(len(keys))]
    match rng.integers(6):
        case 0:
            del content[key]
        case 1:
            content[EVIL] = content.pop(key)
        case 2:
            content["more"] = to_record({"x": torch.zeros(3)})
        case 3:
            content["more"] = ConfigRecord({"a": EVIL, "b": True, "c": b"\xff", "d": [EVIL]})
        case 4:
            content["more"] = MetricRecord({"num-examples": 10**6, "loss": math.nan})
        case 5:
            content[key] = ConfigRecord({"code": 3, "message": 1000 * EVIL})


def spoil_number(content, rng):
    """Put a number that is none, or far off, beside the arrays."""
    record = _numbers(content, rng)
    if record is not None:
        keys = [*record, *record, KEYS[rng.integers(len(KEYS))]]
        _put(record, keys[rng.integers(len(keys))], FLOATS[rng.integers(len(FLOATS))])


def spoil_kind(content, rng):
    """Put what is no number where one is expected."""
    record = _numbers(content, rng)
    if record is not None:
        values = [True, [], [1.0, math.nan], EVIL, b"\x00", 1000 * EVIL, [1, 2, 3]]
        _put(record, _one(record, rng), values[rng.integers(len(values))])


def spoil_count(content, rng):
    record = _numbers(content, rng)
    if record is not None:
        for i in range(400):
            _put(record, f"{KEYS[i % len(KEYS)]}{i}", FLOATS[i % len(FLOATS)])


def drop_number(content, rng):
    if record := _numbers(content, rng):
        del record[_one(record, rng)]


SPOILERS = [
    spoil_array, spoil_array, spoil_array, spoil_names, spoil_records, spoil_number, spoil_number,
    spoil_number, spoil_kind, spoil_count, drop_number,
]  # fmt: skip


def _one(items, rng):
    keys = list(items)
    if not keys:
        raise LookupError("nothing is left to spoil")
    return keys[rng.integers(len(keys))]


def _numbers(content, rng):
    """Return a record that holds numbers, if there is one."""
    records = [*content.metric_records.values(), *content.config_records.values()]
    return records[rng.integers(len(records))] if records else None


def _put(record, key, value):
    # What Flower's own record refuses cannot come over the wire.
    with contextlib.suppress(TypeError, ValueError):
        record[key] = value


def spoiled(message, api, rng):
    """Return a reply, spoiled in one to three ways, and their names."""
    content = answer(message, api)
    if rng.random() < 0.04:
        return Error(int(rng.integers(0, 9)), 1000 * EVIL), ["error"]
    if rng.random() < 0.04:  # of another kind of message
        kinds = ["train", "evaluate", message.metadata.message_type]
        message.metadata.message_type = kinds[rng.integers(3)]
        other = ("message", "numpy")[rng.integers(2)]
        try:
            return answer(message, other), [f"as {message.metadata.message_type}, {other}"]
        except (KeyError, ValueError):
            return RecordDict(), ["empty"]
    ways = []
    for _ in range(rng.integers(1, 4)):
        how = SPOILERS[rng.integers(len(SPOILERS))]
        try:
            how(content, rng)
        except Exception:  # what is there is spoiled beyond this already
            continue
        ways.append(how.__name__)
    return content, ways


# ----- one case -----------------------------------------------------------------------------


class Case:
    """One run, its replies, and what came of it."""

    def __init__(self, rule, api, wire, number, rejected=None):
        self.key = [SEED, sorted(AGGREGATIONS).index(rule), ("message", "numpy").index(api),
                    WIRE_DTYPES.index(wire), number]  # fmt: skip
        self.api, self.rejected = api, rejected
        self.name = f"{rule} {api} {wire} case {number} of seed {SEED}"
        rng = np.random.default_rng(self.key)
        self.seen = Counter()
        self.ways = []
        self.records = []
        # Limits of devices make ranks differ, and what a node says may be one.
        self.equal = AGGREGATIONS[rule].equal_ranks
        policies = [
            lambda: ListRank([2, 3, 4], cycle=True), lambda: AutoRank(2, RANK),
            lambda: ReportedRank(RANK, fallback=3), lambda: QualityRank(2, RANK),
        ]  # fmt: skip
        ranks = UniformRank(RANK) if self.equal else policies[rng.integers(len(policies))]()
        samplers = [IndependentSampling(0.9), StatisticalSampling(0.9), WeightedSampling(0.9)]
        coins = not AGGREGATIONS[rule].sampling_refusal and rng.random() < 0.5
        sampling = samplers[rng.integers(3)] if coins else FractionSampling(1.0)
        clock = SimulatedClock("lab", base_flops=1e9, rank_flops=1e7)
        self.strategy = FedLoRA(
            aggregation=rule, ranks=ranks, client_api=api, wire_dtype=wire, scale=SCALE,
            sampling=sampling, clock=[clock, None][rng.integers(2)],
            listeners=[self.records.append], seed=int(rng.integers(1000)),
        )  # fmt: skip
        start = random_adapter(RANK, seed=0, scale=SCALE, shapes=SHAPES)
        lines = Lines()
        logger = logging.getLogger("flwr")
        logger.addHandler(lines)
        try:
            self.result = self.strategy.start(
                FakeGrid([*SPOILED, *HONEST], self.reply), to_record(start.to_state_dict()),
                num_rounds=ROUNDS, timeout=5,
            )  # fmt: skip
        finally:
            logger.removeHandler(lines)
        self.lines = lines.lines

    def reply(self, message):
        """Answer as a node does; a spoiled one that was rejected before: with an error."""
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if node in HONEST:
            return answer(message, self.api)
        self.seen[node, kind] += 1
        kinds = ("train", "evaluate", "query", "get_properties")
        where = [node, kinds.index(kind), self.seen[node, kind]]
        rng = np.random.default_rng(self.key + where)
        if kind == "train" and self.rejected is not None:
            key = "config" if self.api == "message" else "fitins.config"
            if (node, message.content[key]["server-round"]) in self.rejected:
                return Error(0, "rejected")
        if kind in ("query", "get_properties") and self.equal:
            return answer(message, self.api)
        content, ways = spoiled(message, self.api, rng)
        self.ways.append((node, kind, ways))
        return content

    def of_kind(self, kind):
        return [r for r in self.records if r["kind"] == kind]

    def arrays(self):
        return from_record(self.result.arrays)

    def check(self):
        """Raise unless all that must hold does."""
        for record in self.of_kind("client"):
            assert int(record["node"]) not in HONEST or record["status"] == "ok", record
        for server_round in range(1, ROUNDS + 1):
            found = {int(r["node"]) for r in self.of_kind("client-evaluation")
                     if r["round"] == server_round}  # fmt: skip
            assert found >= set(HONEST), f"evaluations of round {server_round}: {found}"
        for record in self.records:
            json.dumps(record, allow_nan=False)
        histories = (self.result.train_metrics_clientapp, self.result.evaluate_metrics_clientapp)
        for metrics in (m for history in histories for m in history.values()):
            assert all(math.isfinite(value) for value in metrics.values()), metrics
        for line in self.lines:
            assert line.isprintable(), ascii(line)
            assert len(line) <= LONGEST_LINE, line
        model = GlobalModel.from_tensors(self.arrays(), SCALE)  # refuses what is not finite
        assert model.adapter.ranks.keys() == SHAPES.keys()


class Lines(logging.Handler):
    """What the log was told."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if "flwr" not in record.pathname.split(os.sep):  # Flower's own, of the test's records
            self.lines.append(record.getMessage())


def same_model(case, again):
    a, b = case.arrays(), again.arrays()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("api", ["message", "numpy"])
@pytest.mark.parametrize("rule", sorted(AGGREGATIONS))
def test_no_reply_does_more_than_it_may(rule, api):
    for wire in WIRE_DTYPES:
        for number in range(CASES):
            run = partial(Case, rule, api, wire, number)
            try:
                case = run()
                case.check()
                # What was rejected left no trace: as if those nodes had failed.
                rejected = {(int(r["node"]), r["round"]) for r in case.of_kind("client")
                            if r["status"] == "rejected"}  # fmt: skip
                same_model(case, run(rejected))
            except BaseException as error:
                error.add_note(f"{rule} {api} {wire} case {number}, seed {SEED}")
                raise
