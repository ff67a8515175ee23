"""Bases of 4 and 8 bits and optimiser states of 8, against their dequantised weights."""

import copy
import json

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedlora_app import client_app, server_app
from fedlora_app.config.keys import ModelConfig, RunConfig, TrainConfig
from fedlora_app.config.precision import with_precision
from fedlora_app.config.read import read_config
from fedlora_app.launch import door
from fedlora_app.launch.door import check_model
from fedlora_app.launch.inspection import Report
from fedlora_app.models import bits
from fedlora_app.models.language import build_language_model
from fedlora_app.models.lora import add_lora
from fedlora_app.report.records import read_records
from fedlora_app.tasks import make_task
from fedlora_app.training import rates, train
from strategies.client import adapter_state, load_adapter
from strategies.lora import Adapter
from strategies.updates import Updates
from tests.app.test_language import WORDS, config, folder, written  # noqa: F401
from tests.fakes import FakeGrid
from tests.integration.test_options import BASE, NODES, Nodes

KINDS = ("4bit", "8bit")


def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="the extra [quantization]")


def settings(folder, path, kind="4bit", **flat):  # noqa: F811
    return config(folder, path, **{"model.quantization": kind, **flat})


@pytest.fixture
def rows(tmp_path):
    found = [{"prompt": "what is", "completion": " ".join(WORDS[: 1 + i % 5])} for i in range(30)]
    return written(tmp_path, found)


def dequantised(model, plain):
    """Return ``plain`` with the weights that a quantised model computes with."""
    functional = bitsandbytes().functional
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit":
            new = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            codes = weight.data if weight.CB is None else weight.CB
            new = codes.float() * scale[:, None] / 127
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(new.float())
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_what_its_few_bits_say(folder, kind):  # noqa: F811
    bitsandbytes()
    told = ModelConfig(name=str(folder))
    few = build_language_model(ModelConfig(name=str(folder), quantization=kind))
    plain = build_language_model(told)
    before = copy.deepcopy(plain.state_dict())
    ids = torch.tensor([[6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        expected = dequantised(few, plain)(input_ids=ids).logits
        found = few(input_ids=ids).logits
    scale = float(expected.abs().max())
    # 8-bit products round what comes in to 8 bits as well.
    torch.testing.assert_close(
        found, expected, rtol=0, atol=scale * {"4bit": 1e-4, "8bit": 0.02}[kind]
    )
    moved = [
        float((plain.state_dict()[k] - v).abs().max()) for k, v in before.items() if "proj" in k
    ]
    assert min(moved) > 0
    again = build_language_model(ModelConfig(name=str(folder), quantization=kind))
    assert all(torch.equal(a, b) for a, b in zip(few.parameters(), again.parameters(), strict=True))
    assert not few.training


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_on_a_base_that_stays(folder, rows, kind):  # noqa: F811
    bitsandbytes()
    told = with_precision(settings(folder, rows, kind, **{"train.precision": "auto"}))
    assert told.train.precision == "bfloat16"
    task = make_task(told)
    inputs = task.for_training(task.encode(task.train_rows()))
    model = add_lora(
        task.model({}, seed=0, precision=told.train.precision), told.lora, rank=4, seed=0
    )
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    codes = {torch.uint8, torch.int8}
    assert any(p.dtype in codes for p in frozen.values())
    losses = []
    for rank in (4, 8, 2):  # a resident model serves one rank after the other
        state = {key: value.clone() for key, value in adapter_state(model).items()}
        load_adapter(model, Adapter.from_state_dict(state, 2.0).with_rank(rank))
        keys = TrainConfig(
            steps=12, learning_rate=0.05, precision="bfloat16", gradient_checkpointing=rank == 8
        )
        done = train(model, inputs, keys, seed=0)
        losses.append(done.loss)
    assert losses[-1] < losses[0] - 0.05
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_door_reads_no_weights(folder, rows, kind):  # noqa: F811
    bitsandbytes()
    parts = read_config(settings(folder, rows, kind, **{"data.packing": True}).to_flat())
    found = parts.task.train_rows()
    assert "none new" in check_model(parts, Report(parts.task, found, found))
    flat = settings(folder, rows, kind, **{"lora.dora": True}).to_flat()
    if kind == "8bit":
        with pytest.raises(ValueError, match=r"lora\.dora: .* does not give back at 8 bits"):
            read_config(flat)
    else:
        parts = read_config(flat)
        check_model(parts, Report(parts.task, found, found))


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_rules_that_merge_are_refused(folder, rows, rule):  # noqa: F811
    with pytest.raises(ValueError, match=r"merges into .* would round every merge to 4 bits"):
        read_config(settings(folder, rows, aggregation=rule).to_flat())


def test_only_language_models_have_few_bits(folder, rows):  # noqa: F811
    with pytest.raises(ValueError, match=r"'text-classification' trains weights in full"):
        read_config(settings(folder, rows, task="text-classification").to_flat())


def test_without_bitsandbytes_the_door_says_what_to_install(folder, rows, monkeypatch):  # noqa: F811
    monkeypatch.setattr(door, "installed", lambda: False)
    monkeypatch.setattr(bits, "installed", lambda: False)
    told = settings(folder, rows, **{"train.optimizer": "adamw-8bit"})
    problems = door._optional(told)
    assert [problem.split(":")[0] for problem in problems] == [
        "model.quantization = '4bit'",
        "train.optimizer = 'adamw-8bit'",
    ]
    assert all("pip install 'fedlora[quantization]'" in problem for problem in problems)
    with pytest.raises(ValueError, match="bitsandbytes is not installed"):
        make_task(told).model({}, seed=0)
    with pytest.raises(ValueError, match="bitsandbytes is not installed"):
        rates(told.train)
    assert door._optional(config(folder, rows)) == []


@pytest.mark.parametrize(
    ("found", "wanted", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, "none", "quantised by gptq, which cannot be trained"),
        ({"quant_method": "awq", "bits": 4}, "4bit", "quantised by awq, which cannot be trained"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "none", "= '4bit'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "4bit", "= '8bit'"),
    ],
)
def test_checkpoints_that_are_quantised_are_named(folder, tmp_path, found, wanted, match):  # noqa: F811
    copied = tmp_path / "model"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    held = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**held, "quantization_config": found}))
    with pytest.raises(ValueError, match=match):
        build_language_model(ModelConfig(name=str(copied), quantization=wanted), shapes_only=True)


