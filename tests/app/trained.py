"""Finished runs of every task, tiny and real, for tests of what is done with them afterwards."""

import json

import torch
import transformers
from flwr.app import Context, RecordDict

from fedlora_app import client_app, server_app
from fedlora_app.config.keys import RunConfig
from tests.app.test_images import classes, save_model
from tests.app.test_language import save_llama, written
from tests.app.test_models import SMALL
from tests.fakes import FakeGrid
from tests.integration.test_options import BASE, NODES, Nodes

WORDS = ["oil", "price", "bank", "rate"]


def text_files(folder, head="stock"):
    """Write a tiny BERT with a tokenizer of four words, and rows of two classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(**SMALL, num_attention_heads=2)
        transformers.BertForMaskedLM(config).save_pretrained(folder / "model")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder / "model")
    rows = [f"{a} {b},{a}" for a in ("oil", "bank") for b in ("price", "rate") for _ in range(12)]
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return {"model.name": str(folder / "model"), "data.name": str(folder), "model.head": head}


def image_files(folder):
    return {
        "task": "image-classification",
        "data.name": str(classes(folder / "d", each=20)),
        "model.name": str(save_model(folder / "model", "ViT")),
    }


def chat_files(folder):
    rows = [
        {"prompt": ["what is", "say it again", "two"][i % 3], "completion": ["four", "is"][i % 2]}
        for i in range(60)
    ]
    return {
        "task": "causal-lm",
        "model.name": str(save_llama(folder / "model")),
        "data.name": str(written(folder, rows)),
        "data.max-length": 32,
        "evaluate.generate-tokens": 4,
    }


def pair_files(folder):
    rows = [
        {"prompt": ["what is", "two"][i % 2], "chosen": "four", "rejected": "six three again"}
        for i in range(60)
    ]
    return {
        "task": "preference",
        "model.name": str(save_llama(folder / "model")),
        "data.name": str(written(folder, rows)),
        "data.max-length": 32,
        "evaluate.generate-tokens": 4,
    }


KINDS = {
    "texts, merged": lambda folder: {**text_files(folder), "aggregation": "flora"},
    "texts, mean-pool": lambda folder: {
        **text_files(folder, "mean-pool"), "aggregation": "fedmomentum"},
    "head alone": lambda folder: {**text_files(folder), "method": "head"},
    "images": lambda folder: {**image_files(folder), "aggregation": "fedex"},
    "chat": chat_files,
    "pairs": pair_files,
}  # fmt: skip


def finished(folder, kind, **changes):
    """Return the folder of a finished run of a kind."""
    learned = {"train.learning-rate": 0.05, "train.steps": 3, "rounds": 1}
    flat = {**BASE, **KINDS[kind](folder), **learned, "output": str(folder / "run"), **changes}
    flat = RunConfig.from_flat(flat).to_flat()
    nodes = Nodes(flat)
    client_app._resident_model.cache_clear()
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    server_app.main(FakeGrid(NODES, nodes), context)
    assert not nodes.failed
    return folder / "run"


def summary(run):
    return json.loads((run / "summary.json").read_text())
