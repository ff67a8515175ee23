"""Whole runs on a tiny language model, in this process: server app, client app, run folder."""

import json
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedlora_app import client_app, server_app
from fedlora_app.config.read import read_config
from fedlora_app.data.partition import shares
from fedlora_app.launch.door import check_model
from fedlora_app.launch.inspection import Report, inspect
from fedlora_app.report.page import RunFiles, page
from fedlora_app.tasks import make_task
from strategies.profiling import profile_metrics
from tests.app.test_language import WORDS, config, folder, written  # noqa: F401
from tests.fakes import FakeGrid
from tests.integration.conftest import records

NODES = (11, 12, 13)


def ran(flat, nodes=NODES, own=()):
    """Run the app as Flower does, without its processes; return the records."""
    for cached in ("_task", "_resident_model", "_train_rows", "_shares", "_partition_rows",
                   "_own_rows", "_about"):  # fmt: skip
        getattr(client_app, cached).cache_clear()
    contexts = {}
    for i, node in enumerate(nodes):
        share = {"partition-id": i, "num-partitions": len(nodes)}
        share = {"partition-id": i, **own[i]} if own else share
        contexts[node] = Context(1, node, share, RecordDict(), flat)

    def client(message):
        reply = client_app.app(message, contexts[message.metadata.dst_node_id])
        return reply.error if reply.has_error() else reply.content

    server_app.app(FakeGrid(nodes, client), Context(1, 0, {}, RecordDict(), flat))


@pytest.fixture
def flat(folder, tmp_path):  # noqa: F811
    """Rows of three topics, the longer the higher the number."""
    rows = [
        {"prompt": " ".join(WORDS[i % 5 : i % 5 + 2]), "topic": "abc"[i % 3],
         "completion": " ".join(WORDS[: 1 + 3 * (i % 3)])}
        for i in range(90)
    ]  # fmt: skip
    more = {"output": str(tmp_path / "run"), "rounds": 1, "train.steps": 2, "ranks.list": "2,4",
            "sampling.fraction": 1.0, "checkpoint-every": 0,
            "evaluate.clients": 1.0}  # fmt: skip
    return config(folder, written(tmp_path, rows), **more).to_flat()


@pytest.fixture
def output(flat, tmp_path):
    return tmp_path / "run"


def test_autorank_by_the_tokens_of_answers_and_clients_weighed_by_them(flat, output):
    flat |= {"ranks.policy": "autorank", "ranks.min": 1, "ranks.max": 4, "ranks.fallback": 1,
             "weight-by": "trained-tokens", "data.partition": "natural",
             "data.partition-column": "topic", "evaluate.generate": 3,
             "data.label-column": "auto", "evaluate.generate-tokens": 4}  # fmt: skip
    task = read_config(flat).task
    rows = task.train_rows()
    assert task.strata_names(rows.about) == ("a", "b", "c")
    ran(flat)
    told = records(output, "client")
    assert [r["status"] for r in told] == ["ok"] * 3
    # Everybody's size is told in tokens, before the round (profile), in it, and in evaluation.
    (ranks,) = records(output, "ranks")
    sizes = [r["num-examples"] for r in told]
    assert [c["samples"] for c in ranks["clients"]] == sizes
    counted = [task.size(task.encode(rows.take(part))) for part in shares(task, rows, 3)]
    assert all(0.8 * n < size < n for size, n in zip(sizes, counted, strict=True))  # held out
    assert sizes[2] > 3 * sizes[0]
    tested = records(output, "client-evaluation")
    assert sum(r["num-examples"] for r in tested) == sum(counted) - sum(sizes)
    # What the model wrote before and after.
    kept = records(output, "samples")
    assert [r["round"] for r in kept] == [0, 1]
    assert "server_exact" in records(output, "round")[-1]
    assert json.loads((output / "summary.json").read_text())["exact"] >= 0
    html = page(RunFiles.read(output))
    assert "Samples" in html
    assert "trained tokens" in html


def test_a_profile_is_of_categories_or_else_of_trained_tokens(flat):
    task = read_config(flat).task
    rows = task.train_rows()
    inputs = task.encode(rows)
    assert task.mix(inputs, task.strata(rows)) is task.strata(rows)
    tokens = task.mix(inputs, np.zeros(0, np.int64))
    by_hand = [i for row in inputs.labels for i in row if i != -100]
    assert tokens.tolist() == by_hand
    shares_of = np.unique(by_hand, return_counts=True)[1] / len(by_hand)
    found = profile_metrics([1.0, 2.0], tokens)
    assert found["label-entropy"] == pytest.approx(-(shares_of * np.log(shares_of)).sum())
    assert found["gini-simpson"] == pytest.approx(1 - (shares_of**2).sum())


def test_rows_are_shared_out_by_a_category_or_by_their_length(flat):
    by_topic = read_config({**flat, "data.partition": "shards", "data.shards-per-client": 1}).task
    rows = by_topic.train_rows()
    assert "category from 'topic'" in str(inspect(by_topic, clients=3))
    for part in shares(by_topic, rows, 3):
        assert len(set(rows.targets[part])) <= 2  # a tenth is held out, so a cut may be inside one
    by_length = {**flat, "data.label-column": "length", "data.partition": "pathological",
                 "data.classes-per-client": 1}  # fmt: skip
    task = read_config(by_length).task
    rows = task.train_rows()
    assert task.strata_names(rows.about) == ("shortest", "short", "long", "longest")
    length = np.array([sum(len(text) for _, text in turns) for turns in rows.items])
    order = rows.targets[np.argsort(length, kind="stable")]
    assert (np.diff(order) >= 0).all()
    spans = [length[part] for part in shares(task, rows, 4)]
    spans.sort(key=np.min)
    assert all(a.max() <= b.min() for a, b in pairwise(spans))
    assert task.test_rows(rows.about).about == rows.about  # by the bounds of training


