"""Real classes of transformers and PEFT: what works, and what is refused with its true reason."""

import copy
import functools
import logging

import peft
import pytest
import torch
import transformers as tf
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import nn

from strategies import FedLoRA, save_adapter
from strategies.client import (
    Profile,
    apply_adapter,
    check_mergeable,
    make_reply,
    profile,
    receive,
    register_identity,
    register_profile,
    send,
)
from strategies.lora import Adapter, AdapterError
from strategies.messages import from_record, to_record
from strategies.model import GlobalModel
from strategies.ranks import AutoRank, ListRank, ReportedRank, UniformRank
from strategies.training import losses_and_labels, train_loop
from tests.fakes import FakeGrid, message_reply, query_reply, random_adapter

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
FAMILIES = {
    "bert": (tf.BertConfig, {"intermediate_size": 16}, ["query", "value"], ["classifier"]),
    "roberta": (tf.RobertaConfig, {"intermediate_size": 16}, ["query", "value"], ["classifier"]),
    "deberta": (
        tf.DebertaV2Config, {"intermediate_size": 16}, ["query_proj", "value_proj"],
        ["classifier", "pooler"],
    ),
    "albert": (
        tf.AlbertConfig, {"intermediate_size": 16, "embedding_size": 8}, ["query", "value"],
        ["classifier"],
    ),
    "gpt2": (tf.GPT2Config, {"pad_token_id": 0}, ["c_attn"], ["score"]),
    "llama": (
        tf.LlamaConfig, {"intermediate_size": 16, "pad_token_id": 0}, ["q_proj", "v_proj"],
        ["score"],
    ),
    "llama tied": (
        tf.LlamaConfig,
        {"intermediate_size": 16, "pad_token_id": 0, "tie_word_embeddings": True},
        ["q_proj", "v_proj"], ["score"],
    ),
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])


def base_of(family):
    kind, more, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(**SMALL, **more, num_labels=3)
    return tf.AutoModelForSequenceClassification.from_config(config).eval()


def lora_of(family, rank=4, **options):
    _, _, targets, saved = FAMILIES[family]
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=saved,
        task_type="SEQ_CLS", init_lora_weights=False, fan_in_fan_out=family == "gpt2", **options,
    )  # fmt: skip
    return peft.get_peft_model(base_of(family), config)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def run(family, rule, rounds=2):
    """Return the server's global arrays after real clients of two ranks."""
    models = {1: lora_of(family, 2), 2: lora_of(family, 4)}

    def client(message):
        node = message.metadata.dst_node_id
        model, context = models[node], Context(1, node, {}, RecordDict(), {})
        apply_adapter(model, message, context)
        torch.manual_seed(node)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return make_reply(model, message, num_examples=10 * node, context=context).content

    strategy = FedLoRA(
        aggregation=rule, ranks=ListRank([2, 4]), scale=2.0, evaluate_fraction=0, query=False,
        min_replies=2,
    )  # fmt: skip
    start = to_record(peft.get_peft_model_state_dict(lora_of(family)))
    return strategy.start(FakeGrid([1, 2], client), start, num_rounds=rounds, timeout=5).arrays


