"""Noise that Flower's own wrappers add around FedLoRA: enough for the model, or refused."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.server.strategy import (
    DifferentialPrivacyClientSideFixedClipping as OldClientSide,
)
from flwr.server.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping as OldServerSideAdaptive,
)
from flwr.server.strategy import (
    DifferentialPrivacyServerSideFixedClipping as OldServerSide,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS, FedIT
from strategies.legacy import LegacyFedLoRA
from strategies.messages import to_record
from strategies.ranks import ListRank, ReportedRank, UniformRank
from strategies.sampling import FractionSampling, IndependentSampling
from tests.fakes import FakeGrid, Nodes, Proxy, random_adapter, serve_old_style
from tests.strategies.test_legacy import NODES as OLD_NODES
from tests.strategies.test_legacy import Nodes as OldNodes
from tests.strategies.test_loops import Around

NODES = list(range(50, 60))
C = 0.5  # the bound
SHAPES = {"one": (40, 30), "two": (20, 50)}
START = random_adapter(8, seed=0, scale=2.0, shapes=SHAPES)


def client_side(inner, z, m, **options):
    return DifferentialPrivacyClientSideFixedClipping(inner, z, C, m, **options)


def server_side(inner, z, m):
    return DifferentialPrivacyServerSideFixedClipping(inner, z, C, m)


def client_side_adaptive(inner, z, m):
    return DifferentialPrivacyClientSideAdaptiveClipping(inner, z, m, C, clipped_count_stddev=1.0)


def server_side_adaptive(inner, z, m):
    return DifferentialPrivacyServerSideAdaptiveClipping(inner, z, m, C, clipped_count_stddev=1.0)


WRAPPERS = [client_side, server_side, client_side_adaptive, server_side_adaptive]
CLIENT_SIDE = [client_side, client_side_adaptive]
SERVER_SIDE = [server_side, server_side_adaptive]


class Clients:
    """Client apps behind Flower's own mods; each moves far in a direction of its own."""

    def __init__(self, wrapper=None, *, moved=None, count=lambda i: 10):
        mods = {client_side: [fixedclipping_mod], client_side_adaptive: [adaptiveclipping_mod]}
        self.moved, self.count = moved or {}, count
        self.trained = 0
        app = ClientApp()

        @app.train(mods=mods.get(wrapper, []))
        def train(message: Message, context) -> Message:
            self.trained += 1
            index = context.node_config["partition-id"]
            rng = np.random.default_rng([index, 3])
            sign = self.moved.get(index, 1.0)
            arrays = {
                key: (x + sign * rng.standard_normal(x.shape)).astype("float32")
                for key, x in ((k, a.numpy()) for k, a in message.content["arrays"].items())
            }
            metrics = {"num-examples": self.count(index), **self.says(index)}
            content = {"arrays": as_record(arrays), "metrics": MetricRecord(metrics)}
            return Message(RecordDict(content), reply_to=message)

        @app.query()
        def query(message: Message, context) -> Message:
            return Message(
                RecordDict({"properties": ConfigRecord(dict(context.node_config))}),
                reply_to=message,
            )

        self.nodes = Nodes(app, NODES)

    def says(self, index):
        return {}

    def __call__(self, message):
        return self.nodes(message)


def as_record(arrays):
    return ArrayRecord({key: Array(x) for key, x in arrays.items()})


def make(**settings):
    return FedLoRA(
        **{
            "aggregation": "zero-padding", "ranks": UniformRank(8), "scale": 2.0,
            "evaluate_fraction": 0, **settings,
        }
    )  # fmt: skip


def run(strategy, clients, rounds=1):
    grid = FakeGrid(NODES, clients)
    return strategy.start(grid, to_record(START.to_state_dict()), num_rounds=rounds, timeout=5)


def flat(result):
    return np.concatenate([a.numpy().ravel() for a in result.arrays.values()])


# ----- where it is right ---------------------------------------------------------------------


RIGHT = [
    ("zero-padding", UniformRank(8)),
    ("fedit", UniformRank(8)),
    ("rbla", UniformRank(8)),
    ("replication", UniformRank(8)),
    ("zero-padding", ListRank([8, *[2] * 9])),  # clipped by their own mods at any rank
    ("zero-padding", ReportedRank(8, fallback=3)),
]