def test_columns_of_categories(folder, tmp_path):  # noqa: F811
    rows = [{"prompt": "what", "completion": "six", "category": ["x", "y"][i % 2], "id": i,
             "source": None if i else "web"} for i in range(40)]  # fmt: skip
    path = written(tmp_path, rows)
    known = make_task(config(folder, path)).train_rows().about
    assert known == {"categories": ["x", "y"]}
    with pytest.raises(ValueError, match=r"data.label-column; did you mean 'source'\?"):
        make_task(config(folder, path, **{"data.label-column": "sources"})).train_rows()
    own = written(tmp_path, [{**rows[0], "category": "z"}, rows[1]], "own.jsonl")
    task = make_task(config(folder, path))
    assert task.own_rows(str(own), known).targets.tolist() == [2, 1]
    assert task.strata(task.own_rows(str(own), {})) is None
    # Of usual columns the first in which values come again.
    each = [{**row, "category": f"c{i}"} for i, row in enumerate(rows)]
    unique = written(tmp_path, each, "u.jsonl")
    found = make_task(config(folder, unique)).train_rows()
    assert found.about == {"categories": ["(none)", "web"]}
    assert found.origin.columns["category"] == "source"


def test_keys_that_the_task_would_pass_over_are_refused(flat):
    for key, value in {
        "evaluate.generate": 3,
        "data.packing": True,
        "data.train-on": "all",
    }.items():
        with pytest.raises(ValueError, match=f"{key} = .*'text-class.*only causal-lm, preference"):
            read_config({key: value})
        assert read_config({**flat, key: value})
    with pytest.raises(ValueError, match=r"train\.beta = 0\.5: task = 'causal-lm' does not"):
        read_config({**flat, "train.beta": 0.5})
    with pytest.raises(ValueError, match=r"data\.image-column = 'scan': task = 'causal-lm'"):
        read_config({**flat, "data.image-column": "scan"})


def test_units_are_the_task_s(flat):
    with pytest.raises(
        ValueError, match="weight-by: expected rows or clients or trained-tokens for task"
    ):
        read_config({**flat, "weight-by": "bytes"})
    with pytest.raises(
        ValueError, match="weight-by: expected rows or clients for task = 'text-classific"
    ):
        read_config({"weight-by": "trained-tokens"})


def test_bad_rows_and_templates_are_told_at_the_door(folder, tmp_path):  # noqa: F811
    said = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]
    rows = [{"messages": said}] * 60

    def looked(rows, **flat):
        task = make_task(config(folder, written(tmp_path, rows), **flat))
        return task, str(inspect(task))

    with pytest.raises(ValueError, match="expected rows with an answer, got 30 without"):
        looked([{"messages": said[:1]}] * 30)
    task, block = looked([*rows, {"messages": said[:1]}, {"messages": []}, {"messages": None}])
    assert "(3 left out: no messages)" in block
    rows.append({"messages": [{"role": "system", "content": "be kind"}, *said]})
    task, _ = looked(rows)  # the last row alone has a system turn
    task.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + task.tokenizer.chat_template
    )
    with pytest.raises(ValueError, match=r"fails on turns of system, user, assistant: .*no system"):
        inspect(task)
    # A template that rewrites answers: nobody can tell what to train, unless it is everything.
    shouting = (
        "{{ messages | length }}{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}"
    )
    for trained, error in (("answers", "leaves out or changes an answer"), ("all", None)):
        task, _ = looked(rows[:60], **{"data.train-on": trained})
        task.tokenizer.chat_template = shouting
        if error:
            with pytest.raises(ValueError, match=error):
                inspect(task)
        else:
            assert "<unk>⟦</s> <unk> </s>⟧" in str(inspect(task))


def test_the_tokenizer_of_another_model_is_told_at_the_door(folder, tmp_path):  # noqa: F811
    path = written(tmp_path, [{"text": "be kind again"}] * 30)
    parts = read_config(config(folder, path).to_flat())
    parts.task.tokenizer.add_tokens(["more", "words"])
    rows = parts.task.train_rows()
    with pytest.raises(ValueError, match="knows 20 tokens, and its embedding has 18 rows"):
        check_model(parts, Report(parts.task, rows, rows))


def test_the_example_is_what_the_tokens_say_after_the_cut(folder, tmp_path):  # noqa: F811
    row = {"prompt": "two and " * 9, "completion": "is four again"}
    path = written(tmp_path, [row] * 12)
    for most, shown in ((32, "<assistant>⟦is four again </s>⟧"), (4, "<assistant>⟦is four⟧")):
        task = make_task(config(folder, path, **{"data.max-length": most}))
        text = "\n".join(task.show(task.train_rows()))
        assert text.endswith(shown)
        assert text.count("two") == (9 if most == 32 else 0)