@pytest.mark.parametrize("rule", ["replication", "flexlora", "fedex", "flora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_the_servers_model_in_plain_peft(family, rule, tmp_path):
    arrays = run(family, rule)
    server = lora_of(family)
    receive(server, from_record(arrays), {"lora-scale": 2.0})
    for task_type in ("SEQ_CLS", None):
        folder = tmp_path / str(task_type)
        save_adapter(arrays, folder, scale=2.0, task_type=task_type)
        plain = peft.PeftModel.from_pretrained(base_of(family), folder)
        torch.testing.assert_close(logits(plain), logits(server), rtol=1e-4, atol=1e-5)


def test_the_habit_of_saving_says_what_it_loses(tmp_path, caplog):
    logger = logging.getLogger("flwr")
    logger.propagate, before = True, logger.propagate
    model = lora_of("bert")
    receive(model, from_record(run("bert", "fedex")), {"lora-scale": 2.0})
    model.save_pretrained(tmp_path / "a")
    receive(model, from_record(run("bert", "replication")), {"lora-scale": 2.0})
    model.save_pretrained(tmp_path / "b")
    logger.propagate = before
    assert sum("save_adapter" in r.getMessage() for r in caplog.records) == 1


def test_a_copy_of_a_merged_model_saves_itself(tmp_path):
    model = lora_of("bert")
    receive(model, from_record(run("bert", "fedex")), {"lora-scale": 2.0})
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "whole.pt")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.fill_(7.0)
    twin.save_pretrained(tmp_path / "twin")
    saved = load_file(tmp_path / "twin" / "adapter_model.safetensors")
    factors = [tensor for key, tensor in saved.items() if "lora_B" in key]
    assert factors
    assert all(bool((tensor == 7).all()) for tensor in factors)


# ----- what cannot work is refused by name --------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("targets", [["first"], ["second"], ["first", "second"]])
def test_a_merge_into_a_tied_weight_is_refused(targets):
    model = peft.get_peft_model(Tied(), peft.LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match=r"is tied to another \(.*first.*second"):
        check_mergeable(model)


def test_a_tied_language_model():
    kind, more, _, _ = FAMILIES["llama tied"]
    model = tf.LlamaForCausalLM(kind(**SMALL, **more))
    tied = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="tied"):
        check_mergeable(tied)
    beside = peft.get_peft_model(
        tf.LlamaForCausalLM(kind(**SMALL, **more)), peft.LoraConfig(target_modules=["q_proj"])
    )
    check_mergeable(beside)


def test_attention_without_one_weight_works_unless_a_rule_merges():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    def make(rank):
        return peft.get_peft_model(Net(), peft.LoraConfig(r=rank, target_modules=["attention"]))

    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(make(4)).items()}
    model = make(2)
    receive(model, sent, {"lora-scale": 1.0})
    for key, tensor in send(model, {}).items():
        torch.testing.assert_close(tensor, sent[key])


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_changes_the_base_is_refused(how):
    model = lora_of("bert")
    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items()}
    changed = peft.get_peft_model(
        base_of("bert"),
        peft.LoraConfig(
            r=2, target_modules=["query", "value"], modules_to_save=["classifier"],
            init_lora_weights=how,
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"init_lora_weights = '{how}' changes the frozen weights"):
        receive(changed, sent, {"lora-scale": 1.0})


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda m: nn.DataParallel(m), "DataParallel: pass the unwrapped"),
        (lambda m: torch.compile(m, backend="eager"), "torch.compile: pass the unwrapped"),
        (lambda m: base_of("bert"), "no LoRA layers: pass what peft.get_peft_model"),
    ],
)
def test_a_model_that_is_not_the_peft_model(wrap, reason):
    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(lora_of("bert")).items()}
    with pytest.raises(ValueError, match=reason):
        receive(wrap(lora_of("bert")), sent, {"lora-scale": 1.0})


def test_another_adapter_name():
    config = peft.LoraConfig(target_modules=["query"])
    model = peft.get_peft_model(base_of("bert"), config, adapter_name="mine")
    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(lora_of("bert")).items()}
    with pytest.raises(ValueError, match=r"adapter 'default' \(found 'mine'\); pass adapter_name"):
        receive(model, sent, {"lora-scale": 1.0})


def test_a_reply_of_a_model_that_never_got_the_adapter():
    sent = peft.get_peft_model_state_dict(lora_of("bert"))
    content = RecordDict({"arrays": to_record(sent), "config": ConfigRecord({"lora-scale": 2.0})})
    message = Message(content, dst_node_id=1, message_type="train")
    with pytest.raises(ValueError, match=r"call apply_adapter\(model, message\)"):
        make_reply(lora_of("bert"), message, num_examples=1)


def test_a_model_in_float16_on_the_server():
    model = lora_of("bert").half()
    arrays = to_record({k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items()})
    receive(model, from_record(arrays), {"lora-scale": 2.0})


