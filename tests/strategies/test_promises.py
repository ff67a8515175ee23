"""What a class promises counts for that class alone, and nothing is taken for promised."""

import pytest
from flwr.app import ConfigRecord

from strategies import FedLoRA
from strategies.aggregation import (
    AGGREGATIONS,
    RBLA,
    FedIT,
    FlexLoRA,
    Population,
    ZeroPadding,
    make_aggregator,
)
from strategies.messages import to_record
from strategies.privacy import Privacy, PrivateRun, refuse_amplification
from strategies.promises import declares, those_that_declare
from strategies.ranks import RankPolicy, UniformRank
from strategies.sampling import (
    SAMPLERS,
    BernoulliSampling,
    FractionSampling,
    IndependentSampling,
    make_sampler,
)
from tests.fakes import FakeGrid, random_adapter
from tests.strategies.test_participation import NODES, client, run

LINEAR = {"fedit", "zero-padding", "rbla", "replication", "ffa", "rolora", "fedsa", "support"}
SYMMETRIC = LINEAR | {"hetlora", "flexlora", "florist", "rb-lora", "raflora", "fedex", "fedsvd"}
SYMMETRIC |= {"fedmomentum"}
PROMISES = {
    "unbiased": AGGREGATIONS.keys() - {"hetlora"},
    "linear": LINEAR,
    "symmetric": SYMMETRIC,
    "entrywise": LINEAR | {"hetlora", "fslora", "fold"},
    "mean_of_all": {"fedit", "zero-padding", "ffa", "rolora"},
    "keeps_start": {"fedit", "rbla", "replication"},
}


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_what_the_rules_here_promise(name):
    rule = make_aggregator(name)
    assert {p for p in PROMISES if declares(rule, p)} == {
        p for p, names in PROMISES.items() if name in names
    }


def test_what_the_samplers_here_promise():
    assert those_that_declare(SAMPLERS, "blind") == "fraction, independent"
    assert those_that_declare(SAMPLERS, "clock_blind") == (
        "fraction, independent, statistical, weighted"
    )


