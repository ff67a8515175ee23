"""BERT weights out of an ONNX file that the torch exporter wrote.

An ONNX file is a protocol buffer, a graph and arrays: reading it runs no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BertConfig

PREFIX = "auto_model."  # sentence-transformers keeps the encoder under this name


def read_bert(path: Path, *, head_size: int = 32) -> tuple[BertConfig, dict[str, Tensor]]:
    """Return the configuration and weights of an exported sentence-transformers BERT.

    Parameters
    ----------
    path : Path
        The ONNX file; its arrays lie inside it.
    head_size : int
        Width of an attention head, which no array tells (default: 32, as in MiniLM).

    Returns
    -------
    config : BertConfig
        Sizes from the arrays' shapes, the rest as in the original BERT.
    weights : dict of str to Tensor
        The parameters of ``BertModel`` without its pooler, float32.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no ONNX file, or its arrays do not fill a BERT.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers import BertConfig

    try:
        # Data outside the file would let it name any other file.
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise ValueError(f"{path}: expected an ONNX file, got something else") from error
    arrays = {
        array.name: onnx.numpy_helper.to_array(array)
        for array in graph.initializer
        if array.data_location != onnx.TensorProto.EXTERNAL
    }
    found = {name.partition(PREFIX)[2]: array for name, array in arrays.items() if PREFIX in name}
    # The exporter renames and transposes the weights of linear layers. Their biases keep
    # their names, so the Add that follows a MatMul says whose weight this was.
    producers = {output: node for node in graph.node for output in node.output}
    for add in (node for node in graph.node if node.op_type == "Add"):
        for bias, product in (tuple(add.input), tuple(add.input)[::-1]):
            node = producers.get(product)
            if PREFIX in bias and bias in arrays and node is not None and node.op_type == "MatMul":
                weight = bias.partition(PREFIX)[2].removesuffix("bias") + "weight"
                found[weight] = arrays[node.input[1]].T

    layers = {name.split(".")[2] for name in found if name.startswith("encoder.layer.")}
    try:
        vocabulary, width = found["embeddings.word_embeddings.weight"].shape
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=len(layers),
            num_attention_heads=width // head_size,
            intermediate_size=len(found["encoder.layer.0.intermediate.dense.bias"]),
            max_position_embeddings=len(found["embeddings.position_embeddings.weight"]),
        )
    except KeyError as error:
        raise ValueError(f"{path}: expected a BERT encoder, but {error} is missing") from error
    _check(path, config, found)
    # Copies: the arrays are read-only views of the file's bytes, some of them transposed.
    return config, {
        name: torch.from_numpy(np.array(array, order="C")) for name, array in found.items()
    }


def _check(path: Path, config: BertConfig, found: dict[str, np.ndarray]) -> None:
    """Refuse what would leave a parameter without its value."""
    from transformers import BertModel

    with torch.device("meta"):  # shapes without memory
        model = BertModel(config, add_pooling_layer=False)
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    got = {name: array.shape for name, array in found.items()}
    wrong = sorted(
        name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
    )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path}: {len(wrong)} arrays do not fit a BERT encoder; the first is {name}: "
            f"expected shape {expected.get(name, 'none')}, got {got.get(name, 'none')}"
        )
