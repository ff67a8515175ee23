"""Which layers get LoRA, which variants are averaged, and that both go through a run."""

import pytest
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedlora_app import client_app, server_app
from fedlora_app.config.keys import LoraConfig, RunConfig
from fedlora_app.config.read import read_config
from fedlora_app.models.lora import REFUSED, add_lora
from tests.app.test_language import WORDS, config, folder, written  # noqa: F401
from tests.app.test_packing import gpt2, llama
from tests.fakes import FakeGrid
from tests.integration.test_options import BASE, NODES, Nodes

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("make", "targets", "expected"),
    [
        (llama, "auto", {"q_proj", "v_proj"}),
        (llama, "q_proj, o_proj", {"q_proj", "o_proj"}),
        (llama, "all-linear", ALL),
        (gpt2, "all-linear", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_which_layers_get_lora(make, targets, expected):
    model = add_lora(make(), LoraConfig(target_modules=targets), rank=2, seed=0)
    found = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters()
             if ".lora_A" in n}  # fmt: skip
    assert found == expected
    # PEFT's own "all-linear" takes the same layers.
    if targets == "all-linear":
        import peft

        other = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules="all-linear"))
        names = [{n for n, _ in m.named_parameters() if ".lora_A" in n} for m in (model, other)]
        assert names[0] == names[1]


@pytest.mark.parametrize("variant", [*REFUSED, "LoRA-GA", "pissa_niter_4", "lora+"])
def test_other_variants_are_refused_by_name(variant):
    with pytest.raises(ValueError, match=r"lora\.variant: expected one of lora, rslora, ") as error:
        read_config({"lora.variant": variant})
    assert repr(variant) in str(error.value)
    if variant in REFUSED:
        assert REFUSED[variant] in str(error.value)


def test_rslora_changes_how_clients_train_and_nothing_else(
    folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("fedlora_app.report.folder.plot_run", lambda *_: [])
    rows = [{"prompt": "what is", "completion": " ".join(WORDS[: 1 + i % 5])} for i in range(40)]
    flat = {**BASE, "task": "causal-lm", "model.name": str(folder), "lora.scale": 2.0,
            "data.name": str(written(tmp_path, rows)), "data.max-length": 32, "rounds": 1,
            "lora.target-modules": "all-linear", "train.group-by-length": True}  # fmt: skip

    def run(name, **more):
        told = RunConfig.from_flat({**flat, **more, "output": str(tmp_path / name)}).to_flat()
        client_app._resident_model.cache_clear()
        nodes = Nodes(told)
        server_app.main(FakeGrid(NODES, nodes), Context(1, 0, {}, RecordDict(), told))
        assert not nodes.failed
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    uniform = {"ranks.policy": "uniform", "ranks.rank": 4}
    plain, other = run("plain", **uniform), run("other", **{"lora.variant": "rslora", **uniform})
    b = [key for key in plain if "lora_B" in key]
    # The first step of AdamW moves B by the rate: at half the scale, half as far at the shared one.
    for key in b:
        assert float((other[key] - plain[key] / 2).norm()) < 0.02 * float(plain[key].norm())
    assert any(plain[key].any() for key in b)
    mixed = run("mixed", **{"lora.variant": "rslora"})  # ranks 2 and 4
    assert mixed.keys() == plain.keys()
