"""The whole examples of docs/plugging-in.md: taken out of the page and run."""

import importlib
import re
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
from flwr.app import Context, Error, RecordDict
from transformers import LlamaConfig, LlamaForCausalLM

from strategies import FedLoRA
from strategies.client import adapter_state, apply_adapter, make_reply, receive
from strategies.doors import FEDAVG
from strategies.messages import from_record, to_record
from strategies.ranks import UniformRank
from tests.fakes import FakeGrid

PAGE = (Path(__file__).parents[2] / "docs" / "plugging-in.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\w+)\.py -->\n```python\n(.*?)```", PAGE, re.DOTALL))
NODES = [310, 4, 77]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Import every file of the page; afterwards nobody knows of them."""
    assert set(FILES) == {"task", "server", "message_client", "numpy_client"}
    folder = tmp_path_factory.mktemp("page")
    for name, code in FILES.items():
        assert max(map(len, code.splitlines())) <= 100
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield {name: importlib.import_module(name) for name in FILES}
    sys.path.remove(str(folder))
    for name in FILES:
        del sys.modules[name]


@pytest.mark.parametrize("api", ["message", "numpy"])
def test_autorank_with_both_client_apis(example, api, tmp_path):
    app = example[f"{api}_client"].app
    contexts = {
        node: Context(1, node, {"partition-id": i}, RecordDict(), {})
        for i, node in enumerate(NODES)
    }
    ranks = {node: [] for node in NODES}

    def nodes(message):
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "train":
            (config,) = message.content.config_records.values()
            ranks[node].append(config["lora-rank"])
        try:
            return app(message, contexts[node]).content
        except Exception as error:  # as Flower reports it
            return Error(code=0, reason=repr(error))

    folder = tmp_path / "adapter"
    strategy, result = example["server"].main(FakeGrid(NODES, nodes), folder, api)
    assert strategy.round.accepted == 3
    assert all(len(given) == 4 for given in ranks.values())
    assert len({given[0] for given in ranks.values()}) > 1  # by data, not all the fallback
    assert all(2 <= rank <= 8 for given in ranks.values() for rank in given)
    assert all(len(context.state) for context in contexts.values())  # the profiles
    task = example["task"]
    server, x = task.make_model(), torch.randn(5, 8)
    receive(server, from_record(result.arrays), {"lora-scale": task.SCALE})
    plain = peft.PeftModel.from_pretrained(task.make_model().unload(), str(folder))
    torch.testing.assert_close(plain(x), server(x), rtol=1e-4, atol=1e-5)


def test_the_training_loop_of_the_page():
    """Its lines are the body of a client's function, as they stand."""
    (code,) = re.findall(
        r"```python\n(from strategies.training import train_loop\n.*?)```", PAGE, re.S
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    num_attention_heads=2)
    )  # fmt: skip
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    start = to_record({k: t.clone() for k, t in adapter_state(model).items()})
    ids = torch.randint(23, (5, 6))
    names = {
        "apply_adapter": apply_adapter,
        "make_reply": make_reply,
        "model": model,
        "loader": [{"input_ids": row[None], "labels": row[None]} for row in ids],
        "context": Context(1, 7, {}, RecordDict(), {}),
    }
    exec(f"def fit(message):\n{textwrap.indent(code, '    ')}", names)
    seen = []
    strategy = FedLoRA(
        ranks=UniformRank(2), query=False, evaluate_fraction=0, listeners=[seen.append]
    )
    strategy.start(
        FakeGrid([7], lambda message: names["fit"](message).content), start, num_rounds=1
    )
    (reply,) = [record for record in seen if record["kind"] == "client"]
    assert (reply["status"], reply["num-examples"], reply["steps"]) == ("ok", 5, 3)


def test_the_page_maps_every_argument_of_fedavg():
    table = PAGE[PAGE.index("## FedAvg's arguments") : PAGE.index("## Message API apps")]
    for name in FEDAVG:
        assert f"`{name}" in table, name
        with pytest.raises(TypeError, match=f"'{name}' of FedAvg is"):
            FedLoRA(**{name: None})
