"""A PEFT model in place: set its rank, scale and values, merge into it, read it back.

PEFT itself is not imported: its LoRA layers are found by their ``lora_A`` attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from strategies.lora import Adapter, LoraPair
from strategies.ranks.pruning import tail_start


def merge_into_base(model: nn.Module, merged: Adapter, *, adapter_name: str = "default") -> None:
    """Set the frozen weights of all LoRA layers to what they were loaded with plus ``merged``.

    The loaded weights are remembered at the first merge, so that the next message starts
    from them again, whatever the one before had merged.

    Raises
    ------
    ValueError
        If a frozen weight is quantised: a delta cannot be added to it exactly.
    """
    if merged.pairs:
        check_mergeable(model, adapter_name=adapter_name)
    for name, layer in _lora_layers(model, adapter_name):
        weight = layer.get_base_layer().weight
        pristine: Tensor | None = getattr(layer, "fedlora_pristine", None)
        if name not in merged.pairs:
            if pristine is not None:
                weight.data.copy_(pristine)
            continue
        if pristine is None:
            pristine = layer.fedlora_pristine = weight.detach().clone()
        delta = merged.delta(name).to(weight.device)
        if merged.pairs[name].embedding or getattr(layer, "fan_in_fan_out", False):
            delta = delta.T
        weight.data.copy_(pristine.to(weight.device).float() + delta)


def check_mergeable(model: nn.Module, *, adapter_name: str = "default") -> None:
    """Refuse a model whose frozen weights nothing can be merged into.

    Raises
    ------
    ValueError
        If the weight of a LoRA layer is quantised.
    """
    for name, layer in _lora_layers(model, adapter_name):
        weight = layer.get_base_layer().weight
        # Quantised weights are packed integers, or floats in a class that says what they are.
        if not weight.is_floating_point() or hasattr(weight, "quant_state"):
            raise ValueError(
                f"the weight of {name!r} is quantised ({weight.dtype}): a rule that merges into "
                "the base needs its weights as they are; load the model without quantisation or "
                "use another rule"
            )


def load_adapter(model: nn.Module, adapter: Adapter, *, adapter_name: str = "default") -> None:
    """Give a PEFT model the rank, scale and values of ``adapter``, in place.

    Every LoRA layer is resized to the rank it was sent: a client of rank r trains and
    returns rank r, whatever rank the model was made with. Base weights are not touched,
    so one resident model can serve one client after another.

    Parameters
    ----------
    model : nn.Module
        What ``peft.get_peft_model`` returned.
    adapter : Adapter
        May leave modules out; those keep their values.
    adapter_name : str (default: "default")

    Raises
    ------
    ValueError
        If the adapter names a module or tensor that the model does not have.
    """
    layers = dict(_lora_layers(model, adapter_name))
    parameters = dict(adapter_parameters(model, adapter_name, all_parameters=True))
    unknown = [m for m in adapter.pairs if m not in layers]
    unknown += [k for k in adapter.dense if k not in parameters]
    if unknown:
        raise ValueError(
            f"the model has no {', '.join(map(repr, unknown[:3]))}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; its LoRA modules are "
            f"{', '.join(sorted(layers)[:3])}, …: server and client must build the same model"
        )
    with torch.no_grad():
        for module, pair in adapter.pairs.items():
            _set_pair(layers[module], pair, adapter_name)
        for key, tensor in adapter.dense.items():
            parameters[key].copy_(tensor)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None and adapter.pairs:  # so that save_pretrained writes what is there
        config.r = adapter.rank
        config.lora_alpha = next(iter(adapter.pairs.values())).scale * adapter.rank
        others = {m: p for m, p in adapter.pairs.items() if p.rank != adapter.rank}
        short = {m: m.removeprefix("base_model.model.") for m in others}
        config.rank_pattern = {short[m]: p.rank for m, p in others.items()}
        config.alpha_pattern = {short[m]: p.scale * p.rank for m, p in others.items()}
        config.use_rslora = False


def adapter_state(model: nn.Module, *, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the adapter of a PEFT model as a state dict, in PEFT's spelling.

    Like ``peft.get_peft_model_state_dict``, without a pass over the base weights: LoRA
    factors, DoRA magnitudes, saved modules, and whatever else is trained. The tensors
    are those of the model, detached.
    """
    found = adapter_parameters(model, adapter_name, all_parameters=False)
    return {key: parameter.detach() for key, parameter in found}


def tail_penalty(model: nn.Module, gamma: float, *, adapter_name: str = "default") -> Tensor:
    """Return ``Σ ‖B[:, γr:]‖·‖A[γr:, :]‖`` over the LoRA layers of a PEFT model.

    HetLoRA's self-pruning adds it to the loss, times λ. See ``SelfPruningRank``.
    """
    total = torch.zeros(())
    for _, layer in _lora_layers(model, adapter_name):
        if adapter_name in layer.lora_A:
            A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        else:
            A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        k = tail_start(A.shape[0], gamma)
        total = total.to(A.device) + A[k:].norm() * B[:, k:].norm()
    return total


def _lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        for factors in ("lora_A", "lora_embedding_A"):
            if adapter_name in getattr(module, factors, {}):
                yield name, module


def _set_pair(layer: Any, pair: LoraPair, name: str) -> None:
    if pair.embedding:
        _resize(layer.lora_embedding_A, name, pair.A)
        _resize(layer.lora_embedding_B, name, pair.B)
    else:
        a, b = layer.lora_A[name], layer.lora_B[name]
        _resize(a, "weight", pair.A)
        _resize(b, "weight", pair.B)
        for module, attributes in (
            (a, ("out_features", "out_channels")),
            (b, ("in_features", "in_channels")),
        ):
            for attribute in attributes:
                if hasattr(module, attribute):
                    setattr(module, attribute, pair.rank)
    layer.r[name] = pair.rank
    layer.lora_alpha[name] = pair.scale * pair.rank
    layer.scaling[name] = pair.scale


def _resize(owner: Any, key: str, value: Tensor) -> None:
    """Copy ``value`` into a parameter; a new one where the shape changes."""
    is_module = not isinstance(owner, nn.ParameterDict)
    old: Tensor = getattr(owner, key) if is_module else owner[key]
    if old.shape == value.shape:
        old.copy_(value)
        return
    new = nn.Parameter(
        value.to(device=old.device, dtype=old.dtype, copy=True), requires_grad=old.requires_grad
    )
    if is_module:
        setattr(owner, key, new)
    else:
        owner[key] = new


def adapter_parameters(
    model: nn.Module, adapter_name: str, *, all_parameters: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters under PEFT's adapter-file names; the base's only on request."""
    saved, lora = f".modules_to_save.{adapter_name}.", ".lora_"
    for name, parameter in model.named_parameters():
        if saved in name:
            yield name.replace(saved, "."), parameter
        elif lora in name:
            if f".{adapter_name}." in name or name.endswith(f".{adapter_name}"):
                yield _without(name, adapter_name), parameter
        elif all_parameters or parameter.requires_grad:
            yield name, parameter


def _without(name: str, adapter_name: str) -> str:
    head, tail = name.split(".lora_", 1)
    tail = tail.replace(f".{adapter_name}", "", 1)
    if tail == "magnitude_vector.weight":  # PEFT drops the last part in its files
        tail = "magnitude_vector"
    return f"{head}.lora_{tail}"
