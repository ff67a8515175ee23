"""Whose ledger a node gets, and that a ledger is added up and never reckoned anew."""

import json
import os
import stat

import numpy as np
import pytest

from strategies.clients import Client, Roster
from strategies.privacy import (
    Fixed,
    Gaussian,
    Poisson,
    Privacy,
    PrivacyAccountant,
    PrivateRun,
    epsilon,
    local_epsilon,
)
from strategies.privacy.ledger import write_ledger
from strategies.sampling import FractionSampling, IndependentSampling
from tests.fakes import FakeGrid, query_reply
from tests.strategies.test_participation import books, client
from tests.strategies.test_private_run import UNIFORM, run

dp_accounting = pytest.importorskip("dp_accounting")
DELTA = 1e-5


def from_scratch(releases):
    """ε by the package alone, every release composed anew."""
    accountant = dp_accounting.rdp.RdpAccountant(
        dp_orders := [1.5 + i / 2 for i in range(1, 9)]
        + list(range(6, 64)) + [64, 80, 96, 128, 192, 256, 512]
    )  # fmt: skip
    assert len(dp_orders) == 73
    for release in releases:
        event = dp_accounting.GaussianDpEvent(release.multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(release.rate, event))
    return accountant.get_epsilon(DELTA)


# ----- added up ------------------------------------------------------------------------


def test_what_is_added_up_equals_what_is_reckoned_from_scratch():
    rng = np.random.default_rng(3)
    accountant, made = PrivacyAccountant(2.0, DELTA), {i: [] for i in range(4)}
    for server_round in range(12):
        accountant.record(range(4))
        rates = {i: float(rng.uniform(0.05, 0.6)) for i in range(4)}
        weights = {i: float(rng.uniform(0.5, 3)) for i in range(4)}
        accountant.record_poisson(rates, weights, 20.0)
        for i in range(4):
            made[i].append(Poisson(20.0 / weights[i], rates[i]))
        if server_round == 5:  # and through a file
            state = json.loads(json.dumps(accountant.state_dict()))
            accountant = PrivacyAccountant(2.0, DELTA)
            accountant.load_state_dict(state)
    expected = {i: from_scratch(releases) for i, releases in made.items()}
    for i, value in expected.items():
        assert accountant.central_epsilon(i) == pytest.approx(value, rel=1e-12)
        assert epsilon(dict.fromkeys(made[i], 1), DELTA) == pytest.approx(value, rel=1e-12)
    assert accountant.central_epsilon() == pytest.approx(max(expected.values()), rel=1e-12)
    assert accountant.central_epsilon() < accountant.local_epsilon()


def test_a_round_is_reckoned_once_however_long_the_run(monkeypatch):
    """Clients whose weights drift with the replies that were lost."""
    composed = []
    kind = dp_accounting.rdp.RdpAccountant
    whole = kind.compose
    monkeypatch.setattr(kind, "compose", lambda *args: composed.append(1) or whole(*args))
    accountant = PrivacyAccountant(2.0, DELTA)
    sizes = []
    for server_round in range(6):
        before = len(composed)
        weights = {i: 1 + i / 7 + server_round / 11 for i in range(8)}
        accountant.record(range(8))
        accountant.record_poisson(dict.fromkeys(weights, 0.3), weights, 33.0)
        assert accountant.central_epsilon() > 0
        assert len(composed) - before <= 8
        sizes.append(len(json.dumps(accountant.state_dict())))
    assert max(sizes) < 1.05 * sizes[0]


def test_rounds_of_both_kinds_of_neighbours_count_as_if_nothing_hid_anybody():
    accountant = PrivacyAccountant(4.0, DELTA)
    for _ in range(3):
        accountant.record([0])
        accountant.record_fixed(10, 1, 1, summed=True, amplified=True)
    assert accountant.central_epsilon() < accountant.local_epsilon()
    accountant.record_poisson({0: 0.1}, {0: 1.0}, 8.0)
    assert accountant.central_epsilon() == accountant.local_epsilon() > 0


