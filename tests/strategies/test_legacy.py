"""``LegacyFedLoRA`` in Flower's own old-style server gives what ``FedLoRA.start`` gives."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Code, EvaluateRes, GetPropertiesRes, Status
from flwr.compat.common import recorddict_compat as compat
from flwr.server import SimpleClientManager
from flwr.supercore.task_identity import TaskIdentity

from strategies import FedLoRA
from strategies.checkpoint import Checkpoints
from strategies.legacy import LegacyFedLoRA, _answers
from strategies.lora import Adapter, factor_of
from strategies.messages import from_record, to_record
from strategies.proxy_grid import node_id_of
from strategies.ranks import AutoRank, ListRank, ReportedRank
from strategies.saving import Saver
from tests.fakes import FakeGrid, Proxy, random_adapter, serve_old_style

NODES = [901, 17, 455]
SCALE = 2.0


class Client(NumPyClient):
    """Adds to what it gets by a generator of its own: the same in either server."""

    def __init__(self, node, partition):
        self.node, self.partition = node, partition

    def get_properties(self, config):
        known = {"partition-id": self.partition, "max-rank": 2 + self.partition}
        if config.get("profile"):
            share = (self.partition + 1) / 4
            known |= {"loss-entropy": share, "label-entropy": share, "gini-simpson": share}
        return known

    def fit(self, parameters, config):
        g = np.random.default_rng([self.partition, int(config["server-round"])])
        named = zip(json.loads(config["array-names"]), parameters, strict=True)
        trained = [
            np.add(p, g.standard_normal(p.shape), dtype=p.dtype, casting="unsafe")
            for name, p in named
            if not name.startswith("merged.")
            and (factor_of(name.removesuffix("::step")) or "") in config["lora-send"]
        ]
        metrics = {"loss": 1 / config["server-round"], "rank": config["lora-rank"], "word": "no"}
        return trained, 10 + self.partition, metrics

    def evaluate(self, parameters, config):
        size = sum(p.size for p in parameters)
        return float(self.partition), 10 + self.partition, {"size": size, "mine": config["mine"]}


def app(context):
    return Client(context.node_id, context.node_config["partition-id"]).to_client()


class Nodes:
    """Real client apps, as answers of a grid and of proxies."""

    def __init__(self, client_fn=app):
        self.app = ClientApp(client_fn=client_fn)
        self.contexts = {
            node: Context(1, node, {"partition-id": i}, RecordDict(), {})
            for i, node in enumerate(NODES)
        }

    def __call__(self, message):
        return self.app(message, self.contexts[message.metadata.dst_node_id]).content


def engine(**options):
    settings = {"client_api": "numpy", "scale": SCALE, "ranks": ListRank([2, 4], cycle=True)}
    return FedLoRA(**{**settings, **options})


def initial():
    return to_record(random_adapter(4, seed=0).to_state_dict())


def serve(strategy, rounds=3, nodes=None, proxies=None):
    nodes = nodes or Nodes()
    return serve_old_style(
        strategy, proxies or [Proxy(str(node), node, nodes) for node in NODES], rounds
    )


def start(strategy, rounds=3, **options):
    return strategy.start(FakeGrid(NODES, Nodes()), initial(), num_rounds=rounds, **options)


def mine(number):
    return {"mine": number}


def arrays_of(strategy):
    return {k: v.data for k, v in strategy.result.arrays.items()}


@pytest.mark.parametrize("rule", ["replication", "flora", "rolora", "flexlora"])
@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_the_result_is_that_of_the_new_style(rule, wire):
    from flwr.app import ConfigRecord

    records, expected_records = [], []
    options = {"aggregation": rule, "wire_dtype": wire, "evaluate_fraction": 0.67}
    new = engine(**options, listeners=[expected_records.append])
    expected = start(new, evaluate_config=ConfigRecord({"mine": 5}))
    legacy = LegacyFedLoRA(
        engine(**options, listeners=[records.append]),
        random_adapter(4, seed=0).to_state_dict(),
        num_rounds=3,
        on_evaluate_config_fn=lambda number: {"mine": 5},
    )
    history, server = serve(legacy)
    assert arrays_of(legacy) == {k: v.data for k, v in expected.arrays.items()}
    assert server.parameters.tensors == [v.data for v in expected.arrays.values()]

    def told(records, kind, keys):
        return [{k: r.get(k) for k in keys} for r in records if r["kind"] == kind]

    for kind, keys in (
        ("client", ("round", "client", "rank", "status", "loss", "bytes_up", "bytes_down")),
        ("client-evaluation", ("round", "client", "loss", "size")),
        ("round", ("round", "accepted", "train_loss", "clients_loss", "bytes_up", "ranks")),
    ):
        found = told(records, kind, keys)
        assert found == told(expected_records, kind, keys)
        assert found
    for number in (1, 2, 3):
        metrics = expected.evaluate_metrics_clientapp[number]
        assert dict(history.losses_distributed)[number] == pytest.approx(metrics["loss"])
        sizes = dict(history.metrics_distributed["size"])
        assert sizes[number] == pytest.approx(metrics["size"])
        assert dict(history.metrics_distributed_fit["loss"])[number] == pytest.approx(1 / number)


def test_functions_of_the_old_style_are_called_as_fedavg_calls_them():
    calls = []

    def evaluate(server_round, parameters, config):
        names, scale = config["array-names"], config["lora-scale"]
        calls.append((server_round, len(parameters), "lora_A" in names, scale))
        return 2.0 / (server_round + 1), {"score": server_round, "word": "is kept"}

    def mean(pairs):
        assert all(isinstance(count, int) for count, _ in pairs)
        return {"rows": sum(count for count, _ in pairs), "top": max(m["rank"] for _, m in pairs)}

    records = []
    legacy = LegacyFedLoRA(
        engine(listeners=[records.append], evaluate_every=2),
        initial(),
        num_rounds=3,
        evaluate_fn=evaluate,
        on_fit_config_fn=mine,
        on_evaluate_config_fn=mine,
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=lambda pairs: {
            "n": len(pairs),
            "mine": pairs[0][1]["mine"],
        },
    )
    history, _ = serve(legacy)
    count = len(initial())
    assert calls == [(i, count, True, SCALE) for i in (0, 2, 3)]  # every second, and the last
    assert dict(history.losses_centralized) == {i: 2.0 / (i + 1) for i in (0, 2, 3)}
    assert dict(history.metrics_centralized["word"]) == dict.fromkeys((0, 2, 3), "is kept")
    assert dict(history.metrics_distributed_fit["rows"]) == dict.fromkeys((1, 2, 3), 33)
    assert dict(history.metrics_distributed_fit["top"]) == dict.fromkeys((1, 2, 3), 3)
    assert dict(history.metrics_distributed["mine"]) == {2: 2, 3: 3}
    rounds = [r for r in records if r["kind"] == "round"]
    assert [(r["round"], r.get("server_loss")) for r in rounds] == [
        (0, 2.0), (1, None), (2, 2 / 3), (3, 0.5)
    ]  # fmt: skip


def test_properties_are_asked_of_the_proxies():
    records = []
    legacy = LegacyFedLoRA(
        engine(ranks=ReportedRank(4), listeners=[records.append], evaluate_fraction=0), initial()
    )
    serve(legacy, rounds=1)
    clients = [r for r in records if r["kind"] == "client"]
    assert [(r["client"], r["node"], r["rank"]) for r in clients] == [
        (0, "901", 2), (1, "17", 3), (2, "455", 4)
    ]  # fmt: skip

    records.clear()
    profiled = engine(ranks=AutoRank(1, 4), listeners=[records.append], evaluate_fraction=0)
    serve(LegacyFedLoRA(profiled, initial()), rounds=1)
    ranks = [r["rank"] for r in records if r["kind"] == "client"]
    assert ranks[0] == 1
    assert ranks[-1] == 4


def test_who_does_not_answer_a_query_takes_part_without():
    nodes, gate, records = Nodes(), threading.Event(), []

    class Slow(Proxy):
        def get_properties(self, ins, timeout, group_id):
            gate.wait(20)
            return super().get_properties(ins, timeout, group_id)

    class Refuses(Proxy):
        def get_properties(self, ins, timeout, group_id):
            return GetPropertiesRes(Status(Code.GET_PROPERTIES_NOT_IMPLEMENTED, ""), {})

    kinds = [Slow, Refuses, Proxy]
    proxies = [kind(str(n), n, nodes) for kind, n in zip(kinds, NODES, strict=True)]
    began = time.monotonic()
    strategy = engine(
        ranks=ReportedRank(4), listeners=[records.append], query_timeout=0.3, evaluate_fraction=0
    )
    serve(LegacyFedLoRA(strategy, initial()), rounds=1, proxies=proxies)
    gate.set()
    assert time.monotonic() - began < 15
    clients = [r for r in records if r["kind"] == "client"]
    assert [r["status"] for r in clients] == ["ok"] * 3
    assert next(r["rank"] for r in clients if r["node"] == "455") == 4


def test_bad_replies_are_left_out_and_the_run_goes_on():
    records = []

    def client_fn(context):
        client = Client(context.node_id, context.node_config["partition-id"])
        if client.partition == 1:
            client.fit = lambda parameters, config: ([p[:1] for p in parameters], 5, {})
        return client.to_client()

    nodes = Nodes(client_fn)
    fails = {NODES[2]: ("train", "evaluate")}
    proxies = [Proxy(str(n), n, nodes, fails.get(n, ())) for n in NODES]
    legacy = LegacyFedLoRA(
        engine(listeners=[records.append]), initial(), on_evaluate_config_fn=mine
    )
    history, _ = serve(legacy, rounds=2, proxies=proxies)
    status = {r["client"]: r["status"] for r in records if r["kind"] == "client"}
    assert status == {0: "ok", 1: "rejected", 2: "rejected"}
    assert dict(history.losses_distributed)[2] == pytest.approx(11 / 21)  # of clients 0 and 1
    final = Adapter.from_state_dict(from_record(legacy.result.arrays), SCALE)
    assert final.non_finite() == []


def test_too_few_replies_leave_the_model_as_it_was():
    nodes = Nodes()
    proxies = [Proxy(str(n), n, nodes, ("train",)) for n in NODES]
    legacy = LegacyFedLoRA(engine(evaluate_fraction=0), initial())
    _, server = serve(legacy, rounds=2, proxies=proxies)
    assert server.parameters.tensors == [a.data for a in initial().values()]


def test_a_strategy_around_it_may_change_the_parameters():
    legacy = LegacyFedLoRA(engine(evaluate_fraction=0), initial())
    manager = SimpleClientManager()
    manager.register(Proxy("17", 17, Nodes()))
    given = legacy.initialize_parameters(manager)
    arrays = compat.parameters_to_arrayrecord(given, keep_input=True).to_numpy_ndarrays()
    from flwr.common import Parameters, ndarrays_to_parameters

    changed = ndarrays_to_parameters([2 * a for a in arrays])
    ((_, ins),) = legacy.configure_fit(1, changed, manager)
    sent = compat.parameters_to_arrayrecord(ins.parameters, keep_input=True)
    whole = Adapter.from_state_dict(
        {k: 2 * t for k, t in from_record(initial()).items()}, SCALE
    ).with_rank(3)
    for array, tensor in zip(sent.values(), whole.to_state_dict().values(), strict=True):
        assert torch.equal(torch.from_numpy(array.numpy()), tensor)
    with pytest.raises(ValueError, match=f"the {len(arrays)} arrays of the adapter, got 1"):
        legacy.configure_fit(1, Parameters(changed.tensors[:1], "numpy.ndarray"), manager)


def test_proxies_of_any_name():
    nodes, records = Nodes(), []
    proxies = [Proxy(f"ipv4:10.0.0.{n}:1234", n, nodes) for n in NODES]
    assert len({node_id_of(p) for p in proxies}) == 3
    legacy = LegacyFedLoRA(engine(listeners=[records.append], evaluate_fraction=0), initial())
    serve(legacy, rounds=1, proxies=proxies)
    assert [r["status"] for r in records if r["kind"] == "client"] == ["ok"] * 3
    assert arrays_of(legacy) == {
        k: v.data for k, v in start(engine(evaluate_fraction=0), rounds=1).arrays.items()
    }


def test_a_process_without_an_identity(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    legacy = LegacyFedLoRA(engine(query=False), initial())
    manager = SimpleClientManager()
    manager.register(Proxy("17", 17, None))
    assert len(legacy.configure_fit(1, legacy.initialize_parameters(manager), manager)) == 1
    ((proxy, _),) = legacy.configure_evaluate(1, legacy._current(), manager)
    answer = EvaluateRes(Status(Code.OK, ""), loss=1.0, num_examples=3, metrics={"x": 2})
    assert legacy.aggregate_evaluate(1, [(proxy, answer)], []) == (1.0, {"x": 2})


def test_a_resumed_run_ends_as_if_nothing_had_happened(tmp_path):
    def strategy(folder, num_rounds, resume_from=""):
        saver = Saver(Checkpoints(folder), resume_from=resume_from, fingerprint={"a": 1})
        scores.clear()
        return LegacyFedLoRA(
            engine(saver=saver, evaluate_fraction=0),
            initial(),
            num_rounds=num_rounds,
            evaluate_fn=lambda number, arrays, config: (scores.append(number), (1.0, {}))[1],
        )

    scores = []
    expected = strategy(tmp_path / "whole", 4)
    serve(expected, rounds=4)
    assert scores == [0, 1, 2, 3, 4]
    serve(strategy(tmp_path / "parts", 2), rounds=2)
    resumed = strategy(tmp_path / "parts", 4, "latest")
    _, server = serve(resumed, rounds=4)  # the server does not know of the two rounds before
    assert scores == [3, 4]
    assert arrays_of(resumed) == arrays_of(expected)
    assert server.parameters.tensors == list(arrays_of(expected).values())


def test_it_stops_when_the_scores_say_so():
    records = []
    legacy = LegacyFedLoRA(
        engine(stop_when=lambda scores: scores["loss"] < 0.6, listeners=[records.append]),
        initial(),
        num_rounds=5,
        evaluate_fn=lambda number, arrays, config: (1 / (number + 1), {}),
        on_evaluate_config_fn=mine,
    )
    history, _ = serve(legacy, rounds=5)
    assert [r["round"] for r in records if r["kind"] == "round"] == [0, 1]
    assert dict(history.losses_centralized) == {0: 1.0, 1: 0.5}


def test_wrong_settings_are_said_at_once():
    with pytest.raises(ValueError, match="client_api='numpy'"):
        LegacyFedLoRA(FedLoRA(), initial())
    legacy = LegacyFedLoRA(engine(ranks=ListRank([8])), initial())
    with pytest.raises(ValueError, match="the initial adapter has rank 4"):
        legacy.initialize_parameters(SimpleClientManager())


def test_what_a_client_raises_is_one_short_line(caplog):
    caplog.set_level("WARNING", logger="flwr")
    said = "\nINFO :  round 9/9 \x1b[2J" + 10_000 * "x"
    assert _answers([], [RuntimeError(said)], 3) == []
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("round 3: a client failed: INFO : round 9/9")
    assert line.isprintable()
    assert len(line) < 600
