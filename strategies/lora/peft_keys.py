"""PEFT's names of tensors, and its config: what a state dict holds, and whether it may."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

# `x.lora_A.weight`, or `x.lora_A.default.weight` where the adapter's name was left in.
_LINEAR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<name>[^.]+))?\.weight$")
_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<factor>[AB])(?:\.(?P<name>[^.]+))?$")
_MAGNITUDE = re.compile(
    r"^(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)(?P<name>[^.]+))?(?:\.weight)?$"
)
_SAVED = re.compile(r"^(?P<module>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)$")
_DENSE = re.compile(r"\.(weight|bias)(_[^.]+)?$")
_LORA_BIAS = re.compile(r"^(?P<module>.+)\.lora_B(?:\.(?P<name>[^.]+))?\.bias$")

# Parts of a key that say: this is not an adapter, or not a LoRA one.
_FOREIGN = re.compile(
    r"(^|\.)(base_layer\.weight|original_module\.weight|quant_state|absmax|prompt_embeddings"
    r"|prompt_encoder)|\.(ia3_l|oft_|hada_|lokr_|vera_|vblora_|boft_"
    r"|lora_(?!A\b|B\b|embedding_[AB]\b|magnitude_vector\b))"
)
_TOKENS = re.compile(r"(^|\.)(token_adapter|trainable_tokens)")
# The embeddings that peft.get_peft_model_state_dict adds as they are, if a target is one of them.
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|lm_head)\.base_layer\.weight$")

#: Parts that wrappers of a model put into the names of its parameters, and whose they are.
WRAPPERS = {"module": "DataParallel", "_orig_mod": "torch.compile"}


def factor_of(key: str) -> Literal["A", "B"] | None:
    """Return which LoRA factor a key of a PEFT state dict names; None for anything else."""
    match = _LINEAR.match(key) or _EMBEDDING.match(key)
    if match is None:
        return None
    return "A" if match["factor"] == "A" else "B"


def parse(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Sort a state dict into LoRA factors by module, dense tensors, and problems."""
    factors: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    problems: list[str] = []
    names: set[str] = set()
    for key, tensor in state_dict.items():
        if _frozen_by_peft(key, state_dict):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            problems.append(f"{key!r} is {kind}, expected a floating-point tensor")
            continue
        if match := _LINEAR.match(key) or _EMBEDDING.match(key):
            found = factors.setdefault(match["module"], {})
            if match["factor"] in found:
                problems.append(f"{key!r} gives lora_{match['factor']} a second time")
            found[match["factor"]] = tensor
            if match.re is _EMBEDDING:
                found["embedding"] = tensor
        elif match := _MAGNITUDE.match(key):
            dense[f"{match['module']}.lora_magnitude_vector"] = tensor
        elif match := _LORA_BIAS.match(key):
            dense[f"{match['module']}.lora_B.bias"] = tensor
        elif match := _SAVED.match(key):
            dense[f"{match['module']}.{match['rest']}"] = tensor
        elif _TOKENS.search(key):
            problems.append(
                f"{key!r} belongs to trainable_token_indices, which is not supported; train the "
                "embedding as a LoRA target or in full (modules_to_save)"
            )
        elif _FOREIGN.search(key):
            problems.append(
                f"{key!r} is not a LoRA tensor; pass what peft.get_peft_model_state_dict returns"
            )
        elif _DENSE.search(key):
            dense[key] = tensor
        else:
            problems.append(f"{key!r} is unknown: neither a LoRA tensor nor a weight or bias")
        if match and match["name"]:
            names.add(match["name"])
    if len(names) > 1:
        problems.append(f"several adapters are mixed: {', '.join(sorted(names))}; pass one")
    return factors, dense, problems


def _frozen_by_peft(key: str, state_dict: Mapping[str, Tensor]) -> bool:
    """Tell whether PEFT put a tensor beside an adapter that is no part of it.

    With ``bias="all"`` the biases of saved modules are there twice, as the trained copy and as
    the original; and embeddings that are targets come with their frozen weights.
    """
    twin = key.replace(".modules_to_save.", ".", 1)
    original = key.replace(".original_module.", ".", 1)
    return (
        any(other != key and other in state_dict for other in (twin, original))
        or _EMBEDDINGS.search(key) is not None
    )


class ConfigRule:
    """What a PEFT LoraConfig says about scales, ranks and dense tensors."""

    def __init__(self, config: Any) -> None:
        def read(key: str, default: Any) -> Any:
            if isinstance(config, Mapping):
                return config.get(key, default)
            return getattr(config, key, default)

        self.r: int = read("r", 8)
        self.alpha: float = read("lora_alpha", 8)
        self.rank_pattern: Mapping[str, int] = read("rank_pattern", {}) or {}
        self.alpha_pattern: Mapping[str, float] = read("alpha_pattern", {}) or {}
        self.rslora: bool = bool(read("use_rslora", False))
        self.bias: str = read("bias", "none") or "none"
        saved = read("modules_to_save", None)
        if saved is None and str(read("task_type", "")).upper().endswith("_CLS"):
            saved = ["classifier", "score"]  # what PEFT adds by itself for these tasks
        self.saved: list[str] = list(saved or [])

    @staticmethod
    def _lookup(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
        for key, value in pattern.items():  # PEFT's own rule: a regex at the end of the path
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    def scale(self, module: str, rank: int) -> float:
        """Return ``s`` in ``s·B A`` of a module."""
        alpha = float(self._lookup(self.alpha_pattern, module, self.alpha))
        return alpha / (rank**0.5 if self.rslora else rank)

    def problems(self, module: str, rank: int) -> list[str]:
        """Return how a module's rank is not the config's."""
        expected = self._lookup(self.rank_pattern, module, self.r)
        if rank == expected:
            return []
        return [f"rank {rank} for {module!r}, but the config says {expected}"]

    def dense_problems(self, dense: Mapping[str, Tensor]) -> list[str]:
        """Return which tensors beside LoRA the config does not explain."""

        def explained(key: str) -> bool:
            parts = key.split(".")
            if "lora_magnitude_vector" in parts or key.endswith(".lora_B.bias"):
                return True
            if self.bias != "none" and parts[-1] == "bias":
                return True
            return any(f".{name}." in f".{key}." for name in self.saved)

        return [
            f"{key!r} is unknown: neither LoRA nor in modules_to_save {self.saved}"
            for key in dense
            if not explained(key)
        ]
