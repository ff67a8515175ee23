"""A language model on a real SuperLink and warm SuperNodes, each with a jsonl of its own."""

import json

import pytest

from fedlora_app.launch.superlink import SuperLink
from tests.app.test_language import WORDS, config, folder, written  # noqa: F401
from tests.integration.conftest import ROOT, records


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_supernodes_tune_a_language_model_on_their_own_rows(folder, tmp_path):  # noqa: F811
    kinds = {  # not even of the same format
        "mine.jsonl": lambda i: {"prompt": WORDS[i % 5],
                                 "completion": " ".join(WORDS[: 1 + i % 3])},
        "yours.jsonl": lambda i: {"messages": [
            {"role": "user", "content": WORDS[i % 7]},
            {"role": "assistant", "content": " ".join(WORDS[: 4 + i % 3])}]},
    }  # fmt: skip
    sites = [written(tmp_path, [row(i) for i in range(30)], name) for name, row in kinds.items()]
    test = written(tmp_path, [{"question": "two", "answer": "is four"}] * 60, "server.jsonl")
    output = tmp_path / "run"
    told = config(
        folder, test, output=str(output), rounds=2,
        **{"train.steps": 4, "train.learning-rate": 0.02, "sampling.fraction": 1.0,
           "ranks.policy": "reported", "ranks.max": 8,
           "weight-by": "trained-tokens", "evaluate.every": 1,
           "evaluate.generate": 2, "evaluate.generate-tokens": 4},
    )  # fmt: skip
    with SuperLink() as link:
        for path, limit in zip(sites, (2, 8), strict=True):
            link.start_supernode(f'data-path="{path}" max-rank={limit}', warm=True)
        run = link.run(ROOT, told.to_flat())
        lines = list(link.stream(run))
        assert link.status(run).completed, lines[-20:]
    done = records(output, "client")
    assert sorted((r["round"], r["rank"]) for r in done) == [(1, 2), (1, 8), (2, 2), (2, 8)]
    assert all(r["status"] == "ok" for r in done)
    short, long = ({r["num-examples"] for r in done if r["rank"] == rank} for rank in (2, 8))
    assert max(short) < min(long) / 2  # tokens: as many rows, longer answers
    first, *_, last = records(output, "round")
    assert last["server_loss"] < first["server_loss"]
    assert [r["round"] for r in records(output, "samples")] == [0, 1, 2]
    assert json.loads((output / "summary.json").read_text())["task"] == "causal-lm"
    assert (output / "adapter" / "adapter_model.safetensors").exists()
