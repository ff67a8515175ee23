"""Server optimisers: Flower's own for equal ranks, number by number for unequal ones."""

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

from strategies import FedLoRA
from strategies.aggregation import Download, Update, make_aggregator
from strategies.checkpoint import Checkpoints
from strategies.checkpoint.__main__ import main as checkpoint_main
from strategies.lora import Adapter
from strategies.messages import from_record, to_record
from strategies.optimizers import OPTIMIZERS, Adagrad, Adam, Momentum, Yogi
from strategies.privacy import Privacy, PrivateRun
from strategies.ranks import ListRank, UniformRank
from strategies.sampling import PlannedSampling
from strategies.saving import Saver
from tests.fakes import FakeGrid, random_adapter, same
from tests.strategies.test_participation import COUNTS, NODES, client, run

PAIRS = [
    (Momentum(learning_rate=0.5, momentum=0.8),
     lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.8)),
    (Adagrad(learning_rate=0.1, tau=1e-2), lambda: FedAdagrad(eta=0.1, tau=1e-2)),
    (Adam(learning_rate=0.1), lambda: FedAdam(eta=0.1)),
    (Yogi(learning_rate=0.05), lambda: FedYogi(eta=0.05)),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "flowers"), PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_equal_ranks_move_as_with_flower(ours, flowers):
    ours.moments = {}
    model, _, _ = run(rounds=4, ranks=UniformRank(4), aggregation="fedit", server_optimizer=ours)
    strategy, arrays = flowers(), to_record(random_adapter(4, seed=0).to_state_dict())
    for number in range(1, 5):
        strategy.current_arrays = (
            arrays
            if isinstance(strategy, FedAvgM)
            else {key: array.numpy() for key, array in arrays.items()}
        )
        replies = []
        for k, count in enumerate(COUNTS):
            g = torch.Generator().manual_seed(k + 100 * number)
            moved = {
                key: t + torch.randn(t.shape, generator=g) for key, t in from_record(arrays).items()
            }
            content = RecordDict(
                {
                    "arrays": to_record(moved),
                    "metrics": MetricRecord({"num-examples": count, "loss": 0.5}),
                }
            )
            replies.append(Message(content, reply_to=Message(RecordDict(), NODES[k], "train")))
        arrays, _ = strategy.aggregate_train(number, replies)
    found = model.to_state_dict()
    for key, tensor in from_record(arrays).items():
        torch.testing.assert_close(found[key], tensor.float(), rtol=1e-4, atol=1e-5)


def by_hand(optimizer, change, memory):
    """One number after the other, in float64: the sources' formulas."""
    m, v, n = memory
    o, n = optimizer, n + 1
    if optimizer.name == "momentum":
        m = o.momentum * m + change
        return o.learning_rate * m, (m, v, n)
    if optimizer.name == "adagrad":
        v += change**2
        return o.learning_rate * change / (v**0.5 + o.tau), (m, v, n)
    m = o.beta_1 * m + (1 - o.beta_1) * change
    if optimizer.name == "yogi":
        v -= (1 - o.beta_2) * change**2 * np.sign(v - change**2)
        rate = o.learning_rate
    else:
        v = o.beta_2 * v + (1 - o.beta_2) * change**2
        rate = o.learning_rate * (1 - o.beta_2 ** (n + 1)) ** 0.5 / (1 - o.beta_1 ** (n + 1))
    return rate * m / (v**0.5 + o.tau), (m, v, n)


def stepped(optimizer, rule, current, updates):
    state = rule.init(current)
    for update in updates:
        rule.add(state, update)
    keys, new = set(state.dense_mass), rule.finish(state).adapter
    made, optimizer.moments = optimizer.step(current, new, state.reach, keys, rule.uploaded())
    return new, made


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_entry_has_a_memory_of_its_own(name):
    """The fourth and later entries are held in every second round only."""
    optimizer, rule, shapes = OPTIMIZERS[name](), make_aggregator("rbla"), {"m": (4, 5)}
    current, memory = random_adapter(6, seed=1, shapes=shapes), {}
    for number in range(1, 6):
        ranks = [3, 2] if number % 2 else [5, 2, 3]
        updates = [
            Update(random_adapter(r, seed=10 * number + k, shapes=shapes), 1.0 + k)
            for k, r in enumerate(ranks)
        ]
        new, made = stepped(optimizer, rule, current, updates)
        for factor, axis in (("A", 0), ("B", 1)):
            old, aim, got = (getattr(a.pairs["m"], factor) for a in (current, new, made))
            for place in np.ndindex(*old.shape):
                if place[axis] >= max(ranks):
                    assert got[place] == old[place]  # nobody held it
                    continue
                known = memory.get((factor, place), (0.0, 0.0, 0))
                change = float(aim[place] - old[place])
                distance, memory[factor, place] = by_hand(optimizer, change, known)
                wanted = float(old[place]) + distance
                np.testing.assert_allclose(float(got[place]), wanted, rtol=1e-4, atol=1e-5)
        current = made


def test_what_was_not_sent_neither_moves_nor_ages():
    optimizer, rule = Adam(), make_aggregator("rolora")
    current = random_adapter(4, seed=1)
    for number in (1, 2, 3):
        rule.server_round = number
        sent = Download(current)
        moved = {
            m: p.to(torch.float32) for m, p in random_adapter(4, seed=20 + number).pairs.items()
        }
        head = {"head.bias": torch.ones(3) * number}  # the other one came from nobody
        update = Update(Adapter(moved, head), 1.0, sent=sent)
        _, made = stepped(optimizer, rule, current, [update])
        still, goes = ("A", "B") if number % 2 else ("B", "A")
        for m, pair in made.pairs.items():
            assert torch.equal(getattr(pair, still), getattr(current.pairs[m], still))
            assert not torch.equal(getattr(pair, goes), getattr(current.pairs[m], goes))
        assert torch.equal(made.dense["head.weight"], current.dense["head.weight"])
        assert not torch.equal(made.dense["head.bias"], current.dense["head.bias"])
        current = made
    ages = {key: int(t.max()) for key, t in optimizer.moments.items() if key.startswith("n.")}
    assert ages["n.A.tall"] == 1
    assert ages["n.B.tall"] == 2
    assert ages["n.dense.head.weight"] == 0


