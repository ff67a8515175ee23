"""A PEFT model in place: set its rank, scale and values, merge into it, read it back.

PEFT itself is not imported: its LoRA layers are found by their ``lora_A`` attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.common import log
from torch import Tensor, nn

from strategies.lora import WRAPPERS, Adapter, LoraPair, factor_of
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
    _warn_of_saving(model, merged=bool(merged.pairs))
    for name, layer in lora_layers(model, adapter_name):
        if name not in merged.pairs and not hasattr(layer, "fedlora_pristine"):
            continue  # whatever its base is: there is nothing to merge into it
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


class _LossySave:
    """``save_pretrained`` of a model with a merged base: it says what it leaves out.

    It knows its model as an attribute, not by a bound method, so that a copy or a pickle of the
    model saves itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        log(WARNING, "this rule has merged a part of the model into its frozen weights, which "
            "save_pretrained leaves out; strategies.save_adapter(result.arrays, folder, "
            "scale=…) saves all of it")  # fmt: skip
        cls: Any = type(self.model)
        return cls.save_pretrained(self.model, *args, **options)


def _warn_of_saving(model: nn.Module, *, merged: bool) -> None:
    """Have ``save_pretrained`` say that it leaves out what is merged into the base."""
    held = vars(model)
    if not merged:
        held.pop("save_pretrained", None)
    elif hasattr(type(model), "save_pretrained"):
        held["save_pretrained"] = _LossySave(model)


def check_mergeable(model: nn.Module, *, adapter_name: str = "default") -> None:
    """Refuse a model whose frozen weights nothing can be merged into.

    Raises
    ------
    ValueError
        If the weight of a LoRA layer is quantised, tied to another, or not one weight.
    """
    owners: dict[int, list[str]] = {}
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(owner)
    for name, layer in lora_layers(model, adapter_name):
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"{name!r} is a {type(base).__name__}, which has no single weight to merge into; "
                "use a rule that does not merge"
            )
        tied = owners.get(id(weight), [])
        if len(tied) > 1:
            raise ValueError(
                f"the weight of {name!r} is tied to another ({', '.join(tied)}), which a merge "
                "would change as well; leave tied layers out of the LoRA targets, untie them, or "
                "use a rule that does not merge"
            )
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
    _refuse_changed_base(model, adapter_name)
    layers = dict(lora_layers(model, adapter_name))
    parameters = dict(adapter_parameters(model, adapter_name, all_parameters=True))
    unknown = [m for m in adapter.pairs if m not in layers]
    unknown += [k for k in adapter.dense if k not in parameters]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"the client's model has no {', '.join(map(repr, unknown[:3]))}{more}; "
            + _what_it_has(model, layers, adapter_name)
        )
    with torch.no_grad():
        for module, pair in adapter.pairs.items():
            _set_pair(layers[module], pair, adapter_name)
        for key, tensor in adapter.dense.items():
            parameters[key].copy_(tensor)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None and adapter.pairs:  # so that save_pretrained writes what is there
        scale = next(iter(adapter.pairs.values())).scale
        _tell_scale(model, config, scale)
        config.r = adapter.rank
        config.lora_alpha = scale * adapter.rank
        others = {m: p for m, p in adapter.pairs.items() if p.rank != adapter.rank}
        short = {m: m.removeprefix("base_model.model.") for m in others}
        config.rank_pattern = {short[m]: p.rank for m, p in others.items()}
        config.alpha_pattern = {short[m]: p.scale * p.rank for m, p in others.items()}
        config.use_rslora = False


def _tell_scale(model: nn.Module, config: Any, scale: float) -> None:
    """Say once that the scale a model was made with is not the server's, which holds."""
    if not hasattr(model, "fedlora_scale"):
        own = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        if not math.isclose(own, scale, rel_tol=1e-6):
            log(INFO, "this model was made with a LoRA scale (alpha / r) of %g; the server's, %g, "
                "holds (FedLoRA(scale=…))", own, scale)  # fmt: skip
    model.fedlora_scale = scale  # type: ignore[assignment]


def _what_it_has(model: nn.Module, layers: Mapping[str, Any], adapter_name: str) -> str:
    """Return what a model has instead of what it was sent, and what to do."""
    names = [name for name, _ in model.named_modules()]
    for wrapper, said in WRAPPERS.items():
        if any(wrapper in name.split(".") for name in names):
            return f"it is wrapped by {said}: pass the unwrapped model"
    if not layers:
        others = sorted({a for m in model.modules() for a in getattr(m, "lora_A", {})})
        if others:
            return (
                f"no LoRA layer has an adapter {adapter_name!r} (found "
                f"{', '.join(map(repr, others))}); pass adapter_name"
            )
        return "it has no LoRA layers: pass what peft.get_peft_model returned"
    return (
        f"its LoRA modules are {', '.join(sorted(layers)[:3])}{', …' if len(layers) > 3 else ''}: "
        "server and client must build the same model"
    )


# Ways of PEFT to start an adapter that also take something out of the frozen weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _refuse_changed_base(model: nn.Module, adapter_name: str) -> None:
    """Refuse a model whose base is no longer the one that everybody loaded.

    Raises
    ------
    ValueError
        If its adapter was initialised in a way that changes the frozen weights.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    how = getattr(config, "init_lora_weights", True)
    if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights = {how!r} changes the frozen weights, each node's in its own way, "
            "so that what is trained here fits no other model; leave it out (server and clients)"
        )


def refuse_frozen(model: nn.Module, trained: str, *, adapter_name: str = "default") -> None:
    """Refuse a model in which somebody has frozen one of the two factors that are to be trained.

    Raises
    ------
    ValueError
        With the factor and what to do.
    """
    moves = dict.fromkeys("AB", False)
    for key, parameter in adapter_parameters(model, adapter_name, all_parameters=True):
        if found := factor_of(key):
            moves[found] |= parameter.requires_grad
    for factor, other in ("AB", "BA"):
        if factor in trained and moves[other] and not moves[factor]:
            how = getattr(model, "peft_config", {}).get(adapter_name)
            made = getattr(how, "init_lora_weights", True)
            by = f" (init_lora_weights = {made!r})" if isinstance(made, str) else ""
            raise ValueError(
                f"lora_{factor} is frozen in this model{by}, but the server's rule trains it: "
                f"leave it trainable, or have the server use a rule that trains lora_{other} alone"
            )


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
    for _, layer in lora_layers(model, adapter_name):
        if adapter_name in layer.lora_A:
            A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        else:
            A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        k = tail_start(A.shape[0], gamma)
        total = total.to(A.device) + A[k:].norm() * B[:, k:].norm()
    return total


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Yield the LoRA layers of a PEFT model that have this adapter, by name."""
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
