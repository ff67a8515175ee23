"""FSLoRA: the sketch by its statistics, the aggregation by a dense oracle."""

import numpy as np
import pytest
import torch

from strategies import FedLoRA
from strategies.aggregation import Download, Update, make_aggregator
from strategies.lora import Adapter, AdapterError, LoraPair
from strategies.messages import Reply, from_record, to_record
from strategies.model import GlobalModel
from strategies.packing import Packing
from strategies.ranks import UniformRank
from strategies.wire import WIRE_DTYPES, decode, encode
from tests.fakes import FakeGrid, message_reply, random_adapter, same

S = 2.0
R = 6


def f64(tensor):
    return tensor.detach().flatten(1).double().numpy()


def mixed_ranks(seed=1):
    """Modules of different rank, one of them a convolution, one an embedding."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    return Adapter(
        {
            "a": LoraPair(normal(R, 5), normal(9, R), S),
            "b": LoraPair(normal(R, 8), normal(4, R), S),
            "low": LoraPair(normal(3, 7), normal(6, 3), 0.5),
            "conv": LoraPair(normal(R, 3, 2, 2), normal(5, R, 1, 1), S),
            "table": LoraPair(normal(R, 11), normal(4, R), S, embedding=True),
        },
        {"head.weight": normal(2, 3)},
    )


def moved(download, seed):
    """What a client sends back that changed every value it was sent."""
    g = torch.Generator().manual_seed(seed)
    pairs = {
        m: LoraPair(
            p.A + torch.randn(p.A.shape, generator=g),
            p.B + torch.randn(p.B.shape, generator=g),
            p.scale,
            p.embedding,
        )
        for m, p in download.adapter.pairs.items()
    }
    dense = {k: t + torch.randn(t.shape, generator=g) for k, t in download.adapter.dense.items()}
    return Adapter(pairs, dense)


def round_of(current, ranks, weights, seed=0):
    rule = make_aggregator("fslora")
    updates = []
    for k, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
        sent = rule.download(current, rank, np.random.default_rng([seed, k]))
        updates.append(Update(moved(sent, seed=100 * seed + k), weight, sent=sent))
    return updates


def oracle(current, updates):
    """The rule in words: add p_k · change at the sketched entries, over all participants."""
    total = sum(u.weight for u in updates)
    out = {}
    for module, old in current.pairs.items():
        A, B = f64(old.A).copy(), f64(old.B).copy()
        for u in updates:
            if module not in u.adapter.pairs:
                continue
            got, sent = u.adapter.pairs[module], u.sent.adapter.pairs[module]
            for place, entry in enumerate(u.sent.entries[module].tolist()):
                A[entry] += u.weight / total * (f64(got.A)[place] - f64(sent.A)[place])
                change = f64(got.B)[:, place] - f64(sent.B)[:, place]
                B[:, entry] += u.weight / total * change
        out[module] = (A, B)
    return out


def check(current, updates, result):
    for module, (A, B) in oracle(current, updates).items():
        pair, old = result.pairs[module], current.pairs[module]
        assert (pair.A.shape, pair.B.shape) == (old.A.shape, old.B.shape)
        assert (pair.scale, pair.embedding) == (old.scale, old.embedding)
        np.testing.assert_allclose(f64(pair.A), A, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(f64(pair.B), B, rtol=1e-5, atol=1e-5)


# ----- the sketch ----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 6, 9])
def test_a_download_is_one_set_of_entries_for_both_factors(rank):
    current = mixed_ranks()
    rule = make_aggregator("fslora")
    sent = rule.download(current, rank, np.random.default_rng(0))
    for module, old in current.pairs.items():
        pair, index = sent.adapter.pairs[module], sent.entries[module]
        k = min(rank, old.rank)
        assert pair.rank == len(index) == len(set(index.tolist())) == k
        assert torch.equal(pair.A, old.A[index])
        assert torch.equal(pair.B, old.B[:, index])
        assert pair.scale == pytest.approx(old.scale * old.rank / k)
        assert pair.embedding == old.embedding
    shared = [sent.entries[m] for m in ("a", "b", "conv", "table")]
    assert all(torch.equal(x, shared[0]) for x in shared)
    assert same(sent.adapter.only_dense(), current.only_dense())


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_the_sketch_has_its_moments(rank):
    """E[S] = I and E[S²] = (R/k) I, each within five standard errors."""
    current = random_adapter(R, seed=1, shapes={"m": (4, 5)})
    rule, draws = make_aggregator("fslora"), 3000
    sketches = np.zeros((draws, R))
    for d in range(draws):
        sent = rule.download(current, rank, np.random.default_rng([7, d]))
        # e as the client applies it: its scale over the global one, at what it was sent
        for row, entry in zip(sent.adapter.pairs["m"].A, sent.entries["m"], strict=True):
            assert torch.equal(row, current.pairs["m"].A[entry])
            sketches[d, entry] = sent.adapter.pairs["m"].scale / S
    for power, expected in ((1, 1.0), (2, R / rank)):
        x = sketches**power
        error = x.std(axis=0, ddof=1) / np.sqrt(draws)
        assert (abs(x.mean(axis=0) - expected) < 5 * error).all()
    # entries are drawn without replacement: k of them each time, pairs equally often
    assert ((sketches > 0).sum(axis=1) == rank).all()
    together = (sketches > 0).astype(float).T @ (sketches > 0) / draws
    chance = rank * (rank - 1) / (R * (R - 1))
    off = together[~np.eye(R, dtype=bool)]
    assert (abs(off - chance) < 5 * np.sqrt(chance * (1 - chance) / draws) + 1e-12).all()


def test_a_full_sketch_is_the_adapter_itself():
    current = mixed_ranks()
    sent = make_aggregator("fslora").download(current, R, np.random.default_rng(3))
    assert same(sent.adapter, current)
    assert {m: p.scale for m, p in sent.adapter.pairs.items()} == {
        m: p.scale for m, p in current.pairs.items()
    }


def test_clients_evaluate_the_whole_adapter():
    current = mixed_ranks()
    assert same(make_aggregator("fslora").view(current, 1), current)


def sets_of_a_run(seed, rounds=3, nodes=6):
    """The entries every client of a run is sent, by round and client, from the arrays alone."""
    start = random_adapter(R, seed=1, shapes={"m": (7, 8)})
    drawn = {}

    def answer(message):
        config = message.content["config"]
        got = Adapter.from_state_dict(from_record(message.content["arrays"]), config["lora-scale"])
        if message.metadata.message_type == "train":
            place = torch.cdist(got.pairs["m"].A, start.pairs["m"].A).argmin(1)
            assert torch.equal(got.pairs["m"].B, start.pairs["m"].B[:, place])
            assert config["lora-scale"] == pytest.approx(S * R / 3)
            drawn[config["server-round"], config["client-index"]] = tuple(place.tolist())
        return message_reply(got)  # untrained: nothing changes from round to round

    strategy = FedLoRA(
        query=False,
        aggregation="fslora",
        ranks=UniformRank(3),
        scale=S,
        seed=seed,
        evaluate_fraction=0.0,
    )
    arrays = to_record(start.to_state_dict())
    result = strategy.start(FakeGrid(range(nodes), answer), arrays, num_rounds=rounds)
    final = Adapter.from_state_dict(from_record(result.arrays), S)
    assert same(Adapter(final.pairs), Adapter(start.pairs))
    return drawn


def test_sets_are_fresh_for_every_client_and_round_and_repeat_with_the_seed():
    drawn = sets_of_a_run(seed=5)
    assert len(drawn) == 18
    assert len({drawn[1, c] for c in range(6)}) > 1  # clients of a round
    assert len({drawn[r, 0] for r in (1, 2, 3)} | {drawn[r, 1] for r in (1, 2, 3)}) > 2
    assert drawn == sets_of_a_run(seed=5)
    assert drawn != sets_of_a_run(seed=6)


# ----- aggregation ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_aggregation_equals_the_oracle(seed):
    rng = np.random.default_rng(seed)
    current = mixed_ranks(seed)
    n = int(rng.integers(1, 6))
    updates = round_of(current, rng.integers(1, 8, n), rng.uniform(0.01, 100, n), seed)
    result = make_aggregator("fslora").aggregate(current, updates).adapter
    check(current, updates, result)
    total = sum(u.weight for u in updates)
    head = sum(u.weight / total * f64(u.adapter.dense["head.weight"]) for u in updates)
    np.testing.assert_allclose(result.dense["head.weight"], head, rtol=1e-5, atol=1e-6)


def test_modules_missing_at_some_clients_count_as_unchanged():
    current = mixed_ranks()
    updates = round_of(current, [2, 4], [3.0, 1.0])
    part = Adapter({m: p for m, p in updates[0].adapter.pairs.items() if m != "a"})
    rest = Adapter({m: p for m, p in updates[1].adapter.pairs.items() if m != "b"})
    part = Adapter({m: p for m, p in part.pairs.items() if m != "b"})
    updates = [
        Update(part, 3.0, sent=updates[0].sent),
        Update(rest, 1.0, sent=updates[1].sent),
    ]
    result = make_aggregator("fslora").aggregate(current, updates).adapter
    check(current, updates, result)
    assert result.pairs["b"] is current.pairs["b"]


def test_full_sketches_are_the_plain_average():
    current = mixed_ranks()
    updates = round_of(current, [R, R, R], [1.0, 2.0, 5.0])
    result = make_aggregator("fslora").aggregate(current, updates).adapter
    for key, value in result.to_state_dict().items():
        got = [u.adapter.to_state_dict()[key].double().numpy() for u in updates]
        mean = np.average(got, axis=0, weights=[1.0, 2.0, 5.0])
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-5)


def test_order_unit_and_splitting_change_nothing():
    current = mixed_ranks()
    updates = round_of(current, [2, 5, 3], [4.0, 1.0, 2.0])
    first, *others = updates
    half = Update(first.adapter, 2.0, sent=first.sent)
    base = make_aggregator("fslora").aggregate(current, updates).adapter
    for variant in (
        updates[::-1],
        [Update(u.adapter, 1e5 * u.weight, sent=u.sent) for u in updates],
        [half, *others, half],
    ):
        result = make_aggregator("fslora").aggregate(current, variant).adapter
        for key, value in result.to_state_dict().items():
            torch.testing.assert_close(value, base.to_state_dict()[key], rtol=1e-5, atol=1e-5)


def test_untrained_replies_change_nothing():
    current = mixed_ranks()
    rule = make_aggregator("fslora")
    updates = []
    for k in range(3):
        sent = rule.download(current, k + 1, np.random.default_rng(k))
        updates.append(Update(sent.adapter, 1.0, sent=sent))
    result = rule.aggregate(current, updates).adapter
    assert same(Adapter(result.pairs), Adapter(current.pairs))


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_rounding_on_the_wire_is_not_a_change(wire):
    """A client that sends back what it received has changed nothing."""
    current, rule = mixed_ranks(), make_aggregator("fslora")
    current = Adapter({m: p.with_scale(S) for m, p in current.pairs.items() if m != "low"})
    packing = Packing(rule, GlobalModel(current), wire, 1)
    sent = packing.train(3, lambda: np.random.default_rng(0)).sent()
    received = decode(from_record(sent.record), wire)
    adapter = packing.read(Reply(encode(received, wire), 1.0, {}), sent.download)
    result = rule.aggregate(current, [Update(adapter, 1.0, sent=sent.download)]).adapter
    for key, value in result.to_state_dict().items():
        torch.testing.assert_close(value, current.to_state_dict()[key], rtol=1e-6, atol=1e-6)


def test_another_scale_is_folded_before_changes_are_taken():
    current = mixed_ranks()
    updates = round_of(current, [2, 4], [3.0, 1.0])
    base = make_aggregator("fslora").aggregate(current, updates).adapter
    scaled = [Update(u.adapter.with_scale(0.7), u.weight, sent=u.sent) for u in updates]
    result = make_aggregator("fslora").aggregate(current, scaled).adapter
    for key, value in result.to_state_dict().items():
        torch.testing.assert_close(value, base.to_state_dict()[key], rtol=1e-5, atol=1e-5)


def test_without_what_was_sent_only_the_whole_adapter_can_be_read():
    current = random_adapter(4, seed=1)
    whole, low = random_adapter(4, seed=2), random_adapter(2, seed=3)
    result = make_aggregator("fslora").aggregate(current, [(whole, 2.0)]).adapter
    for key, value in result.to_state_dict().items():
        torch.testing.assert_close(value, whole.to_state_dict()[key])
    rule = make_aggregator("fslora")
    state = rule.init(current)
    rule.add(state, Update(whole, 2.0))
    with pytest.raises(ValueError, match=r"came with rank 2 and was sent with 4; give Update.sent"):
        rule.add(state, Update(low, 1.0))
    nan = Adapter({m: LoraPair(p.A, p.B * torch.nan, S) for m, p in whole.pairs.items()})
    with pytest.raises(AdapterError, match="NaN or Inf"):
        rule.add(state, Update(nan, 1.0, sent=Download(current)))
    assert same(rule.finish(state).adapter, result)


def test_half_precision_changes_are_summed_in_float32():
    current = random_adapter(4, seed=1)
    updates = [
        Update(u.adapter.to(torch.bfloat16), u.weight, sent=u.sent)
        for u in round_of(current, [1, 2, 4], [1.0, 2.0, 3.0])
    ]
    result = make_aggregator("fslora").aggregate(current, updates).adapter
    check(current, updates, result)
    assert all(t.dtype == torch.float32 for t in result.tensors())


def test_the_update_is_unbiased_where_training_is_linear():
    """One gradient step of ⟨G_k, s·B S A⟩ on the sketch, for clients of different rank.

    The gradient of the whole adapter is ``s·Bᵀ G`` and ``s·G Aᵀ``; the mean over draws of what
    the server adds must be the clients' weighted mean of it, within five standard errors.
    """
    m, n, draws, step = 5, 4, 3000, 0.1
    current = random_adapter(R, seed=1, shapes={"m": (m, n)}, dense=False)
    g = torch.Generator().manual_seed(4)
    clients = [(k, w, torch.randn(m, n, generator=g)) for k, w in ((1, 3.0), (2, 1.0), (5, 4.0))]
    rule, old = make_aggregator("fslora"), current.pairs["m"]
    added = np.zeros((draws, R, m + n))
    for d in range(draws):
        updates = []
        for c, (rank, weight, G) in enumerate(clients):
            sent = rule.download(current, rank, np.random.default_rng([d, c]))
            pair = sent.adapter.pairs["m"]
            trained = LoraPair(
                pair.A + step * pair.scale * pair.B.T @ G,
                pair.B + step * pair.scale * G @ pair.A.T,
                pair.scale,
            )
            updates.append(Update(Adapter({"m": trained}), weight, sent=sent))
        new = rule.aggregate(current, updates).adapter.pairs["m"]
        added[d, :, :n] = (new.A - old.A).numpy()
        added[d, :, n:] = (new.B - old.B).T.numpy()
    expected = np.zeros((R, m + n))
    for _, weight, G in clients:
        expected[:, :n] += weight / 8.0 * step * S * f64(old.B).T @ f64(G)
        expected[:, n:] += weight / 8.0 * step * S * (f64(G) @ f64(old.A).T).T
    error = added.std(axis=0, ddof=1) / np.sqrt(draws)
    assert (abs(added.mean(axis=0) - expected) < 5 * error).all()
    assert (error < 0.1 * abs(expected).max()).all()  # and the test could have failed