@pytest.mark.parametrize(
    ("wrapper", "rule", "ranks"),
    [
        (wrapper, rule, ranks)
        for wrapper in WRAPPERS
        for rule, ranks in RIGHT
        if wrapper in CLIENT_SIDE or not ranks.may_differ  # the server clips arrays of one shape
    ],
)
def test_the_noise_is_that_of_the_true_sensitivity(wrapper, rule, ranks):
    """Client 0 turns round, which moves the model by at most 2C/m; the noise has z·C/m."""
    z, m = 1.5, len(NODES)
    noisy, clean, turned = (
        flat(
            run(
                wrapper(make(aggregation=rule, ranks=ranks), noise, m),
                Clients(wrapper, moved=moved),
            )
        )
        for noise, moved in ((z, {}), (0.0, {}), (0.0, {0: -1.0}))
    )
    assert np.linalg.norm(clean - turned) == pytest.approx(2 * C / m, rel=1e-3)
    std = np.std(noisy - clean)
    expected = z * C / m
    if "adaptive" in wrapper.__name__:  # some of it is spent on the bound, which falls before
        expected = (z**-2 - 2.0**-2) ** -0.5 * C * np.exp(-0.2 * (1.0 - 0.5)) / m
    assert std == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("told", [True, None])
def test_clients_of_other_sizes_count_the_same(wrapper, told):
    """Where noise is announced; else the first round that had it is refused."""

    def count(index):
        return 400 if index == 0 else 10

    inner = make(noised_outside=told)
    if told is None and wrapper in SERVER_SIDE:
        with pytest.raises(ValueError, match=r"from 10 to 400, and one moves .* by 0\.82 of the"):
            run(wrapper(inner, 1.0, 10), Clients(wrapper, count=count))
        return
    noisy = [
        flat(run(wrapper(make(noised_outside=told), 1e-4, 10),
                 Clients(wrapper, count=count, moved=moved)))
        for moved in ({}, {0: -1.0})
    ]  # fmt: skip
    assert np.linalg.norm(noisy[0] - noisy[1]) == pytest.approx(2 * C / 10, rel=0.05)


# ----- where it is not -----------------------------------------------------------------------


NO_MEAN = sorted(
    set(AGGREGATIONS)
    - {"zero-padding", "fedit", "rbla", "replication", "ffa", "rolora", "fedsa"}
    - {"support"}
)


@pytest.mark.parametrize("wrapper", CLIENT_SIDE)
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        *(({"aggregation": rule}, f"'{rule}' is no mean of the updates") for rule in NO_MEAN),
        *(
            ({"aggregation": rule, "ranks": ranks}, f"'{rule}' averages a number over the clients")
            for rule in ("rbla", "replication", "fedsa", "support")
            for ranks in (ListRank([8, *[2] * 9]), ReportedRank(8))
        ),
        ({"sampling": IndependentSampling(0.5)}, r"use FractionSampling\(clients=m\)"),
        ({"wire_dtype": "int8"}, "wire_dtype='int8' an update travels as codes"),
        ({"wire_dtype": "bfloat16"}, "wire_dtype='bfloat16'"),
    ],
)  # fmt: skip
def test_too_little_noise_is_refused_before_anything_is_sent(wrapper, settings, match):
    clients = Clients(wrapper)
    with pytest.raises(ValueError, match=match) as caught:
        run(wrapper(make(**settings), 1.0, 10), clients)
    assert clients.trained == 0
    assert "at most 1/m of the bound" in str(caught.value)


@pytest.mark.parametrize("wrapper", SERVER_SIDE)
@pytest.mark.parametrize("rule", ["flexlora", "florist", "hetlora", "rb-lora", "raflora", "fslora"])
def test_noise_that_is_seen_only_afterwards_is_refused_in_the_first_round(wrapper, rule):
    clients = Clients(wrapper)
    with pytest.raises(ValueError, match=f"came back changed: .*(\n.*)*'{rule}' is no mean"):
        run(wrapper(make(aggregation=rule), 1.0, 10), clients, rounds=3)
    assert clients.trained == 10
    clients = Clients(wrapper)
    with pytest.raises(ValueError, match=f"'{rule}' is no mean"):
        run(wrapper(make(aggregation=rule, noised_outside=True), 1.0, 10), clients, rounds=3)
    assert clients.trained == 0