def test_an_older_ledger_is_read_and_believes_nobody_to_be_named():
    listed = [["Poisson", 4.0, 0.2, 3], ["Poisson", 5.0, 0.2, 1]]
    older = {"asked": {"0": [["Gaussian", 2.0, 4]]}, "shared": [], "own": {"0": listed, "1": []}}
    accountant = PrivacyAccountant(4.0, DELTA)
    accountant.load_state_dict(older)
    expected = epsilon({Poisson(4.0, 0.2): 3, Poisson(5.0, 0.2): 1}, DELTA)
    assert accountant.central_epsilon() == pytest.approx(expected, rel=1e-12)
    assert accountant.meet([Client(7, 0), Client(8, 5)]) == [5]
    assert accountant.local_epsilon(5) == local_epsilon(4.0, DELTA, 4)


def test_a_ledger_is_on_disk_with_its_name(tmp_path, monkeypatch):
    """The file before it takes its name, and the folder after it did."""
    synced = []

    def sync(descriptor):
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "l.json").exists()))

    monkeypatch.setattr("strategies.files.os.fsync", sync)
    write_ledger(tmp_path / "l.json", PrivacyAccountant(1.0, DELTA), open_round=False)
    assert synced == [(False, False), (True, True)]


# ----- whose it is ---------------------------------------------------------------------


class Sites:
    """Sites that come, go and come back under ids of which only this class knows the owner."""

    def __init__(self, rng, names):
        self.rng = rng
        self.names = names  # how often each site's answer to who it is arrives
        self.ids = {site: self._new() for site in range(len(names))}
        self.away = set()
        self.old = {site: [] for site in range(len(names))}
        self.listed = {}  # ids of dead processes that are still listed, for so many rounds

    def _new(self):
        return int(self.rng.integers(1, 2**62))

    def move(self):
        for site in self.ids:
            fate = self.rng.random()
            if fate < 0.25:  # restarted, or cut off
                self.old[site].append(self.ids[site])
                self.listed[self.ids[site]] = int(self.rng.integers(0, 3))
                self.ids[site] = self._new()
            elif fate < 0.3 and self.old[site]:  # back with a key it had
                self.ids[site] = self.old[site].pop(int(self.rng.integers(len(self.old[site]))))
                self.listed.pop(self.ids[site], None)
            if self.rng.random() < 0.3:
                self.away ^= {site}
        self.listed = {n: left - 1 for n, left in self.listed.items() if left > 0}

    def here(self):
        return {self.ids[site]: site for site in self.ids if site not in self.away}

    def says(self, node_id, owners):
        site = owners.get(node_id)
        named = site is not None and self.rng.random() < self.names[site]
        return {"partition-id": site} if named else {}