def test_what_is_gathered_grows_and_shrinks_with_the_rank():
    optimizer = Adam()
    for old, new in ((2, 5), (5, 5), (5, 3)):
        start, aim = random_adapter(old, seed=old), random_adapter(new, seed=9)
        held = {m: torch.ones(new, dtype=torch.bool) for m in aim.pairs}
        before = optimizer.moments
        made, optimizer.moments = optimizer.step(start, aim, held, set(aim.dense), "AB")
        assert made.rank == new
        assert optimizer.moments["m.A.tall"].shape == aim.pairs["tall"].A.shape
        assert optimizer.moments["v.B.tall"].shape == aim.pairs["tall"].B.shape
        ages = optimizer.moments["n.A.tall"].tolist()
        assert ages[:2] == [1 + int(before["n.A.tall"][0]) if before else 1] * 2
    assert ages == [3, 3, 3]


def test_momentum_of_nothing_at_full_rate_is_the_rule():
    one, _, _ = run(rounds=2, server_optimizer=Momentum(momentum=0.0))
    two, _, _ = run(rounds=2)
    for key, tensor in two.to_state_dict().items():
        torch.testing.assert_close(one.to_state_dict()[key], tensor, rtol=1e-5, atol=1e-5)


# ----- what makes no sense is refused


def test_rules_whose_factors_are_made_anew_have_no_optimiser():
    arrays = to_record(random_adapter(4, seed=0).to_state_dict())
    for rule in ("flexlora", "florist", "fedsvd", "flora", "fedex"):
        strategy = FedLoRA(aggregation=rule, ranks=UniformRank(4), server_optimizer="adam")
        with pytest.raises(ValueError, match=f"{rule} makes its factors anew .* use one of fedit"):
            strategy.check(arrays)
    planned = FedLoRA(
        aggregation="fslora", ranks=UniformRank(4), sampling=PlannedSampling(pilot_rounds=2),
        server_optimizer="momentum",
    )  # fmt: skip
    with pytest.raises(ValueError, match="the pilots of sampling 'planned' start the model anew"):
        planned.check(arrays)
    outside = FedLoRA(
        aggregation="zero-padding", ranks=UniformRank(4), server_optimizer="yogi",
        noised_outside=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="server optimizer 'yogi' moves the model by more"):
        outside.check(arrays)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Adam(learning_rate=0), "learning_rate: expected a number above 0, got 0"),
        (lambda: Yogi(beta_2=1.0), "beta_2: expected a number from 0, below 1, got 1.0"),
        (lambda: Momentum(momentum=-0.1), "momentum: expected a number from 0"),
        (lambda: Adagrad(tau=0.0), "tau: expected a number above 0"),
        (lambda: FedLoRA(server_optimizer="adan"), "server_optimizer: expected one of .*'adam'"),
    ],
)
def test_wrong_options_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_noise_that_hides_who_joined_moves_all(caplog):
    """An entry that stays only where nobody joined would tell that nobody did."""
    from strategies.sampling import IndependentSampling

    start = random_adapter(4, seed=0)
    model, _, _ = run(
        aggregation="zero-padding", ranks=UniformRank(4), server_optimizer="adam",
        sampling=IndependentSampling(1e-6, estimator="unbiased"), initial=start,
        privacy=PrivateRun(Privacy(clip=0.5, noise_multiplier=2.0), 1e-5),
    )  # fmt: skip
    assert not same(model, start)


# ----- checkpoints


def saved_run(folder, rounds, *, resume="", optimizer="adam"):
    saver = Saver(Checkpoints(folder), resume_from=resume, fingerprint={"scale": 2.0})
    strategy = FedLoRA(
        aggregation="rbla", ranks=ListRank([2, 4], cycle=True), scale=2.0, evaluate_fraction=0.0,
        server_optimizer=optimizer, saver=saver,
    )  # fmt: skip
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    try:
        return strategy.start(FakeGrid(NODES, client), start, num_rounds=rounds, timeout=1).arrays
    finally:
        saver.checkpoints.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_gives_the_same_bytes(tmp_path, optimizer):
    straight = saved_run(tmp_path / "a", 4, optimizer=optimizer)
    saved_run(tmp_path / "b", 2, optimizer=optimizer)
    resumed = saved_run(tmp_path / "b", 4, resume="latest", optimizer=optimizer)
    one, two = from_record(straight), from_record(resumed)
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_another_optimiser_cannot_go_on_and_none_is_exported(tmp_path):
    arrays = from_record(saved_run(tmp_path / "a", 2))
    with pytest.raises(ValueError, match="server optimizer 'adam', this one has 'yogi'"):
        saved_run(tmp_path / "a", 3, resume="latest", optimizer="yogi")
    with pytest.raises(ValueError, match="do not both have optimizer"):
        saved_run(tmp_path / "a", 3, resume="latest", optimizer="none")
    out = str(tmp_path / "peft")
    assert checkpoint_main([str(tmp_path / "a"), "--export", out]) == 0
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(exported) == len(arrays)
