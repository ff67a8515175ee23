"""Where a model gets its LoRA modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedlora_app.config.keys import LoraConfig
from fedlora_app.models.loading import trained_parts, untouched_rng
from fedlora_app.models.starts import STARTS

if TYPE_CHECKING:
    from peft import PeftModel

# Where attention keeps its query and value, or a network without attention its layers.
TARGETS = (
    ("query", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, OPT, ViT
    ("q_lin", "v_lin"),  # DistilBERT
    ("query_proj", "value_proj"),  # DeBERTa
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # BLOOM, Falcon, GPT-NeoX
    ("Wqkv",),  # ModernBERT
    ("pointwise_conv1", "pointwise_conv2"),  # ConvNeXt of newer transformers
    ("pwconv1", "pwconv2"),  # ConvNeXt
    ("convolution",),  # ResNet
)


BASE = (
    "takes its factors out of the frozen weights, and not in an order of which a client of a lower "
    "rank could have the first"
)
OTHER = "has no pair of factors for each layer that rules could average"

#: Variants of PEFT that are refused, and why.
REFUSED = {
    **dict.fromkeys(("corda", "loftq", "lora-ga"), BASE),
    **dict.fromkeys(("vera", "randlora", "loha", "lokr", "oft", "boft", "ia3", "fourierft"), OTHER),
    "eva": "starts each client from its own data, so that clients' factors do not match",
    "adalora": "changes ranks by itself; see ranks.policy = 'self-pruning'",
    "dora": "is a key of its own; set lora.dora = true",
}


def variant_problem(variant: str) -> str:
    """Return why ``lora.variant`` is none that can be averaged; empty: it is one."""
    known = ("lora", "rslora", *STARTS)
    if variant in known:
        return ""
    reason = REFUSED.get(variant.lower().replace("_", "-"))
    got = f"{variant!r}, which {reason}" if reason else repr(variant)
    return f"lora.variant: expected one of {', '.join(known)}; got {got}"


def training_scale(config: LoraConfig) -> Callable[[int], float] | None:
    """Return the scale that a client trains at by its rank; None: the one that all share."""
    if config.variant != "rslora":
        return None
    return lambda rank: config.scale / math.sqrt(rank)


def add_lora(model: nn.Module, config: LoraConfig, *, rank: int, seed: int) -> PeftModel:
    """Put LoRA modules into ``model`` (in place) and make them and the head trainable.

    Parameters
    ----------
    model : nn.Module
        From ``build_model``.
    config : LoraConfig
        Scale, target modules, dropout, DoRA. Targets ``auto`` are the query and value
        projections, ``all-linear`` all linear layers but the head.
    rank : int
        Rank of every LoRA module; alpha is ``config.scale * rank``.
    seed : int
        Decides the A factors (Kaiming uniform as in PEFT); B starts at zero.

    Returns
    -------
    PeftModel
        Trainable weights are float32 whatever the type of the frozen ones.

    Raises
    ------
    ValueError
        If the rank is below 1, or target modules are unknown or cannot be detected.
    """
    import peft

    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    heads = trained_parts(model)
    layers = _projections(model, heads)
    targets = _targets(config.target_modules, layers, model)
    with untouched_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT reads
        peft_model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=rank,
                lora_alpha=config.scale * rank,
                target_modules=targets,
                modules_to_save=heads or None,
                lora_dropout=config.dropout,
                use_dora=config.dora,
                # GPT-2 stores its projections transposed, in a class of its own.
                fan_in_fan_out=any(type(layers[name]).__name__ == "Conv1D" for name in targets),
            ),
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if ".lora_A." in name:
            start = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                parameter.copy_(start)
    return peft_model


def _projections(model: nn.Module, heads: list[str]) -> dict[str, nn.Module]:
    """Return the layers that take LoRA, outside the head, by the last part of their names.

    Grouped convolutions take none: their LoRA cannot be merged.
    """
    paths = dict(model.named_modules())
    grouped = {
        path.rsplit(".", 1)[-1]
        for path, module in paths.items()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    }
    return {
        path.rsplit(".", 1)[-1]: module
        for path, module in paths.items()
        if (isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D")
        and path.rsplit(".", 1)[-1] not in grouped
        and not any(path == head or path.startswith(f"{head}.") for head in heads)
    }


def _targets(wanted: str, layers: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    if wanted == "all-linear":
        out = getattr(model, "get_output_embeddings", lambda: None)()  # a language model's head
        return sorted(name for name, layer in layers.items() if layer is not out)
    if wanted == "auto":
        for names in TARGETS:
            if layers.keys() >= set(names):
                return list(names)
        problem = "cannot tell the query and value projections of this model"
    else:
        chosen = [name.strip() for name in wanted.split(",")]
        unknown = [name for name in chosen if name not in layers]
        if not unknown:
            return chosen
        problem = f"no linear layer is called {', '.join(map(repr, unknown))}"
    raise ValueError(
        f"lora.target-modules = {wanted!r}: {problem}; name some of: {', '.join(sorted(layers))}"
    )