NAMES = {
    "nobody": [0, 0, 0, 0, 0],
    "some": [1, 1, 0, 0, 1],
    "answers are lost": [0.5, 0.7, 0, 1, 0.3],
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("coins", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_history_of_ids_hides_what_a_site_gave_away(tmp_path, names, coins, seed):
    rng = np.random.default_rng([seed, len(names)])
    sites, roster, saved = Sites(rng, NAMES[names]), Roster(), None
    ledger = tmp_path / "privacy.json"
    privacy = PrivateRun(Privacy(1.0, 4.0), DELTA, ledger)
    asked = dict.fromkeys(sites.ids, 0)
    told = {site: {} for site in sites.ids}  # how often each was in which release
    for server_round in range(14):
        if server_round:
            sites.move()
        if server_round == 3:
            saved = json.dumps(roster.state_dict())
        if server_round == 8:  # the server is killed, and goes on from the checkpoint of round 3
            roster = Roster()
            roster.load_state_dict(json.loads(saved))
            privacy = PrivateRun(Privacy(1.0, 4.0), DELTA, ledger)
            if seed % 2:  # in a simulation all ids are new then
                sites.ids = {site: sites._new() for site in sites.ids}
                sites.listed = {}
        owners = sites.here()
        listed = [*owners, *sites.listed]
        new = roster.unknown(listed)
        roster.join({n: sites.says(n, owners) for n in new}, present=listed)
        clients = roster.present(listed)
        chosen = [c for c in clients if rng.random() < 0.6]
        weights = {c.index: float(rng.choice([0.5, 1.0, 2.0])) for c in clients} if coins else {}
        chances = dict.fromkeys(weights, 0.4)
        privacy.begin(clients, chosen, weights, chances, equal_ranks=True)
        for c in chosen:
            if c.node_id in owners:
                asked[owners[c.node_id]] += 1
        if coins:
            privacy.accountant.record_poisson(chances, weights, 8.0)
            privacy._save(open_round=False)
        for c in clients:
            if c.node_id not in owners:
                continue
            site = owners[c.node_id]
            true = local_epsilon(4.0, DELTA, asked[site])
            assert privacy.accountant.local_epsilon(c.index) >= true * (1 - 1e-12)
            if coins:
                release = Poisson(8.0 / weights[c.index], 0.4)
                told[site][release] = told[site].get(release, 0) + 1
                least = min(epsilon(told[site], DELTA), true)
                assert privacy.accountant.central_epsilon(c.index) >= least * (1 - 1e-9)
        assert privacy.spent()["epsilon_local"] >= local_epsilon(4.0, DELTA, max(asked.values()))
    if names == "nobody" or coins:
        return
    # And it is not pessimistic where nobody was in doubt: the ones with a name alone.
    apart = PrivateRun(Privacy(1.0, 4.0), DELTA)
    apart.begin([Client(1, 0), Client(2, 1)], [Client(1, 0)], {}, {}, equal_ranks=True)
    apart.begin([Client(3, 1), Client(4, 2)], [Client(3, 1)], {}, {}, equal_ranks=True)
    assert apart.accountant.local_epsilon(2) == 0
    assert apart.spent()["epsilon_local"] == local_epsilon(4.0, DELTA, 1)


def nameless(message):
    if message.metadata.message_type == "query":
        return query_reply()
    return client(message, partition=dict.fromkeys([message.metadata.dst_node_id], 0))


class Restless(FakeGrid):
    """All nodes come back under new ids each round, the old ones being listed once more."""

    def __init__(self, sites):
        super().__init__(range(sites), nameless)
        self.sites, self.looks = sites, 0

    def get_node_ids(self):
        self.looks += 1
        first = 10 * self.looks
        self.nodes = list(range(first, first + self.sites))
        old = range(first - 10, first - 10 + self.sites) if self.looks > 1 else ()
        return [*old, *self.nodes]


def test_a_run_whose_nodes_come_back_under_new_ids_says_so_and_counts_all(caplog):
    privacy = PrivateRun(Privacy(1.0, 4.0), DELTA)
    _, records, _ = run(grid=Restless(3), rounds=10, privacy=privacy, **UNIFORM)
    assert books(records)[-1]["epsilon_local"] >= local_epsilon(4.0, DELTA, 10)
    assert "may have trained before under another node id" in caplog.text
    assert "partition-id in its node config" in caplog.text


@pytest.mark.parametrize(
    "sampling", [FractionSampling(0.5), IndependentSampling(0.5, estimator="unbiased")]
)
def test_nodes_that_stay_are_told_apart_with_a_name_or_without(caplog, sampling):
    """Whoever stays is himself: exact, and not a word of doubt."""
    grid = FakeGrid([5, 9, 2, 7], nameless)
    privacy = PrivateRun(Privacy(1.0, 4.0), DELTA)
    run(grid=grid, rounds=8, privacy=privacy, sampling=sampling, **UNIFORM)
    asked = dict.fromkeys(grid.nodes, 0)
    for message in grid.sent:
        if message.metadata.message_type == "train":
            asked[message.metadata.dst_node_id] += 1
    expected = local_epsilon(4.0, DELTA, max(asked.values()))
    assert privacy.spent()["epsilon_local"] == pytest.approx(expected, rel=1e-12)
    assert "may have trained before" not in caplog.text


def test_the_worst_without_sampling_is_the_one_with_most_information():
    """Also over noises that changed: fewer rounds with less noise may be more."""
    accountant = PrivacyAccountant(8.0, DELTA)
    for _ in range(5):
        accountant.record([0])
    accountant.noise_multiplier = 2.0
    accountant.record([1])
    assert accountant.local_epsilon(1) == local_epsilon(2.0, DELTA, 1)
    assert accountant.local_epsilon() == max(map(accountant.local_epsilon, (0, 1)))
    accountant.meet([Client(1, 0, named=False), Client(2, 1, named=False)])
    assert accountant.meet([Client(3, 2, named=False)]) == [2]
    assert accountant.local_epsilon(2) == accountant.local_epsilon()
    accountant.record([2])
    both = epsilon({Gaussian(1.0): 2}, DELTA)
    assert accountant.local_epsilon() == both
    assert Fixed(1.0, 3, 1) != Gaussian(1.0)
