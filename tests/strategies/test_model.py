"""The global model and its merges, against dense float64 numpy."""

import numpy as np
import pytest
import torch

from strategies.aggregation import AGGREGATIONS, make_aggregator
from strategies.lora import Adapter, AdapterError, LoraPair
from strategies.messages import from_record, to_record
from strategies.model import MERGED, GlobalModel, add_deltas
from tests.fakes import random_adapter, same

# by module: the shape of A without its rank, the rows of B, the further axes of B
KINDS = {
    "linear": ((12,), 9, ()),
    "small": ((4,), 3, ()),
    "conv": ((3, 2, 2), 5, (1, 1)),
    "table": ((11,), 6, ()),
}


def adapter_of(rank, *, seed, scale=2.0, modules=tuple(KINDS), size=1.0):
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for module, (n, m, ones) in KINDS.items():
        A, B = torch.randn(rank, *n, generator=g), torch.randn(m, rank, *ones, generator=g)
        if module in modules:
            pairs[module] = LoraPair(size * A, B, scale, embedding=module == "table")
    return Adapter(pairs, {"head.weight": torch.randn(2, 3, generator=g)})


def dense(pair):
    A, B = pair.A.double().numpy(), pair.B.double().numpy()
    flat = pair.scale * B.reshape(len(B), -1) @ A.reshape(len(A), -1)
    return flat.reshape(len(B), *A.shape[1:])


def total(adapters, module):
    return sum(dense(a.pairs[module]) for a in adapters if module in a.pairs)


def close(x, y, tolerance=1e-5):
    assert x.shape == y.shape
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + 1e-12


# ----- tensors -------------------------------------------------------------------------


def test_to_tensors_and_from_tensors_are_inverse():
    model = GlobalModel(
        adapter_of(3, seed=1), Adapter(adapter_of(5, seed=2, scale=1.0, modules=("conv",)).pairs)
    )
    tensors = from_record(to_record(model.to_tensors()))
    again = GlobalModel.from_tensors(tensors, 2.0)
    assert same(again.adapter, model.adapter)
    assert same(again.merged, model.merged)
    for mine, theirs in ((again.adapter, model.adapter), (again.merged, model.merged)):
        for module, pair in mine.pairs.items():
            expected = theirs.pairs[module]
            assert (pair.scale, pair.embedding) == (expected.scale, expected.embedding)
    assert list(again.to_tensors()) == list(tensors)


def test_merges_of_another_scale_are_written_at_scale_one():
    merged = Adapter(adapter_of(2, seed=2, scale=3.0).pairs)
    again = GlobalModel.from_tensors(GlobalModel(adapter_of(3, seed=1), merged).to_tensors(), 2.0)
    for module, pair in again.merged.pairs.items():
        assert pair.scale == 1.0
        close(dense(pair), dense(merged.pairs[module]))


def test_without_merges_nothing_is_added():
    adapter = adapter_of(3, seed=1)
    model = GlobalModel(adapter)
    assert model.to_tensors().keys() == adapter.to_state_dict().keys()
    assert model.combined() is adapter
    assert model.merging(None) is model


def test_what_cannot_be_used_is_refused():
    tensors = GlobalModel(adapter_of(3, seed=1), adapter_of(2, seed=2).with_scale(1.0)).to_tensors()
    broken = {k: t for k, t in tensors.items() if k != f"{MERGED}conv.lora_A.weight"}
    with pytest.raises(AdapterError, match="lora_A of 'conv' is missing"):
        GlobalModel.from_tensors(broken, 2.0)
    key = f"{MERGED}linear.lora_B.weight"
    nan = {**tensors, key: tensors[key] * torch.nan}
    with pytest.raises(AdapterError, match=r"'linear\.lora_B\.weight' holds NaN or Inf"):
        GlobalModel.from_tensors(nan, 2.0)
    GlobalModel.from_tensors(nan, 2.0, check_finite=False)


# ----- sums of deltas ------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1,), (2, 1), (3, 8), (20, 1), (15, 15, 15)])
def test_add_deltas_is_the_dense_sum(ranks):
    """Up to ranks above min(m, n), where the sum is recompressed."""
    scales = [2.0, 0.5, 3.0]
    adapters = [
        adapter_of(r, seed=k, scale=s) for k, (r, s) in enumerate(zip(ranks, scales, strict=False))
    ]
    for scale in (None, 1.0, 0.25):
        result = add_deltas(adapters, scale)
        assert not result.dense
        for module, ((*n,), m, _) in KINDS.items():
            pair = result.pairs[module]
            close(dense(pair), total(adapters, module))
            assert pair.scale == (2.0 if scale is None else scale)
            assert pair.rank <= max(1, min(sum(ranks), m, int(np.prod(n))))
            assert pair.embedding == (module == "table")
        assert not result.differences(Adapter(adapters[0].pairs))


def test_add_deltas_of_modules_that_some_lack():
    first, second = (
        adapter_of(2, seed=1, modules=("linear", "table")),
        adapter_of(3, seed=2, scale=0.5, modules=("conv", "linear")),
    )
    result = add_deltas([first, second])
    assert result.pairs.keys() == {"linear", "table", "conv"}
    for module, pair in result.pairs.items():
        close(dense(pair), total([first, second], module))
    assert result.pairs["conv"].scale == 0.5  # the first that has it
    assert not add_deltas([]).pairs