def test_a_checkpoint_of_four_bits_is_taken_as_it_is(folder, tmp_path):  # noqa: F811
    bitsandbytes()
    few = build_language_model(ModelConfig(name=str(folder), quantization="4bit"))
    few.save_pretrained(tmp_path / "few")
    again = build_language_model(ModelConfig(name=str(tmp_path / "few"), quantization="4bit"))
    ids = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, few(input_ids=ids).logits)


@pytest.mark.parametrize("name", bits.OPTIMIZERS)
def test_optimisers_with_small_states_take_the_steps_of_adamw(name):
    bitsandbytes()
    found = []
    for kind in ("adamw", name):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        start = weight.detach().clone()
        keys = rates(TrainConfig(optimizer=kind, weight_decay=0.1, head_learning_rate=0.01))
        updates = Updates({"weight": weight}, 5, **keys)
        for _ in range(5):
            (weight**2).sum().backward()
            updates.step()
        found.append(weight.detach() - start)
    assert float((found[0] - found[1]).abs().max()) < 0.1 * float(found[0].abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_as_if_it_had_not_ended(folder, rows, kind, tmp_path):  # noqa: F811
    bitsandbytes()
    flat = {**BASE, "task": "causal-lm", "model.name": str(folder), "data.name": str(rows),
            "model.quantization": kind, "train.optimizer": "adamw-8bit",
            "checkpoint-every": 1, "train.precision": "auto", "data.max-length": 32}  # fmt: skip

    def run(name, **more):
        told = RunConfig.from_flat({**flat, **more, "output": str(tmp_path / name)}).to_flat()
        client_app._resident_model.cache_clear()
        nodes = Nodes(told)
        context = Context(1, 0, {}, RecordDict(), told)
        server_app.main(FakeGrid(NODES, nodes), context)
        assert not nodes.failed
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    whole = run("whole")
    run("parts", rounds=1)
    resumed = run("parts", **{"resume-from": "latest"})
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    told = {r["precision-bits"] for r in records if r["kind"] == "client"}
    assert told == {bits.BITS[kind]}
    other = {"resume-from": "latest", "model.quantization": "none"}
    with pytest.raises(ValueError, match=r"model\.quantization"):
        run("parts", **other)