def test_nothing_but_true_in_the_class_itself_is_a_promise():
    class Base:
        linear = True

    class Derived(Base):
        pass

    class Again(Base):
        linear = True

    class Withdrawn(Base):
        linear = False

    class Computed:
        @property
        def linear(self):
            return True

    late = Derived()
    late.linear = True
    assert [declares(cls, "linear") for cls in (Base, Derived, Again, Withdrawn, Computed)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert [declares(x, "linear") for x in (Base(), Again(), late, Computed())] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not declares(lambda: None, "linear")
    assert not declares(Base, "blind")


class LastOne(FedIT):
    """Called fedit, and yet the last client's adapter is the result."""

    def add_pairs(self, state, update, weight):
        state.sums.clear()
        super().add_pairs(state, update, weight)


class Renamed(ZeroPadding):
    """The same as its base, which it says again."""

    name = "renamed"
    unbiased = linear = symmetric = True


class OwnDraw(FractionSampling):
    """Called fraction, and yet it takes who has most rows."""

    def sample(self, clients, server_round, rng):
        return sorted(clients, key=lambda c: -(c.num_examples or 0))[:2]


class OwnCoins(IndependentSampling):
    """Called independent, with chances that follow the data."""

    def prepare(self, outlook):
        self._q = {c.index: float(a) for c, a in zip(outlook.clients, outlook.weights, strict=True)}


def weakened(rule, sampler, **claims):
    return refuse_amplification(rule, UniformRank(4), sampler, secret_draws=True, **claims)


def test_a_name_that_is_inherited_amplifies_nothing():
    assert weakened(FedIT(), FractionSampling(0.5)) == []
    assert weakened(Renamed(), FractionSampling(0.5)) == []
    (problem,) = weakened(LastOne(), FractionSampling(0.5))
    assert "single updates" in problem
    for sampler in (OwnDraw(0.5), OwnCoins(0.2, estimator="unbiased")):
        (problem,) = weakened(FedIT(), sampler, topped_up=True)
        assert "data decide who joins" in problem
    coins = IndependentSampling(0.2, estimator="unbiased")
    assert weakened(Renamed(), coins, topped_up=True) == []
    problems = weakened(LastOne(), coins, topped_up=True)
    assert "fedit, fedsa, ffa, rbla, replication, rolora, support, zero-padding" in problems[-1]


@pytest.mark.parametrize("rule", [LastOne(), FlexLoRA()])
def test_a_private_run_counts_no_more_than_was_promised(rule):
    """What is not declared linear or symmetric has an ε that hides nobody among others."""
    spent = []
    for aggregation in (FedIT(), rule):
        private = PrivateRun(Privacy(clip=0.5, noise_multiplier=2.0), 1e-5)
        run(ranks=UniformRank(4), aggregation=aggregation, sampling=FractionSampling(0.5),
            privacy=private)  # fmt: skip
        spent.append(private.spent())
    assert spent[0]["epsilon_local"] == spent[1]["epsilon_local"]
    assert spent[0]["epsilon_central"] < spent[1]["epsilon_central"]


class Turned(RBLA):
    """Derived to change a detail; nobody has looked at what coins do to it."""

    name = "turned"


@pytest.mark.parametrize("sampler", ["independent", "weighted", "statistical", "planned"])
def test_coins_are_refused_before_anything_is_sent(sampler):
    options = {"alpha": 1.0, "beta": 1.0} if sampler == "planned" else {}
    own, other = (
        FedLoRA(
            aggregation=Turned(), ranks=UniformRank(4), sampling=make_sampler(sampler, **options)
        )
        for _ in range(2)
    )
    grid = FakeGrid(NODES, client)
    arrays = to_record(random_adapter(4, seed=0).to_state_dict())
    with pytest.raises(ValueError, match=rf"'turned' .* '{sampler}': Turned does not declare"):
        own.start(grid, arrays, num_rounds=1)
    with pytest.raises(ValueError, match="Turned does not declare"):  # by another's loop
        list(other.configure_train(1, arrays, ConfigRecord(), grid))
    assert not grid.sent


def test_coins_are_refused_where_a_rule_is_used_alone():
    current, update = random_adapter(4, seed=0), random_adapter(4, seed=1)
    with pytest.raises(ValueError, match="turned with a population: Turned does not declare"):
        Turned().aggregate(current, [(update, 1.0)], Population({4: 1.0}))
    assert Turned().aggregate(current, [(update, 1.0)]).adapter.rank == 4
    assert Renamed().aggregate(current, [(update, 0.5)], Population({4: 1.0})).adapter.rank == 4


def test_a_reason_of_its_own_comes_before_the_general_one():
    class Quick(ZeroPadding):
        name = "quick"
        unbiased = True
        sampling_refusal = "it is in a hurry"

    assert Quick().refuse_coins() == "it is in a hurry"
    assert "norms of their updates" in make_aggregator("hetlora").refuse_coins()
    quality = make_aggregator("replication", holder_weights="quality")
    assert "quality of clients that were not drawn" in quality.refuse_coins()


def test_a_base_without_a_name_promises_nothing():
    assert not declares(BernoulliSampling, "blind")
    assert not declares(BernoulliSampling, "clock_blind")


def test_numbers_that_a_judge_asks_of_clients_as_well_are_not_overlooked():
    """A policy that judges on the server and yet asks clients for a number on their rows."""
    from strategies.privacy import refuse_private

    class Both(UniformRank):
        name = "both"
        metrics = ("own-loss",)
        score_fn = staticmethod(lambda adapter: 0.0)
        judges = True

    assert issubclass(Both, RankPolicy)
    (problem,) = refuse_private(FedIT(), Both(4), FractionSampling(), evaluate_fraction=0)
    assert "asks clients for own-loss" in problem
