from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_app.config import precision
from fedlora_app.config.keys import DataConfig, ModelConfig, RunConfig, TrainConfig
from fedlora_app.config.precision import native_bfloat16, with_precision
from fedlora_app.evaluation import per_sample_losses
from fedlora_app.models.loading import build_model, build_tokenizer
from fedlora_app.models.lora import add_lora
from fedlora_app.timing import training_step
from strategies.profiling import METRICS, profile_metrics
from strategies.wallclock import rank_flops
from tests.app.texts import TASK, load_train, tokenize

L3 = ModelConfig("packaged:minilm-l3")


@pytest.fixture
def hardware(monkeypatch):
    """Return what makes this machine one that says so of itself."""

    def say(**known: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
        native_bfloat16.cache_clear()

    yield say
    native_bfloat16.cache_clear()


def in_precision(value: str, rule: str = "replication") -> str:
    config = RunConfig(aggregation=rule, train=TrainConfig(precision=value))
    return with_precision(config).train.precision


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_auto_is_what_the_hardware_multiplies(hardware, name) -> None:
    hardware(avx2=True, **{name: True})
    assert in_precision("auto") == "bfloat16"
    hardware(avx2=True, **{name: False})
    assert in_precision("auto") == "float32"


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_rules_that_merge_compute_in_float32(hardware, rule) -> None:
    hardware(avx512_bf16=True)
    assert in_precision("auto", rule) == "float32"
    assert in_precision("auto", "a plug-in that is not here") == "float32"


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_what_is_named_stays(hardware, wanted) -> None:
    hardware(avx512_bf16=wanted == "float32")
    assert in_precision(wanted) == wanted


@pytest.mark.parametrize(
    ("low", "expected"), [(1.0, True), (1.4, True), (1.6, False), (5.0, False)]
)
def test_where_torch_does_not_say_a_stop_watch_does(hardware, monkeypatch, low, expected) -> None:
    hardware(avx2=True)
    seconds = {torch.float32: 2.1, torch.bfloat16: low}
    monkeypatch.setattr(precision, "_speed", seconds.__getitem__)
    assert native_bfloat16() is expected


def test_the_stop_watch_runs(hardware) -> None:
    hardware()
    assert native_bfloat16() in (True, False)


@pytest.mark.parametrize(("native", "expected"), [(True, True), (False, False)])
def test_a_gpu_is_asked_before_the_cpu(hardware, monkeypatch, native, expected) -> None:
    hardware(avx512_bf16=not native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    assert native_bfloat16() is expected


def test_profiles_of_both_precisions_can_be_compared() -> None:
    data = DataConfig(max_length=24)
    rows = tokenize(load_train(data).take(np.arange(200)), build_tokenizer(L3), data.max_length)
    found = {}
    for name in ("float32", "bfloat16"):
        base = build_model(L3, num_labels=8, seed=0, precision=name)
        losses = per_sample_losses(TASK, base, rows, batch_size=64, precision=name)
        found[name] = profile_metrics(losses, rows.labels)
    for key in METRICS:
        assert found["bfloat16"][key] == pytest.approx(found["float32"][key], rel=2e-3)


def test_plans_of_both_precisions_count_the_same_work() -> None:
    config = RunConfig(model=L3, data=DataConfig(max_length=16))
    rows = tokenize(load_train(config.data).take(np.arange(4)), build_tokenizer(L3), 16)
    counted = []
    for name in ("float32", "bfloat16"):
        told = replace(config, train=TrainConfig(precision=name))
        base = build_model(L3, num_labels=8, seed=0, precision=name)
        model = add_lora(base, config.lora, rank=8, seed=0)
        counted.append(rank_flops(lambda r, m=model, t=told: training_step(m, rows, t, r), 1, 8))
    assert counted[0] == counted[1]
