"""Ranks by hand, by chance, by what a run shows, and with several holders of every entry."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from strategies import FedLoRA
from strategies.clients import Client
from strategies.lora import Adapter
from strategies.profiling import METRICS
from strategies.ranks import AutoRank, FeedbackRank, RandomRank, StaircaseRank
from strategies.ranks.feedback import MOST, bounded, effective_rank
from strategies.ranks.holders import divided, number_of_holders, with_holders
from strategies.trained import Trained


def clients(rows, caps=None):
    caps = caps or [None] * len(rows)
    return [Client(100 + i, i, cap, n) for i, (n, cap) in enumerate(zip(rows, caps, strict=True))]


# ----- several holders ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_every_entry_has_its_holders_and_the_sum_is_kept(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    holders = int(rng.integers(1, n + 2))
    low, high = 2, int(rng.integers(2, 40))
    caps = np.full(n, high) if seed % 2 else rng.integers(1, high + 1, n)
    limit = np.minimum(caps, high)
    total = int(rng.integers(np.minimum(low, limit).sum(), limit.sum() + 1))
    scores = rng.exponential(1.0, n) ** 3
    ranks, note = divided(scores, total, low, high, caps, holders)
    assert note == ""
    assert (ranks >= np.minimum(low, limit)).all()
    assert (ranks <= limit).all()
    held = [int((ranks >= entry).sum()) for entry in range(low + 1, ranks.max() + 1)]
    assert min(held, default=n) >= min(holders, n)
    assert ranks.sum() <= total
    if seed % 2:  # without device limits only what makes no whole entry is left
        assert total - ranks.sum() < max(1, min(holders, n))


def test_holders_are_found_as_by_trying_everything():
    """Of all ranks with enough holders, none is nearer to the sum where devices set no limit."""
    for scores in ([9.0, 1.0, 1.0, 1.0], [5.0, 4.0, 0.5, 0.5], [1.0] * 4):
        ranks, _ = divided(scores, 21, 2, 12, [12] * 4, 2)
        fits = [
            r for r in itertools.product(range(2, 13), repeat=4)
            if sum(r) <= 21 and sorted(r)[-1] == sorted(r)[-2]
        ]  # fmt: skip
        assert tuple(ranks) in fits
        assert sum(ranks) == max(map(sum, fits)) or sum(ranks) == 20
        assert all(a >= b for a, b in itertools.pairwise(ranks))  # by score


def test_without_holders_nothing_is_levelled():
    ranks = with_holders([32, 2, 2], [3, 1, 1], 1, [32] * 3)
    assert ranks.tolist() == [32, 2, 2]
    assert [number_of_holders(share, 10) for share in (0.0, 0.3, 0.31, 1.0)] == [1, 3, 4, 10]


# ----- autorank with more than is published --------------------------------------------------


def assigned(policy, rows, profiles, caps=None):
    here = clients(rows, caps)
    for client, profile in zip(here, profiles, strict=True):
        policy.learn(client, dict(zip(METRICS, profile, strict=True)), 0)
    return policy.choose(here, 1)


PROFILES = [(3.0, 1.0, 0.5), (4.0, 0.5, 0.3), (5.0, 1.5, 0.7), (2.0, 0.1, 0.1)]


def test_the_published_three_do_not_see_volume_and_the_fourth_does():
    same = [(3.0, 1.0, 0.5)] * 4
    assert assigned(AutoRank(2, 32, budget=8), [10, 20, 40, 400], same) == [8, 8, 8, 8]
    policy = AutoRank(2, 32, budget=8, criteria=(*METRICS, "volume"))
    ranks = assigned(policy, [10, 20, 40, 400], same)
    assert ranks == sorted(ranks)
    assert sum(ranks) == 32
    assert ranks[3] > 20
    assert policy.explain().weights["volume"] == 1.0  # the others do not vary
    assert "volume" in policy.summary()


def test_weights_take_the_place_of_critic():
    by_label = AutoRank(2, 32, budget=8, weights=(0, 1, 0))
    ranks = assigned(by_label, [10] * 4, PROFILES)
    assert np.argsort(ranks).tolist() == np.argsort([p[1] for p in PROFILES]).tolist()
    assert by_label.explain().weights == {METRICS[0]: 0.0, METRICS[1]: 1.0, METRICS[2]: 0.0}
    first = assigned(AutoRank(2, 32, budget=8, criteria=METRICS[:1]), [10] * 4, PROFILES)
    assert first == assigned(AutoRank(2, 32, budget=8, weights=(2, 0, 0)), [10] * 4, PROFILES)


@pytest.mark.parametrize("budget", [8, None])
def test_autorank_with_holders_leaves_no_entry_to_one(budget):
    alone = assigned(AutoRank(2, 32, budget=budget), [10] * 4, PROFILES)
    assert sorted(alone)[-1] > sorted(alone)[-2]
    held = assigned(AutoRank(2, 32, budget=budget, holders=0.5), [10] * 4, PROFILES)
    assert sorted(held)[-1] == sorted(held)[-2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criteria": ()}, "got none"),
        ({"criteria": ("volume", "volume")}, "each once"),
        ({"criteria": ("rows",)}, "got rows"),
        ({"weights": (1, 2)}, "expected 3 numbers"),
        ({"weights": (0, 0, 0)}, "not all 0"),
        ({"weights": (1, -1, 1)}, "weights"),
        ({"weights": (1, math.nan, 1)}, "weights"),
        ({"holders": 1.1}, "holders: expected a share"),
    ],
)
def test_what_autorank_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        AutoRank(**options)


def test_an_older_checkpoint_of_autorank_has_no_rows():
    policy = AutoRank(2, 32, budget=8, criteria=("volume",))
    ranks = assigned(policy, [10, 20, 40, 400], PROFILES)
    state = json.loads(json.dumps(policy.state_dict()))
    again = AutoRank(2, 32, budget=8, criteria=("volume",))
    again.load_state_dict(state)
    assert again.choose(clients([10, 20, 40, 400]), 2) == ranks
    del state["rows"]
    again.load_state_dict(state)
    assert again.choose(clients([10, 20, 40, 400]), 2) == ranks


# ----- by hand and by chance -----------------------------------------------------------------


def test_a_staircase_goes_up_with_the_rows():
    policy = StaircaseRank([18, 2, 4, 6, 10])
    rows = [5, 900, 30, 40, 7, 80, 60, 100, 20, 10]
    ranks = policy.choose(clients(rows), 1)
    assert sorted(ranks) == [2, 2, 4, 4, 6, 6, 10, 10, 18, 18]
    assert [ranks[i] for i in np.argsort(rows)] == sorted(ranks)
    assert policy.needs_counts
    assert policy.may_differ
    assert policy.max_rank == 18
    shuffled = policy.choose(clients(rows)[::-1], 1)
    assert shuffled == ranks[::-1]


def test_who_says_no_rows_is_in_the_middle():
    policy = StaircaseRank([1, 2, 3])
    assert policy.choose(clients([10, None, 30]), 1) == [1, 2, 3]
    assert policy.choose(clients([None, None, None]), 1) == [1, 2, 3]
    assert policy.explain().notes == ("nobody said how many rows it has",)
    assert policy.choose(clients([7]), 1) == [1]
    with pytest.raises(ValueError, match="at least one step"):
        StaircaseRank([])


def test_chance_keeps_the_mean_and_does_not_depend_on_who_else_is_there():
    policy = RandomRank(8, 2, 32, seed=3)
    ranks = policy.choose(clients([1] * 10), 1)
    assert sum(ranks) == 80
    assert len(set(ranks)) > 3
    assert policy.choose(clients([1] * 10), 5) == ranks
    fewer = policy.choose(clients([1] * 9), 1)
    assert np.argsort(fewer, kind="stable").tolist() == [
        i for i in np.argsort(ranks, kind="stable") if i < 9
    ]
    assert RandomRank(8, 2, 32, seed=4).choose(clients([1] * 10), 1) != ranks
    with pytest.raises(ValueError, match="mean: expected"):
        RandomRank(40, 2, 32)


# ----- by what the run shows -----------------------------------------------------------------


def trained(index, sent, after, **metrics):
    return Trained(Client(100 + index, index), after, sent, metrics, 1)


def adapter(A, B):
    return Adapter.from_state_dict({"m.lora_A.weight": A, "m.lora_B.weight": B}, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_effective_rank_is_that_of_the_dense_difference(seed):
    g = torch.Generator().manual_seed(seed)
    sent, after = ({}, {})
    dense = []
    for module, (m, n) in {"a": (6, 9), "b": (30, 40)}.items():
        pair = [torch.randn(4, n, generator=g), torch.randn(m, 4, generator=g)]
        new = [x + 0.3 * torch.randn(x.shape, generator=g) for x in pair]
        for state, (A, B) in ((sent, pair), (after, new)):
            state |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        dense.append((new[1] @ new[0] - pair[1] @ pair[0]).double())
    total = energy = 0.0
    for D in dense:
        e = np.linalg.svd(D.numpy(), compute_uv=False) ** 2
        total += e.sum() * e.sum() ** 2 / (e**2).sum()
        energy += e.sum()
    found = effective_rank(Adapter.from_state_dict(sent, 1.0), Adapter.from_state_dict(after, 1.0))
    assert found == pytest.approx(total / energy, rel=1e-3)


def test_one_direction_is_one_and_none_is_none():
    A, B = torch.eye(3, 5), torch.zeros(4, 3)
    one = B.clone()
    one[0, 0] = 0.5
    assert effective_rank(adapter(A, B), adapter(A, one)) == pytest.approx(1.0)
    three = torch.eye(4, 3)
    assert effective_rank(adapter(A, B), adapter(A, three)) == pytest.approx(3.0)
    assert effective_rank(adapter(A, B), adapter(A, B)) == 0.0


def test_rank_moves_to_where_it_is_used_at_the_same_bytes():
    policy = FeedbackRank(8, 2, 32, holders=0.3)
    here = clients([10] * 10)
    assert policy.choose(here, 1) == [8] * 10
    A, B = torch.eye(8, 12), torch.zeros(10, 8)
    for i in range(9):  # client 9 is not heard of; the others use 1 to 8 directions
        after = B.clone()
        after[range(min(i + 1, 8)), range(min(i + 1, 8))] = 1.0
        policy.observe(trained(i, adapter(A, B), adapter(A, after)))
    ranks = policy.choose(here, 2)
    assert ranks[:9] == sorted(ranks[:9])
    assert ranks[0] < 8 < ranks[8]
    assert ranks[0] < ranks[9] < ranks[8]
    assert ranks.count(max(ranks)) >= 3
    assert 78 <= sum(ranks) <= 80
    assert policy.explain().clients[0] == {"energy": pytest.approx(0.2)}  # of a median of 5
    assert policy.judges
    again = FeedbackRank(8, 2, 32, holders=0.3)
    again.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert again.choose(here, 3) == policy.choose(here, 3)
    policy.forget(8)
    assert policy.choose(here, 4)[8] == policy.choose(here, 4)[9]


def test_ranks_stay_between_assignments():
    policy = FeedbackRank(8, 2, 32, every=3, measure="loss")
    here = clients([10] * 4)
    nothing = adapter(torch.eye(1, 2), torch.zeros(2, 1))
    seen = []
    for number in range(1, 8):
        seen.append(policy.choose(here, number))
        for i in range(4):
            policy.observe(trained(i, nothing, nothing, loss=1.0 + i * number))
    assert seen[0] == seen[1] == seen[2] == [8] * 4
    assert seen[3] == seen[4] == seen[5] != seen[0]
    assert not policy.judges
    assert policy.reads_loss


def test_a_loss_of_long_ago_is_not_compared_with_one_of_now():
    policy = FeedbackRank(8, 2, 32, measure="loss", smoothing=1.0)
    here = clients([10] * 4)
    nothing = adapter(torch.eye(1, 2), torch.zeros(2, 1))
    for number, loss in enumerate((4.0, 2.0, 1.0), start=1):
        for i in range(4 if number == 1 else 3):  # client 3 is not asked again
            policy.observe(trained(i, nothing, nothing, loss=loss))
        assert policy.choose(here, number + 1) == [8] * 4


@pytest.mark.parametrize("lie", [1e30, math.inf, math.nan, -1.0, None])
def test_a_liar_gets_no_more_than_the_bound_and_never_alone(lie):
    policy = FeedbackRank(8, 2, 32, measure="loss", holders=0.3, smoothing=1.0)
    here = clients([10] * 10)
    nothing = adapter(torch.eye(1, 2), torch.zeros(2, 1))
    for i in range(10):
        reply = trained(
            i,
            nothing,
            nothing,
            **({} if i == 0 and lie is None else {"loss": lie if i == 0 else 1.0}),
        )
        if i == 0 and (lie is None or not 0 <= lie < math.inf):
            with pytest.raises(ValueError, match="counts as"):
                policy.observe(reply)
        else:
            policy.observe(reply)
    ranks = policy.choose(here, 2)
    assert ranks[0] <= (MOST + 2) / 3 * 8
    assert ranks.count(max(ranks)) >= 3
    assert min(ranks) >= 5


def test_scores_are_bounded():
    assert bounded([None, None]) == [1.0, 1.0]
    assert bounded([0.0, None]) == [1.0, 1.0]
    assert bounded([1.0, 1.0, 100.0, None]) == [1.0, 1.0, MOST, 2.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": 1}, "mean: expected"),
        ({"measure": "luck"}, "energy, loss; got 'luck'"),
        ({"every": 0}, "every"),
        ({"holders": 0}, "holders"),
        ({"smoothing": 1.5}, "smoothing"),
    ],
)
def test_what_feedback_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        FeedbackRank(**options)


def test_a_private_run_refuses_what_lives_on_counts_or_losses():
    from strategies.privacy import refuse_private

    strategy = FedLoRA()
    for policy, said in (
        (StaircaseRank([2, 4]), "numbers of rows"),
        (FeedbackRank(measure="loss"), "training losses"),
        (FeedbackRank(), None),
        (RandomRank(), None),
    ):
        found = refuse_private(
            strategy.aggregation, policy, strategy.participation.sampler, evaluate_fraction=0.0
        )
        assert bool(found) == (said is not None)
        assert said is None or said in found[0]