@pytest.mark.parametrize("made", [1.0, 4.0])
def test_another_scale_is_said_once(made, caplog):
    logger = logging.getLogger("flwr")
    logger.propagate, before = True, logger.propagate
    config = peft.LoraConfig(
        r=2, lora_alpha=2 * made, target_modules=["query"], modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(base_of("bert"), config)
    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items()}
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            receive(model, sent, {"lora-scale": 1.0})
    logger.propagate = before
    told = [r for r in caplog.records if "LoRA scale" in r.getMessage()]
    assert len(told) == (made != 1.0)


# ----- profiles and losses of language models -----------------------------------------------


class Own(tf.GPT2LMHeadModel):
    """Somebody's own subclass, whose name says nothing."""


def causal(kind):
    torch.manual_seed(1)
    if kind != "llama":
        cls = Own if kind == "own" else tf.GPT2LMHeadModel
        return cls(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, intermediate_size=16))


@pytest.mark.parametrize("kind", ["gpt2", "own", "llama"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_loss_of_a_row_is_the_models_own(kind, wrapped):
    model = causal(kind)
    if wrapped:
        target = ["q_proj"] if kind == "llama" else ["c_attn"]
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=target))
    model.eval()
    rows = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    labels[0, :4] = -100
    found = losses_and_labels(model, [{"input_ids": rows, "labels": labels}])
    with torch.no_grad():
        own = [
            float(model(input_ids=rows[i : i + 1], labels=labels[i : i + 1]).loss) for i in range(3)
        ]
    assert found.losses.tolist() == pytest.approx(own, rel=1e-5)
    assert (found.rows, len(found.labels)) == (3, 3 + 6 + 6)


def test_a_profile_counts_rows_not_tokens_nor_a_choice_of_them():
    told = profile(RecordDict(), lambda: Profile([0.5, 0.2], [1] * 500, rows=40))
    assert told["num-examples"] == 40
    assert profile(RecordDict(), lambda: ([0.5, 0.2], [1, 2, 2]))["num-examples"] == 3


@pytest.mark.parametrize("kind", ["tokens", "batches"])
def test_what_a_profile_counts_is_not_what_a_reply_counts(kind):
    def client(message):
        if message.metadata.message_type == "query":
            share = message.metadata.dst_node_id / 10
            numbers = {"loss-entropy": share, "label-entropy": share, "gini-simpson": share}
            counted = 5000 if kind == "tokens" else 213
            return RecordDict(
                {"p": ConfigRecord({"partition-id": message.metadata.dst_node_id}),
                 "m": MetricRecord({**numbers, "num-examples": counted})}
            )  # fmt: skip
        rank = int(message.content["config"]["lora-rank"])
        moved = random_adapter(rank, seed=message.metadata.dst_node_id)
        return message_reply(moved, weight=50 if kind == "tokens" else 7)

    records = []
    strategy = FedLoRA(
        ranks=AutoRank(2, 4), scale=2.0, evaluate_fraction=0, listeners=[records.append]
    )
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    strategy.start(FakeGrid([1, 2, 3], client), start, num_rounds=2, timeout=5)
    assert [r["accepted"] for r in records if r["kind"] == "round" and r["round"]] == [3, 3]


def test_batches_without_a_label_train_nothing_and_say_so(caplog):
    logger = logging.getLogger("flwr")
    logger.propagate, before = True, logger.propagate
    model = causal("llama")
    rows = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    good = {"input_ids": rows, "labels": rows.clone()}
    empty = {"input_ids": rows, "labels": torch.full_like(rows, -100)}
    done = train_loop(model, [empty, good, empty], accumulation=2)
    assert torch.isfinite(torch.tensor(done.loss))
    assert any("2 batches have no label" in r.getMessage() for r in caplog.records)
    with pytest.raises(ValueError, match="all labels of all 2 batches are -100"):
        train_loop(model, [empty, empty])
    logger.propagate = before


# ----- who a node is ------------------------------------------------------------------------


