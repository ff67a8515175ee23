"""Medians, trimmed means, norm filter and Krum: by their definitions, and against liars."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from strategies import FedLoRA
from strategies.aggregation import (
    AGGREGATIONS,
    ROBUST,
    Download,
    Krum,
    Median,
    NormFilter,
    TrimmedMean,
    Update,
    make_aggregator,
)
from strategies.lora import Adapter, LoraPair
from strategies.messages import to_record
from strategies.privacy import Privacy, PrivateRun
from strategies.promises import declares
from strategies.ranks import UniformRank
from strategies.sampling import IndependentSampling
from tests.fakes import FakeGrid, random_adapter, same
from tests.strategies.test_participation import NODES, client, run

RANKS = [2, 5, 3, 2, 5, 5, 4]
ENTRYWISE = sorted(name for name, cls in AGGREGATIONS.items() if declares(cls, "entrywise"))
KEEPS_B = {"fedsa"}


def protected(name, robust, server_round=3):
    rule = make_aggregator(name)
    rule.server_round = server_round
    rule.protect(robust)
    return rule


def updates(ranks=RANKS, *, seed=10):
    return [(random_adapter(r, seed=seed + k), 1.0 + k) for k, r in enumerate(ranks)]


def centre(values, robust):
    """Sorted, both ends cut off, and the mean of the rest; float64."""
    x = np.sort(np.stack([v.double().numpy() for v in values]), axis=0)
    if robust.name == "median":
        return np.median(x, axis=0)
    cut = min(int(np.ceil(robust.liars * len(x) - 1e-9)), (len(x) - 1) // 2)
    return x[cut : len(x) - cut].mean(axis=0)


# ----- by entry


@pytest.mark.parametrize("robust", [Median(), TrimmedMean(), TrimmedMean(liars=0.4)])
@pytest.mark.parametrize("name", ["rbla", "replication", "zero-padding", "support"])
def test_an_entry_is_the_centre_of_its_holders(name, robust):
    current, given = random_adapter(6, seed=1), updates()
    result = protected(name, robust).aggregate(current, given).adapter
    for module, j in itertools.product(current.pairs, range(6)):
        have = [a.pairs[module] for a, _ in given if a.ranks[module] > j]
        power = {"zero-padding": 1.0, "support": 0.5}.get(name, 0.0)
        share = (len(have) / len(given)) ** power  # everybody counts the same
        new, old = result.pairs[module], current.pairs[module]
        wanted_A, wanted_B = old.A[j].double().numpy(), old.B[:, j].double().numpy()
        if have:
            wanted_A = share * centre([p.A[j] for p in have], robust)
            wanted_B = share * centre([p.B[:, j] for p in have], robust)
        elif name == "zero-padding":
            wanted_A, wanted_B = 0 * wanted_A, 0 * wanted_B
        np.testing.assert_allclose(new.A[j], wanted_A, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.B[:, j], wanted_B, rtol=1e-5, atol=1e-6)
    for key in current.dense:
        wanted = centre([a.dense[key] for a, _ in given], robust)
        np.testing.assert_allclose(result.dense[key], wanted, rtol=1e-5, atol=1e-6)


def test_a_drawn_term_is_the_median_of_who_trained_it():
    rule, current, given = protected("fold", "median"), random_adapter(6, seed=1), []
    for k, rank in enumerate(RANKS):
        sent = rule.download(current, rank, np.random.default_rng([7, k]))
        moved = {m: LoraPair(p.A + k**2, p.B - k, p.scale) for m, p in sent.adapter.pairs.items()}
        given.append(Update(Adapter(moved, current.dense), 1.0 + k, sent=sent))
    result = rule.aggregate(current, given).adapter
    for module, j in itertools.product(current.pairs, range(6)):
        terms = [
            u.adapter.pairs[module].A[list(u.sent.entries[module]).index(j)]
            for u in given
            if j in u.sent.entries[module]
        ]
        wanted = centre(terms, Median()) if terms else current.pairs[module].A[j].numpy()
        np.testing.assert_allclose(result.pairs[module].A[j], wanted, rtol=1e-5, atol=1e-6)


def test_more_numbers_than_are_sorted_at_a_time_and_kernels():
    shapes = (5, 300, 7, 3), (9, 5, 1, 1)
    rng = np.random.default_rng(0)
    pairs = [
        LoraPair(*(torch.from_numpy(rng.normal(size=s)).float() for s in shapes), 1.0)
        for _ in range(6)
    ]
    given = [(Adapter({"conv": p.with_rank(5 - k % 2)}), 1.0) for k, p in enumerate(pairs)]
    new = protected("rbla", "median").aggregate(Adapter({"conv": pairs[0]}), given).adapter
    whole = np.stack([p.A.numpy() for p in pairs])
    np.testing.assert_allclose(new.pairs["conv"].A[:4], np.median(whole, axis=0)[:4], atol=1e-6)
    np.testing.assert_allclose(new.pairs["conv"].A[4], np.median(whole[::2, 4], axis=0), atol=1e-6)


@pytest.mark.parametrize("holders", range(1, 9))
@pytest.mark.parametrize("robust", [Median(), TrimmedMean()])
def test_an_entry_bears_so_many_liars_and_no_more(holders, robust):
    truth = random_adapter(3, seed=1)
    lie = Adapter({m: LoraPair(p.A + 1e6, p.B - 1e6, p.scale) for m, p in truth.pairs.items()})
    for liars, borne in ((robust.cut(holders), True), (robust.cut(holders) + 1, False)):
        if liars > holders:
            continue
        given = [(lie if k < liars else Adapter(truth.pairs), 1.0) for k in range(holders)]
        found = protected("rbla", robust).aggregate(Adapter(truth.pairs), given).adapter
        far = max(float((found.pairs[m].A - p.A).abs().max()) for m, p in truth.pairs.items())
        assert (far < 1e-5) is borne
    assert Median().cut(holders) == (holders - 1) // 2


@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("robust", ["median", "trimmed-mean"])
def test_clients_that_agree_give_what_the_rule_gives(name, robust):
    current = random_adapter(4, seed=1)
    given = [(random_adapter(4, seed=2), 1.0)] * 5
    plain = make_aggregator(name)
    plain.server_round = 3
    one, two = (r.aggregate(current, given).adapter for r in (plain, protected(name, robust)))
    for key, tensor in one.to_state_dict().items():
        torch.testing.assert_close(two.to_state_dict()[key], tensor, rtol=1e-5, atol=1e-6)


def test_the_order_of_replies_and_how_much_they_claim_to_count_change_nothing():
    current, given = random_adapter(5, seed=1), updates()
    first = protected("rbla", "median").aggregate(current, given).adapter
    turned = [(a, 1e6 * w) for a, w in given[::-1]]
    assert same(protected("rbla", "median").aggregate(current, turned).adapter, first)


def test_an_update_may_change_after_it_was_added():
    rule, current, given = protected("rbla", "median"), random_adapter(5, seed=1), updates()
    wanted = protected("rbla", "median").aggregate(current, given).adapter
    state = rule.init(current)
    for adapter, weight in updates():
        rule.add(state, Update(adapter, weight))
        for tensor in adapter.tensors():
            tensor.zero_()
    assert same(rule.finish(state).adapter, wanted)


# ----- by client


def dense_changes(current, given):
    """What each client changes, as one long vector of the whole model."""
    rows = []
    for adapter, _ in given:
        parts = [
            p.delta() - current.pairs[m].with_rank(p.rank).delta() for m, p in adapter.pairs.items()
        ]
        parts += [adapter.dense[key] - old for key, old in current.dense.items()]
        rows.append(np.concatenate([part.double().numpy().ravel() for part in parts]))
    return np.stack(rows)


def test_the_norm_filter_leaves_out_whose_change_is_far_above_the_median():
    current, given = random_adapter(5, seed=1), updates()
    norms = np.linalg.norm(dense_changes(current, given), axis=1)
    factor = 1.05
    result = protected("rbla", NormFilter(factor=factor)).aggregate(current, given)
    assert list(result.left_out) == list(np.flatnonzero(norms > factor * np.median(norms)))
    assert 0 < len(result.left_out) < len(given)
    rest = [(a, 1.0) for k, (a, _) in enumerate(given) if k not in result.left_out]
    plain = make_aggregator("rbla").aggregate(current, rest).adapter
    assert same(result.adapter, plain)


@pytest.mark.parametrize("liars", [0.1, 0.25])
@pytest.mark.parametrize("shapes", [None, {"m": (4, 3)}])  # the second is formed, the first not
def test_krum_keeps_who_has_most_others_near(liars, shapes):
    current = random_adapter(5, seed=1, shapes=shapes)
    ranks = [*RANKS, 4, 1]
    given = [(random_adapter(r, seed=30 + k, shapes=shapes), 1.0) for k, r in enumerate(ranks)]
    x, count = dense_changes(current, given), len(given)
    f = min(int(np.ceil(liars * count)), (count - 3) // 2)
    scores = []
    for i in range(count):
        others = sorted(float(((x[i] - x[k]) ** 2).sum()) for k in range(count) if k != i)
        scores.append(sum(others[: count - f - 2]))
    wanted = sorted(np.argsort(scores)[count - f :])
    result = protected("flexlora", Krum(liars=liars)).aggregate(current, given)
    assert list(result.left_out) == wanted


def test_krum_of_fewer_than_five_leaves_nobody_out():
    current = random_adapter(5, seed=1)
    for count in (1, 2, 3, 4):
        given = updates([3] * count)
        result = protected("rbla", "krum").aggregate(current, given)
        assert list(result.left_out) == []


# ----- liars

SHAPES = {"q": (10, 8), "v": (8, 12)}
SPREAD = 0.05  # of the honest clients


def noise(pair, rng):
    return LoraPair(
        pair.A + 20 * torch.randn(pair.A.shape, generator=rng),
        pair.B + 20 * torch.randn(pair.B.shape, generator=rng),
        pair.scale,
    )


def attacked(attack, ranks, current, liars, *, drawn=False):
    """Updates of which some are lies; the honest ones move alike."""
    rng = torch.Generator().manual_seed(5)
    step = random_adapter(max(ranks), seed=77, shapes=SHAPES)
    given = []
    for k, rank in enumerate(ranks):
        pairs = {}
        for module, pair in current.with_rank(dict.fromkeys(SHAPES, rank)).pairs.items():
            way = step.pairs[module].with_rank(rank)
            dA = 0.2 * way.A + SPREAD * torch.randn(way.A.shape, generator=rng)
            dB = 0.2 * way.B + SPREAD * torch.randn(way.B.shape, generator=rng)
            times = {"flip": -1.0, "scaled": 50.0}.get(attack, 1.0) if k in liars else 1.0
            pairs[module] = LoraPair(pair.A + times * dA, pair.B + times * dB, pair.scale)
            if k in liars and attack == "noise":
                pairs[module] = noise(pairs[module], rng)
        leading = {module: torch.arange(rank) for module in SHAPES} if drawn else None
        sent = Download(current.with_rank(dict.fromkeys(SHAPES, rank)), leading)
        given.append(Update(Adapter(pairs), 1.0, sent=sent))
    return given


def start():
    return Adapter(random_adapter(6, seed=4, shapes=SHAPES).pairs)


def product(name, result, current):
    """The model: what is merged and what is not; for a rule that keeps B, the shared A."""
    parts = {}
    for module, pair in result.adapter.pairs.items():
        delta = pair.A if name in KEEPS_B else pair.delta()
        if name not in KEEPS_B and result.base_delta and module in result.base_delta.pairs:
            delta = delta + result.base_delta.pairs[module].delta()
        parts[module] = delta
    return torch.cat([p.flatten() for p in parts.values()])


CASES = [
    (name, robust, attack)
    for name, robust, attack in itertools.product(
        sorted(AGGREGATIONS), ROBUST, ["noise", "flip", "scaled"]
    )
    if (name in ENTRYWISE if ROBUST[robust].by_entry else name not in KEEPS_B)
    and (robust, attack) != ("norm-filter", "flip")
]


@pytest.mark.parametrize(("name", "robust", "attack"), CASES)
def test_one_liar_in_five_does_less_than_it_would(name, robust, attack):
    equal = name == "fedit"
    ranks = [6] * 10 if equal else [2, 4, 6] * 5
    liars = {3, 8} if equal else {0, 4, 8}  # one of each rank
    current = start()
    drawn = name in ("fold", "fslora")
    truthful = attacked("none", ranks, current, (), drawn=drawn)
    honest = [update for k, update in enumerate(truthful) if k not in liars]
    given = attacked(attack, ranks, current, liars, drawn=drawn)
    plain = make_aggregator(name)
    plain.server_round = 3
    truth = product(name, plain.aggregate(current, honest), current)
    lied = product(name, plain.aggregate(current, given), current)
    result = protected(name, robust).aggregate(current, given)
    found = product(name, result, current)
    hurt, left = float((lied - truth).norm()), float((found - truth).norm())
    assert left < 0.5 * hurt
    if not ROBUST[robust].by_entry:
        # Krum, which takes out so many in any case, took out the liars.
        assert liars <= set(result.left_out)


# ----- what makes no sense is refused


def test_rules_that_take_no_means_of_numbers_have_no_median():
    for name in set(AGGREGATIONS) - set(ENTRYWISE):
        with pytest.raises(ValueError, match=f"and {name} does not make .* 'krum' or 'norm-filter"):
            FedLoRA(aggregation=name, robust="median")
    with pytest.raises(ValueError, match=r"fedsa they keep B to themselves; .* 'median'"):
        FedLoRA(aggregation="fedsa", robust="krum")
    assert set(AGGREGATIONS) - set(ENTRYWISE) == {
        "flexlora", "florist", "rb-lora", "raflora", "flora", "fedex", "fedsvd", "fedmomentum",
    }  # fmt: skip


def test_coins_and_noise_for_privacy_are_refused():
    start_arrays = to_record(random_adapter(4, seed=0).to_state_dict())
    coins = FedLoRA(
        aggregation="rbla", robust="median", ranks=UniformRank(4), sampling=IndependentSampling(0.5)
    )
    with pytest.raises(ValueError, match=r"robust = 'median' is no mean"):
        coins.check(start_arrays)
    private = FedLoRA(
        aggregation="rbla", robust="krum", ranks=UniformRank(4), evaluate_fraction=0.0,
        privacy=PrivateRun(Privacy(clip=0.5, noise_multiplier=2.0), 1e-5),
    )  # fmt: skip
    with pytest.raises(ValueError, match="robust = 'krum' looks for updates unlike the others"):
        private.check(start_arrays)
    rule = protected("fedit", "median")
    assert not any(declares(rule, p) for p in ("linear", "mean_of_all", "symmetric", "unbiased"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TrimmedMean(liars=0.5), "liars: expected a share from 0, below 0.5, got 0.5"),
        (lambda: Krum(liars=float("nan")), "liars: expected a share"),
        (lambda: NormFilter(factor=0.5), "factor: expected a number of at least 1, got 0.5"),
        (lambda: FedLoRA(robust="mediann"), "robust: expected one of .*did you mean 'median'"),
    ],
)
def test_wrong_options_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ----- a run


def liar(message, *, which):
    """One node answers with what it was sent, a hundred times as far from zero and turned round."""
    answer = client(message)
    if message.metadata.dst_node_id == which and message.metadata.message_type == "train":
        arrays = answer["arrays"]
        for key in list(arrays):
            arrays[key] = type(arrays[key])(-30 * arrays[key].numpy())
    return answer


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "norm-filter", "krum"])
def test_a_run_names_who_is_left_out(robust, caplog):
    grid = FakeGrid(NODES, partial(liar, which=NODES[1]))
    lied, _, _ = run(grid, robust=robust, ranks=UniformRank(4), clip_norm=0.0)
    honest, _, _ = run(robust=robust, ranks=UniformRank(4))
    far = max(float((lied.pairs[m].A - p.A).norm()) for m, p in honest.pairs.items())
    assert far < 15
    assert ("left out, as unlike the others: client" in caplog.text) is (
        not ROBUST[robust].by_entry and len(NODES) > 4
    )