def test_a_promise_of_a_mean_is_not_inherited():
    class Last(FedIT):
        pass

    with pytest.raises(ValueError, match="'fedit' is no mean of the updates"):
        run(client_side(make(aggregation=Last()), 1.0, 10), Clients(client_side))


def test_a_device_of_less_rank_makes_ranks_differ():
    clients = Clients(client_side)
    clients.nodes.contexts[NODES[3]].node_config["max-rank"] = 2
    with pytest.raises(ValueError, match="'rbla' averages a number over the clients"):
        run(client_side(make(aggregation="rbla"), 1.0, 10), clients)
    assert clients.trained == 0
    result = run(client_side(make(), 1.0, 10), clients)
    assert len(flat(result)) == START.num_parameters


@pytest.mark.parametrize("wrapper", [client_side, server_side])
def test_where_a_reply_is_left_out_the_model_stays(wrapper):
    """Fewer than the wrapper counts on would share the noise."""

    class OneOff(Clients):
        def says(self, index):
            return {"lora-scale": 4.0} if index == 4 else {}

    inner = make(noised_outside=True)
    result = run(wrapper(inner, 1.0, 10), OneOff(wrapper))
    assert inner.round.accepted == 9
    assert not result.arrays  # nothing but the initial ones
    if wrapper is server_side:
        with pytest.raises(ValueError, match="1 of 10 replies were left out"):
            run(wrapper(make(), 1.0, 10), OneOff(wrapper))


# ----- and where nobody adds noise -----------------------------------------------------------


class Momentum(Around):
    """Changes the model, and adds no noise."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        return as_record({key: 0.9 * a.numpy() for key, a in arrays.items()}), metrics


def test_other_changes_are_let_through_if_said():
    settings = {"aggregation": "rbla", "ranks": ListRank([8, *[2] * 9])}
    with pytest.raises(ValueError, match="if it is no such noise, say noised_outside=False"):
        run(Momentum(make(**settings)), Clients())
    run(Momentum(make(**settings, noised_outside=False)), Clients(), rounds=2)


def test_a_loop_around_it_and_clipping_alone_are_nobodys_business():
    settings = {"aggregation": "rbla", "ranks": ListRank([8, *[2] * 9])}
    run(Around(make(**settings)), Clients(), rounds=2)
    grid = FakeGrid(NODES, Clients(client_side))
    config = ConfigRecord({"clipping_norm": C})
    initial = to_record(START.to_state_dict())
    make(**settings).start(grid, initial, num_rounds=2, timeout=5, train_config=config)


# ----- the wrappers of the old style ---------------------------------------------------------


def old(wrapper, *options, **settings):
    engine = FedLoRA(
        **{
            "client_api": "numpy", "ranks": UniformRank(4), "aggregation": "zero-padding",
            "scale": 2.0, "evaluate_fraction": 0, "query": False, **settings,
        }
    )  # fmt: skip
    strategy = LegacyFedLoRA(engine, random_adapter(4, seed=0).to_state_dict(), num_rounds=2)
    nodes = OldNodes()
    proxies = [Proxy(str(node), node, nodes) for node in OLD_NODES]
    serve_old_style(wrapper(strategy, 1.0, *options), proxies, 2)
    return engine


@pytest.mark.parametrize(
    ("wrapper", "options"),
    [(OldServerSide, (C, 3)), (OldServerSideAdaptive, (3, C, 0.5, 0.2, 5.0)),
     (OldClientSide, (C, 3))],
)  # fmt: skip
def test_the_old_style_is_seen_too(wrapper, options):
    with pytest.raises(ValueError, match="'flexlora' is no mean"):
        old(wrapper, *options, aggregation="flexlora")
    with pytest.raises(ValueError, match=r"num-examples, from 10 to 12"):
        old(wrapper, *options)
    assert old(wrapper, *options, noised_outside=True).progress.rounds == 2
    with pytest.raises(ValueError, match="'rbla' averages"):
        old(wrapper, *options, noised_outside=True, aggregation="rbla", ranks=ListRank([2, 4, 4]))


def test_the_fraction_may_be_fixed():
    inner = make(sampling=FractionSampling(clients=4))
    run(client_side(inner, 1.0, 4), Clients(client_side), rounds=2)
    assert inner.outside.expected