def test_an_identity_in_one_line():
    app = ClientApp()
    register_identity(app)
    query = Message(RecordDict({"c": ConfigRecord({})}), dst_node_id=1, message_type="query")
    node = {"partition-id": 3, "max-rank": 8, "data-path": "/secret"}
    answer = app(query, Context(1, 1, node, RecordDict(), {}))
    assert dict(answer.content["properties"]) == {"partition-id": 3, "max-rank": 8}
    asked = RecordDict({"c": ConfigRecord({"profile": True})})
    query = Message(asked, dst_node_id=1, message_type="query")
    with pytest.raises(ValueError, match=r"register_profile\(app, measure\) gives one"):
        app(query, Context(1, 1, node, RecordDict(), {}))


@pytest.mark.parametrize("measure", [losses_and_labels, lambda: None, 7])
def test_a_measure_that_takes_no_context(measure):
    with pytest.raises(TypeError, match="expected a function of one argument, the context"):
        register_profile(ClientApp(), measure)


def test_the_global_model_keeps_its_type():
    arrays = run("bert", "replication", rounds=1)
    model = GlobalModel.from_tensors(from_record(arrays), 2.0)
    assert {t.dtype for t in model.adapter.tensors()} == {torch.float32}


def test_reported_limits_hold_for_message_api_apps():
    seen = {}

    def client(message):
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            return query_reply(**{"partition-id": node, "max-rank": node})
        seen[node] = int(message.content["config"]["lora-rank"])
        return message_reply(random_adapter(seen[node], seed=node))

    for ranks in (ListRank([4, 4, 4, 4]), ReportedRank(4)):
        strategy = FedLoRA(ranks=ranks, scale=2.0, evaluate_fraction=0)
        start = to_record(random_adapter(4, seed=0).to_state_dict())
        strategy.start(FakeGrid([1, 2], client), start, num_rounds=1, timeout=5)
        assert seen == {1: 1, 2: 2}


# ----- refused at the door, with the true reason ---------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 2)


REFUSED = {
    "tied": (Tied, {"target_modules": ["first"]}, r"is tied to another \(.*second"),
    "attention": (
        Attention, {"target_modules": ["attention"]}, "which has no single weight to merge into"
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", ["fedex", "flora"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_merged_into_is_refused_in_the_first_round(kind, rule):
    base, options, reason = REFUSED[kind]
    seen = []

    def make(rank):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=rank, init_lora_weights=False, **options)
        return peft.get_peft_model(base(), config)

    def client(message):
        try:
            apply_adapter(make(2), message)
        except ValueError as error:
            seen.append(str(error))
            return Error(code=0, reason=str(error))
        raise AssertionError("nothing was refused")

    start = to_record(peft.get_peft_model_state_dict(make(2)))
    strategy = FedLoRA(
        aggregation=rule, ranks=UniformRank(2), query=False, evaluate_fraction=0, min_answering=0
    )
    strategy.start(FakeGrid([1], client), start, num_rounds=1, timeout=5)
    (said,) = seen
    with pytest.raises(ValueError, match=reason):
        raise ValueError(said)
    assert "use a rule that does not merge" in said


@pytest.mark.parametrize("kind", REFUSED)
def test_and_works_with_a_rule_that_does_not_merge(kind):
    base, options, _ = REFUSED[kind]
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    models = {node: peft.get_peft_model(base(), config) for node in (1, 2)}

    def client(message):
        model = models[message.metadata.dst_node_id]
        apply_adapter(model, message)
        return make_reply(model, message, num_examples=3).content

    start = to_record(peft.get_peft_model_state_dict(models[1]))
    strategy = FedLoRA(ranks=UniformRank(2), query=False, evaluate_fraction=0, min_replies=2)
    result = strategy.start(FakeGrid([1, 2], client), start, num_rounds=2, timeout=5)
    for key, tensor in from_record(result.arrays).items():
        torch.testing.assert_close(tensor, from_record(start)[key])


def test_merging_beside_an_attention_leaves_it_alone():
    model = peft.get_peft_model(
        Attention(), peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    )
    check_mergeable(model)
    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items()}
    merged = {f"merged.{k}": t for k, t in sent.items()}
    before = {k: t.clone() for k, t in model.state_dict().items() if "attention" in k}
    weight = model.base_model.model.head.base_layer.weight
    expected = (
        weight
        + merged["merged.base_model.model.head.lora_B.weight"]
        @ (merged["merged.base_model.model.head.lora_A.weight"])
    )
    config = {"lora-scale": 1.0, "lora-merges": True}
    receive(model, {**sent, **merged}, config)
    torch.testing.assert_close(weight, expected)
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())


