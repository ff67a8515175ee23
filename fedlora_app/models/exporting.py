"""A trained model as folders that other libraries read: transformers, PEFT, sentence-transformers.

The mean-pool head is no class of transformers. Its layout is that of sentence-transformers
(``modules.json``): the encoder as ``AutoModel`` reads it, the mean over tokens, and the head as a
dense layer in ``2_Dense``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from fedlora_app.models.loading import DTYPES, MeanPoolClassifier
from strategies.checkpoint import export_peft
from strategies.lora import Adapter

if TYPE_CHECKING:
    from peft import PeftModel

ENCODER = "base_model.model.encoder."
MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))


def is_pooled(model: nn.Module) -> bool:
    """Tell whether a model is an encoder with the mean-pool head."""
    inner: Any = model
    return isinstance(
        inner.get_base_model() if hasattr(inner, "get_base_model") else inner, MeanPoolClassifier
    )


def dequantised(model: nn.Module) -> nn.Module:
    """Return a base of 4 or 8 bits with the same weights as float32 numbers.

    They are those the adapter was trained on, not those the few bits were made from.
    """
    inner: Any = model
    found: nn.Module = inner.dequantize().float()
    return found


def save_merged(model: PeftModel, folder: Path, *, dtype: str, max_length: int) -> None:
    """Write a model with its adapter merged into the weights; ``model`` is used up.

    Parameters
    ----------
    model : PeftModel
        With float32 weights.
    folder : Path
        There already.
    dtype : {"float32", "bfloat16", "float16"}
        What the merged weights are rounded to.
    max_length : int
        Tokens of a text, for the layout of the mean-pool head.
    """
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    pooled = isinstance(merged, MeanPoolClassifier)
    kind = {**DTYPES, "float16": torch.float16}[dtype]
    inner: Any = (merged.encoder if pooled else merged).to(kind)
    inner.save_pretrained(str(folder))
    if pooled:
        _save_head(merged, folder, max_length)


def save_encoder_adapter(
    model: PeftModel, adapter: Adapter, folder: Path, *, base: str, max_length: int
) -> None:
    """Write the adapter of a mean-pool model as one of its encoder alone, and the head beside it.

    Parameters
    ----------
    model : PeftModel
    adapter : Adapter
        What it holds.
    folder : Path
        There already.
    base : str
        What the encoder is called in ``adapter_config.json``.
    max_length : int
        As in ``save_merged``.
    """
    pairs = {
        module.replace(ENCODER, "base_model.model.", 1): pair
        for module, pair in adapter.pairs.items()
    }
    dense = {
        key.replace(ENCODER, "base_model.model.", 1): tensor
        for key, tensor in adapter.dense.items()
        if key.startswith(ENCODER)
    }
    export_peft(Adapter(pairs, dense), folder, base_model=base, task_type="FEATURE_EXTRACTION")
    _save_head(model.get_base_model(), folder, max_length)


def _save_head(model: Any, folder: Path, max_length: int) -> None:
    """Write the mean and the dense layer as sentence-transformers reads them."""
    head = model.classifier
    head = getattr(head, "modules_to_save", {"default": head})["default"]  # PEFT's wrapper
    wide, classes = head.in_features, head.out_features
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(MODULES)
    ]
    pooling = {"word_embedding_dimension": wide, "pooling_mode_mean_tokens": True}
    others = ("cls_token", "max_tokens", "mean_sqrt_len_tokens")
    dense = {
        "in_features": wide,
        "out_features": classes,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    for path, value in (
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}),
        ("1_Pooling/config.json", {**pooling, **{f"pooling_mode_{o}": False for o in others}}),
        ("2_Dense/config.json", dense),
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    weights = {
        f"linear.{name}": tensor.detach().float().cpu().contiguous()
        for name, tensor in head.state_dict().items()
    }
    save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
