"""The converted FlowerTune app, in process, with a tiny model."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from tests.fakes import FakeGrid

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "flowertune_llm"


@pytest.fixture
def run_config(tmp_path: Path, monkeypatch) -> dict:
    """Return a run config that names a tiny random model and made-up sums."""
    monkeypatch.syspath_prepend(EXAMPLE)
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    words = ["<unk>", "<end>", "and", "is", "What", "###", "Instruction:", "Response:",
             *map(str, range(20))]  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = FastTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48,
                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=128, eos_token_id=1, pad_token_id=1, bos_token_id=0)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    sums = [
        {"instruction": f"What is {a} and {b}", "response": f" {a} and {b} is {a + b} "}
        for a in range(9)
        for b in range(9)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    changes = {"model": str(tmp_path / "model"), "data": str(tmp_path / "sums.jsonl"),
               "output": str(tmp_path / "out"), "rounds": 2,
               "steps": 12, "batch-size": 8, "learning-rate": 0.03}  # fmt: skip
    flat = flatten_dict(project["tool"]["flwr"]["app"]["config"])
    assert changes.keys() < flat.keys()
    return {**flat, **changes}


@pytest.mark.parametrize("rule", ["flexlora", "fedex"])  # fedex merges a part into the base
def test_the_app_tunes_a_tiny_model(run_config, tmp_path, rule):
    from flowertune_llm import client_app, server_app

    client_app.resident_model.cache_clear()
    client_app.tokenizer_of.cache_clear()
    run_config["aggregation"] = rule
    contexts = {
        node: Context(1, node, {"partition-id": node - 1, "num-partitions": 2, "max-rank": rank},
                      RecordDict(), run_config)
        for node, rank in ((1, 2), (2, 4))
    }  # fmt: skip

    def client(message):
        return client_app.app(message, contexts[message.metadata.dst_node_id]).content

    server_app.app(FakeGrid([2, 1], client), Context(1, 0, {}, RecordDict(), run_config))
    told = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    done = [record for record in told if record["kind"] == "client"]
    assert [record["rank"] for record in done] == [2, 4] * 2
    assert all(record["status"] == "ok" and record["steps"] == 12 for record in done)
    assert [record["num-examples"] for record in done] == [41, 40] * 2
    # The adapter opens in PEFT, and has learned what the clients have.
    rows = client_app.own_rows(contexts[1])
    assert [label for label in rows[3]["labels"] if label != client_app.IGNORED][-1] == 1  # the end
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out/adapter")
    before = AutoModelForCausalLM.from_pretrained(run_config["model"])

    def loss(model):
        with torch.no_grad():
            each = [
                model(**{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}).loss
                for row in rows
            ]
        return float(torch.stack(each).mean())

    assert loss(opened) < loss(before) - 0.1


def test_the_readme_marks_what_the_files_do():
    source = (EXAMPLE / "flowertune_llm/client_app.py").read_text()
    source += (EXAMPLE / "flowertune_llm/server_app.py").read_text()
    readme = (EXAMPLE / "README.md").read_text()
    for call in ("register_identity(app)", "apply_adapter(model, message, context)", "make_reply(",
                 "FedLoRA(", "ReportedRank("):  # fmt: skip
        assert call in source
        assert call in readme