def test_a_zero_sum_is_a_pair_of_zeros():
    for ranks in ((2, 2), (20, 20)):  # stacked, and cancelled in the dense sum
        one = adapter_of(ranks[0], seed=1)
        minus = Adapter(
            {m: LoraPair(p.A, -p.B, p.scale, p.embedding) for m, p in one.pairs.items()}
        )
        result = add_deltas([one, minus])
        assert not result.differences(Adapter(one.pairs))
        for module, pair in result.pairs.items():
            assert np.linalg.norm(dense(pair)) <= 1e-6 * np.linalg.norm(dense(one.pairs[module]))
    zero = Adapter(
        {m: LoraPair(p.A * 0, p.B * 0, p.scale, p.embedding) for m, p in one.pairs.items()}
    )
    result = add_deltas([zero, zero])
    assert not result.differences(Adapter(one.pairs))
    assert all(r >= 1 for r in result.ranks.values())
    assert all(not dense(pair).any() for pair in result.pairs.values())


def test_inputs_are_not_changed():
    adapters = [adapter_of(20, seed=1), adapter_of(2, seed=2)]
    before = [t.clone() for a in adapters for t in a.tensors()]
    GlobalModel(adapters[0]).merging(adapters[1]).merging(adapters[0]).combined()
    after = [t for a in adapters for t in a.tensors()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# ----- merging and combining -----------------------------------------------------------


@pytest.mark.parametrize(("own", "merged"), [(1, 1), (4, 3), (2, 12), (20, 2)])
def test_combined_has_the_effect_of_both_parts(own, merged):
    model = GlobalModel(adapter_of(own, seed=1)).merging(adapter_of(merged, seed=2, scale=1.0))
    combined = model.combined()
    for module, pair in combined.pairs.items():
        expected = dense(model.adapter.pairs[module]) + dense(model.merged.pairs[module])
        close(dense(pair), expected)
        assert pair.scale == 2.0
        assert pair.embedding == (module == "table")
        n, m, _ = KINDS[module]
        assert pair.rank <= min(own + merged, m, int(np.prod(n)))
    assert same(combined.only_dense(), model.adapter.only_dense())
    again = Adapter.from_state_dict(combined.to_state_dict(), 2.0)  # still what PEFT reads
    assert same(again, combined)


def test_combined_where_only_some_modules_were_merged():
    model = GlobalModel(adapter_of(3, seed=1)).merging(adapter_of(2, seed=2, modules=("conv",)))
    combined = model.combined()
    assert combined.pairs.keys() == KINDS.keys()
    for module in KINDS:
        close(dense(combined.pairs[module]), total([model.adapter, model.merged], module))


def test_many_merges_stay_exact_and_do_not_grow():
    model = GlobalModel(adapter_of(2, seed=0))
    expected = dict.fromkeys(KINDS, 0.0)
    for seed in range(1, 31):
        # deltas of very different size, so that the small ones could get lost
        delta = adapter_of(1 + seed % 7, seed=seed, scale=0.5, size=10.0 ** (seed % 4 - 2))
        model = model.merging(Adapter(delta.pairs))
        expected = {m: expected[m] + dense(delta.pairs[m]) for m in KINDS}
        if seed % 10 == 0:  # as after a round: through the record
            model = GlobalModel.from_tensors(from_record(to_record(model.to_tensors())), 2.0)
        for module, pair in model.merged.pairs.items():
            close(dense(pair), expected[module])
            n, m, _ = KINDS[module]
            assert pair.rank <= min(m, int(np.prod(n)))


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_rounds_of_a_merging_rule_lose_nothing(rule):
    """What the model computes after every round is the base so far plus the exact mean."""
    model = GlobalModel(random_adapter(4, seed=1))
    aggregator = make_aggregator(rule)
    base = dict.fromkeys(model.adapter.pairs, 0.0)
    for number in range(1, 8):
        aggregator.server_round = number
        updates = [(random_adapter(r, seed=10 * number + r), float(w)) for r, w in ((2, 3), (4, 1))]
        result = aggregator.aggregate(model.adapter, updates)
        mean = {m: sum(w / 4 * dense(a.pairs[m]) for a, w in updates) for m in base}
        if rule == "fedex":  # the client of rank 2, of weight 3/4, leaves the other two entries
            for m, old in model.adapter.pairs.items():
                mean[m] = mean[m] + 3 / 4 * (dense(old) - dense(old.with_rank(2)))
        model = GlobalModel(result.adapter, model.merging(result.base_delta).merged)
        for module, pair in model.combined().pairs.items():
            close(dense(pair), base[module] + mean[module])
        base = {m: dense(model.merged.pairs[m]) if m in model.merged.pairs else 0.0 for m in base}


def test_rules_say_whether_they_merge():
    for name in AGGREGATIONS:
        updates = [(random_adapter(4, seed=k), 1.0) for k in (2, 3)]
        result = make_aggregator(name).aggregate(random_adapter(4, seed=1), updates)
        on_clients = name == "fold"  # which hold merged what they do not train
        assert make_aggregator(name).merges_base == (result.base_delta is not None or on_clients)
