"""What a private run counts, adds and keeps, whatever happens to it."""

import pytest
import torch

from strategies.checkpoint import Checkpoints
from strategies.privacy import Privacy, PrivateRun, local_epsilon
from strategies.ranks import UniformRank
from strategies.sampling import FractionSampling, IndependentSampling
from strategies.saving import Saver
from tests.fakes import FakeGrid, query_reply, random_adapter
from tests.strategies.test_participation import NODES, PARTITION, books, client
from tests.strategies.test_participation import run as run_any

DELTA = 1e-5
UNIFORM = {"ranks": UniformRank(4), "aggregation": "fedit"}


def private(z=1.0, ledger=None):
    return PrivateRun(Privacy(clip=0.5, noise_multiplier=z), DELTA, ledger)


def run(**options):
    return run_any(**{**UNIFORM, "sampling": FractionSampling(1.0), **options})


class KilledError(BaseException):
    """What no handler of the program catches, as a kill is not caught."""


def saver(folder, resume=""):
    return Saver(Checkpoints(folder, every=5), resume_from=resume, fingerprint={}, patience=0)


def test_rounds_that_are_repeated_are_counted_twice(tmp_path):
    """Killed in round 9 after the clients were asked, with a checkpoint of round 5."""
    asked = []

    def until_killed(message):
        if message.metadata.message_type == "train":
            asked.append(message.metadata.dst_node_id)
            if len(asked) == 9 * len(NODES):
                raise KilledError
        return client(message)

    ledger = tmp_path / "privacy.json"
    first = saver(tmp_path / "c")
    with pytest.raises(KilledError):
        run(rounds=10, handler=until_killed, saver=first, privacy=private(ledger=ledger))
    first.checkpoints.close()
    resumed = saver(tmp_path / "c", "latest")
    assert resumed.round == 5
    _, records, _ = run(rounds=10, saver=resumed, privacy=private(ledger=ledger))
    last = books(records)[-1]
    assert last["round"] == 10
    assert last["epsilon_local"] == local_epsilon(1.0, DELTA, 9 + 5)
    # Of the round that was cut off nobody knows what got out: it counts as if nothing hid it.
    uncut = private()
    run(rounds=13, privacy=uncut)
    assert last["epsilon_central"] > uncut.spent()["epsilon_central"]


def test_a_ledger_that_cannot_be_read_stops_the_run(tmp_path):
    ledger = tmp_path / "privacy.json"
    for text in ("", "[]", '{"format": 9}', '{"format": 1, "spent": {}, "open_round": false}'):
        ledger.write_text(text)
        with pytest.raises(ValueError, match="expected the ledger of a private run"):
            private(ledger=ledger)


def test_a_ledger_that_cannot_be_written_is_said(tmp_path, caplog):
    caplog.set_level("WARNING", logger="flwr")
    _, records, _ = run(privacy=private(ledger=tmp_path / "no folder" / "privacy.json"))
    assert "would count too little" in caplog.text
    assert books(records)[0]["epsilon_local"] == local_epsilon(1.0, DELTA, 1)


def test_what_was_spent_keeps_its_noise():
    before = private(z=1.0)
    run(rounds=20, privacy=before)
    after = private(z=16.0)
    after.load_state_dict(before.state_dict())
    assert after.spent()["epsilon_local"] == local_epsilon(1.0, DELTA, 20)
    run(rounds=1, privacy=after)
    assert after.spent()["epsilon_local"] > local_epsilon(1.0, DELTA, 20)


@pytest.mark.parametrize("then", [None, 1.0])
def test_a_run_is_resumed_as_private_as_it_was(then, tmp_path):
    first = saver(tmp_path)
    run(rounds=5, saver=first, privacy=None if then else private())
    first.checkpoints.close()
    with pytest.raises(ValueError, match=r"do not both have privacy; resume\s+with"):
        run(rounds=6, saver=saver(tmp_path, "latest"), privacy=private(then) if then else None)


def limited(message):
    """All but one client have a device for rank 2 only."""
    if message.metadata.message_type == "query":
        index = PARTITION[message.metadata.dst_node_id]
        return query_reply(**{"partition-id": index, "max-rank": 4 if index == 0 else 2})
    return client(message)


@pytest.mark.parametrize(
    "sampling", [FractionSampling(0.5), IndependentSampling(0.5, estimator="unbiased")]
)
def test_ranks_that_differ_by_device_hide_nobody(sampling):
    rule = {"aggregation": "zero-padding", "sampling": sampling, "rounds": 4}
    equal, differ = private(), private()
    run(**rule, privacy=equal)
    run(**rule, privacy=differ, handler=limited)
    spent = differ.spent()
    assert spent["epsilon_central"] == spent["epsilon_local"]
    assert equal.spent()["epsilon_central"] < equal.spent()["epsilon_local"]


@pytest.mark.parametrize(("rule", "kept"), [("ffa", "A"), ("fedsa", "B"), ("fedit", "")])
def test_the_servers_noise_is_for_what_clients_sent(rule, kept):
    coins = IndependentSampling(0.3, estimator="unbiased")
    begun = random_adapter(4, seed=0)
    model, _, _ = run(aggregation=rule, sampling=coins, privacy=private(), handler=silent)
    for module, pair in begun.pairs.items():
        for factor in "AB":
            one, other = getattr(pair, factor), getattr(model.pairs[module], factor)
            assert torch.equal(one, other) is (factor in kept), (module, factor)


def silent(message):
    """Nobody answers, so that what changes in the model is the server's noise."""
    return client(message) if message.metadata.message_type == "query" else None


def test_weights_do_not_come_from_what_nodes_say_of_their_data():
    """The handler of these tests reports numbers of rows, and they differ."""
    q = 0.5
    told = private()
    run(
        sampling=IndependentSampling(q, estimator="unbiased"),
        privacy=told,
        grid=FakeGrid(NODES, client),
    )
    assert set(told._weights.values()) == {1 / len(NODES) / q}