@pytest.mark.parametrize("how", ["mica", "by hand"])
def test_a_frozen_factor_that_is_to_be_trained(how):
    options = {"init_lora_weights": "mica"} if how == "mica" else {}
    model = peft.get_peft_model(
        base_of("bert"), peft.LoraConfig(r=2, target_modules=["query"], **options)
    )
    factor = "B" if how == "mica" else "A"
    if how == "by hand":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" not in name and parameter.requires_grad)
    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match=f"lora_{factor} is frozen in this model") as caught:
        receive(model, sent, {"lora-scale": 1.0, "lora-train": "AB"})
    assert ("'mica'" in str(caught.value)) == (how == "mica")
    other = "A" if factor == "B" else "B"
    for _ in range(2):
        receive(model, sent, {"lora-scale": 1.0, "lora-train": other})
        moving = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}
        assert moving
        assert all(f"lora_{other}" in name for name in moving)


def test_what_the_server_freezes_it_may_thaw():
    model = lora_of("bert")
    sent = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items()}
    for trained in ("B", "A", "AB"):  # rolora, and one model that serves another run
        receive(model, sent, {"lora-scale": 1.0, "lora-train": trained})
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)


def causal_lm(**options):
    config = tf.LlamaConfig(**SMALL, intermediate_size=16, pad_token_id=0)
    return peft.get_peft_model(tf.LlamaForCausalLM(config), peft.LoraConfig(r=2, **options))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "embed_tokens"],
                                     ["q_proj", "embed_tokens", "lm_head"]])  # fmt: skip
def test_embeddings_that_peft_puts_beside_an_adapter(targets):
    model = causal_lm(target_modules=targets)
    state = peft.get_peft_model_state_dict(model)
    assert any("base_layer.weight" in key for key in state)
    adapter = Adapter.from_state_dict(state, config=model.peft_config["default"])
    assert {name.rpartition(".")[2] for name in adapter.pairs} == set(targets)
    assert not adapter.dense
    receive(model, state, {"lora-scale": 4.0})
    assert set(send(model, {})) == set(adapter.to_state_dict())


def test_trained_tokens_are_refused_by_name():
    model = causal_lm(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    state = peft.get_peft_model_state_dict(model)
    with pytest.raises(AdapterError, match="trainable_token_indices, which is not supported"):
        Adapter.from_state_dict(state)


# ----- how many rows a profile looks at ------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 3])
def test_the_servers_number_of_rows_reaches_the_measure(limit):
    told = []

    def measure(context, limit):
        told.append(limit)
        return [1.0, 2.0], [0, 1]

    app = ClientApp()
    register_profile(app, measure)
    asked = RecordDict({"c": ConfigRecord({"profile": True, "profile-samples": limit})})
    query = Message(asked, dst_node_id=1, message_type="query")
    app(query, Context(1, 1, {}, RecordDict(), {}))
    assert told == [limit]

    def own(*, limit=7):
        told.append(limit)
        return [1.0, 2.0], [0, 1]

    for measured in (own, lambda: own(limit=9), functools.partial(own, limit=8)):
        profile(RecordDict(), measured, limit=limit)
    assert told[1:] == [limit or 7, 9, 8]
    message = Message(
        RecordDict({
            "arrays": to_record(peft.get_peft_model_state_dict(lora_of("bert"))),
            "config": ConfigRecord(
                {"lora-scale": 2.0, "profile": True, "profile-samples": limit, "wire-dtype":
                 "float32"}
            ),
        }),
        dst_node_id=1, message_type="train",
    )  # fmt: skip
    apply_adapter(lora_of("bert"), message, Context(1, 1, {}, RecordDict(), {}), measure=own)
    assert told[4:] == [limit or 7]
