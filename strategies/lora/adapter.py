"""``Adapter`` and ``LoraPair``: the one value type of the library.

An ``Adapter`` is read once from a PEFT state dict, validated there, and is immutable
from then on. Nothing outside this file knows PEFT's key names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from strategies.lora import algebra

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


class AdapterError(ValueError):
    """An adapter is not usable; ``problems`` and the message list every reason."""

    def __init__(self, problems: list[str], where: str = "adapter") -> None:
        self.problems = problems
        super().__init__(f"{where}: " + "; ".join(problems))


def factor_of(key: str) -> Literal["A", "B"] | None:
    """Return which LoRA factor a key of a PEFT state dict names; None for anything else."""
    match = _LINEAR.match(key) or _EMBEDDING.match(key)
    if match is None:
        return None
    return "A" if match["factor"] == "A" else "B"


@dataclass(frozen=True, eq=False, slots=True)
class LoraPair:
    """One LoRA module: it adds ``scale · B A`` to a frozen weight.

    Parameters
    ----------
    A : Tensor
        ``(r, n)``; ``(r, in, *kernel)`` for a convolution.
    B : Tensor
        ``(m, r)``; ``(m, r, 1, …)`` for a convolution.
    scale : float
        ``alpha / r``, or ``alpha / √r`` with rsLoRA.
    embedding : bool (default: False)
        Whether PEFT stores the pair as ``lora_embedding_A/B``.

    Raises
    ------
    AdapterError
        If the factors' shapes do not make a pair.
    """

    A: Tensor
    B: Tensor
    scale: float
    embedding: bool = False

    def __post_init__(self) -> None:
        if problems := _pair_problems("the pair", self.A, self.B):
            raise AdapterError(problems)

    @property
    def rank(self) -> int:
        """The number of rank-one terms."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """Return ``scale · B A``: ``(m, n)``, or ``(m, in, *kernel)`` for a convolution."""
        dense = self.scale * algebra.product(self.A, self.B)
        return dense.reshape(self.B.shape[0], *self.A.shape[1:])

    def norm(self) -> float:
        """Return the Frobenius norm of ``delta`` without forming it."""
        return abs(self.scale) * algebra.frobenius(self.A, self.B)

    def with_rank(self, rank: int) -> LoraPair:
        """Return the leading ``rank`` terms, zero-padded when there are fewer."""
        if rank == self.rank:
            return self
        return replace(self, A=algebra.resize(self.A, 0, rank), B=algebra.resize(self.B, 1, rank))

    def with_scale(self, scale: float) -> LoraPair:
        """Return the same ``delta`` at another scale; the ratio goes into ``B``."""
        if scale == self.scale:
            return self
        return replace(self, B=self.B * (self.scale / scale), scale=scale)

    def to(self, dtype: torch.dtype) -> LoraPair:
        """Return the pair with both factors in ``dtype``."""
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))


class Adapter:
    """An immutable LoRA adapter: module name → ``LoraPair``, plus dense tensors.

    Parameters
    ----------
    pairs : Mapping[str, LoraPair]
        The LoRA modules, by the name of the module they adapt.
    dense : Mapping[str, Tensor], optional
        Everything else that is trained: head, ``modules_to_save``, biases, DoRA magnitudes.
    """

    __slots__ = ("dense", "pairs")

    pairs: Mapping[str, LoraPair]
    dense: Mapping[str, Tensor]

    def __init__(
        self, pairs: Mapping[str, LoraPair], dense: Mapping[str, Tensor] | None = None
    ) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(pairs)))
        object.__setattr__(self, "dense", MappingProxyType(dict(dense or {})))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Adapter is immutable; build a new one to change {name!r}")

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        return (
            f"Adapter({len(self.pairs)} modules of rank {', '.join(map(str, ranks)) or 0}, "
            f"{len(self.dense)} dense tensors, {self.num_parameters:,} parameters)"
        )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        scale: float | Mapping[str, float] | None = None,
        *,
        config: Any = None,
        check_finite: bool = True,
    ) -> Adapter:
        """Read a PEFT state dict, as ``get_peft_model_state_dict`` returns it.

        Reads linear, embedding and convolution LoRA, with or without the adapter's name
        in the key, ``modules_to_save``, biases and DoRA magnitudes.

        Parameters
        ----------
        state_dict : Mapping[str, Tensor]
            Keys in PEFT's spelling.
        scale : float or Mapping[str, float], optional (default: 1.0 without ``config``)
            ``s`` in ``s·B A``, for all modules or by module name.
        config : peft.LoraConfig or mapping, optional
            Gives the scales (``lora_alpha``, ``r``, ``alpha_pattern``, ``rank_pattern``,
            ``use_rslora``) and the ranks and saved modules to check against.
        check_finite : bool (default: True)
            Whether to look for NaN and Inf; aggregation does it in any case.

        Raises
        ------
        AdapterError
            With every unknown key, missing partner, disagreeing rank, NaN or Inf.
        """
        if scale is not None and config is not None:
            raise ValueError("expected scale or config, got both; the config gives the scale")
        factors, dense, problems = _parse(state_dict)
        rule = _ConfigRule(config) if config is not None else None
        pairs: dict[str, LoraPair] = {}
        for module, found in factors.items():
            missing = [f"lora_{f} of {module!r} is missing" for f in "AB" if f not in found]
            wrong = missing or _pair_problems(repr(module), found["A"], found["B"])
            problems += wrong
            if wrong:
                continue
            A, B = found["A"], found["B"]
            if rule is not None:
                problems += rule.problems(module, A.shape[0])
                s = rule.scale(module, A.shape[0])
            elif isinstance(scale, Mapping):
                if module not in scale:
                    problems.append(f"no scale is given for module {module!r}")
                s = scale.get(module, 1.0)
            else:
                s = 1.0 if scale is None else float(scale)
            pairs[module] = LoraPair(A, B, s, embedding="embedding" in found)
        if rule is not None:
            problems += rule.dense_problems(dense)
        adapter = cls(pairs, dense)
        if check_finite:
            problems += adapter.non_finite()
        if problems:
            raise AdapterError(problems)
        return adapter

    def to_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Return the PEFT state dict; ``from_state_dict`` is the inverse.

        Parameters
        ----------
        adapter_name : str, optional
            Put this name into the LoRA keys, as ``model.state_dict()`` spells them.
            Default: leave it out, as ``set_peft_model_state_dict`` expects.
        """
        middle = f".{adapter_name}" if adapter_name else ""
        out: dict[str, Tensor] = {}
        for module, pair in self.pairs.items():
            for factor, tensor in (("A", pair.A), ("B", pair.B)):
                if pair.embedding:
                    out[f"{module}.lora_embedding_{factor}{middle}"] = tensor
                else:
                    out[f"{module}.lora_{factor}{middle}.weight"] = tensor
        out.update(self.dense)
        return out

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every module."""
        return {module: pair.rank for module, pair in self.pairs.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 without LoRA modules."""
        return max(self.ranks.values(), default=0)

    @property
    def num_parameters(self) -> int:
        """The number of trained values."""
        return sum(t.numel() for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over every factor and dense tensor."""
        for pair in self.pairs.values():
            yield pair.A
            yield pair.B
        yield from self.dense.values()

    def delta(self, module: str) -> Tensor:
        """Return the dense ``s·B A`` of one module, for tests and merging.

        Shape ``(m, n)``, a convolution in its kernel's shape. An embedding gives
        ``(dim, entries)``: transpose it to add it to ``nn.Embedding.weight``.
        """
        return self.pairs[module].delta()

    def with_rank(self, rank: int | Mapping[str, int]) -> Adapter:
        """Return the leading slice of every module, zero-padded where it has less rank.

        Parameters
        ----------
        rank : int or Mapping[str, int]
            At least 1; a mapping gives one rank a module.

        Raises
        ------
        ValueError
            If a rank is below 1.
        """
        wanted = rank if isinstance(rank, Mapping) else dict.fromkeys(self.pairs, rank)
        for module, r in wanted.items():
            if r < 1:
                raise ValueError(f"expected a rank of at least 1 for {module!r}, got {r}")
        return Adapter({m: p.with_rank(wanted[m]) for m, p in self.pairs.items()}, self.dense)

    def with_scale(self, scale: float | Mapping[str, float]) -> Adapter:
        """Return the same deltas at another scale, the ratio folded into ``B``."""
        wanted = scale if isinstance(scale, Mapping) else dict.fromkeys(self.pairs, scale)
        pairs = {m: p.with_scale(wanted.get(m, p.scale)) for m, p in self.pairs.items()}
        return Adapter(pairs, self.dense)

    def to(self, dtype: torch.dtype) -> Adapter:
        """Return the adapter with all tensors in ``dtype``."""
        pairs = {m: p.to(dtype) for m, p in self.pairs.items()}
        return Adapter(pairs, {k: t.to(dtype) for k, t in self.dense.items()})

    def only_dense(self) -> Adapter:
        """Return the adapter without its LoRA modules."""
        return Adapter({}, self.dense)

    def validate(self, like: Adapter | None = None, rank: int | None = None) -> list[str]:
        """Return every reason why this adapter cannot be used; an empty list is good.

        Parameters
        ----------
        like : Adapter, optional
            The adapter it must match in modules, dense tensors and shapes (not in rank).
        rank : int, optional
            The rank every module must have.
        """
        return self.non_finite() + self.differences(like, rank)

    def non_finite(self) -> list[str]:
        """Return a line for every tensor that holds NaN or Inf."""
        return [
            f"{key!r} holds NaN or Inf"
            for key, tensor in self.to_state_dict().items()
            if not algebra.is_finite(tensor)
        ]

    def differences(
        self,
        like: Adapter | None,
        rank: int | Mapping[str, int] | None = None,
        *,
        missing_ok: bool = False,
    ) -> list[str]:
        """Return how this adapter differs from what was expected; looks at no values.

        Parameters
        ----------
        like : Adapter or None
            The adapter it must match in modules, dense tensors and shapes (not in rank).
        rank : int or Mapping[str, int], optional
            The rank every module must have, or one a module.
        missing_ok : bool (default: False)
            Whether modules and tensors of ``like`` may be left out.
        """
        assigned = rank if isinstance(rank, Mapping) else dict.fromkeys(self.pairs, rank)
        problems = [
            f"rank {pair.rank} for {module!r}, but rank {expected} was assigned"
            for module, pair in self.pairs.items()
            if (expected := assigned.get(module)) is not None and pair.rank != expected
        ]
        if like is None:
            return problems
        for kind, mine, theirs in (
            ("module", self.pairs, like.pairs),
            ("tensor", self.dense, like.dense),
        ):
            if not missing_ok:
                problems += [f"{kind} {key!r} is missing" for key in theirs if key not in mine]
            known = ", ".join(map(repr, list(theirs)[:3])) + (", …" if len(theirs) > 3 else "")
            problems += [
                f"{kind} {key!r} is unknown, expected {known or 'none'}"
                for key in mine
                if key not in theirs
            ]
        for module in self.pairs.keys() & like.pairs.keys():
            got, expected = self.pairs[module], like.pairs[module]
            if got.A.shape[1:] != expected.A.shape[1:]:
                problems.append(_shape_problem(f"lora_A of {module!r}", got.A, expected.A, 0))
            if _without_rank(got.B) != _without_rank(expected.B):
                problems.append(_shape_problem(f"lora_B of {module!r}", got.B, expected.B, 1))
        for key in self.dense.keys() & like.dense.keys():
            if self.dense[key].shape != like.dense[key].shape:
                problems.append(_shape_problem(repr(key), self.dense[key], like.dense[key]))
        return problems


def _without_rank(B: Tensor) -> tuple[int, ...]:
    return (B.shape[0], *B.shape[2:])


def _shape_problem(what: str, got: Tensor, expected: Tensor, rank_axis: int | None = None) -> str:
    shape: list[int | Literal["r"]] = list(expected.shape)
    if rank_axis is not None:
        shape[rank_axis] = "r"
    return f"{what} has shape {tuple(got.shape)}, expected ({', '.join(map(str, shape))})"


def _parse(
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


def _pair_problems(module: str, A: Tensor, B: Tensor) -> list[str]:
    """Return what keeps two factors from being a pair."""
    if A.dim() < 2 or B.dim() != A.dim() or any(d != 1 for d in B.shape[2:]):
        return [
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of {module} are not a pair: "
            "expected (r, n) and (m, r), or (r, in, *kernel) and (m, r, 1, …)"
        ]
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        return [
            f"ranks disagree in {module}: lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)} "
            "(a grouped convolution is not supported)"
        ]
    return []


class _ConfigRule:
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
        alpha = float(self._lookup(self.alpha_pattern, module, self.alpha))
        return alpha / (rank**0.5 if self.rslora else rank)

    def problems(self, module: str, rank: int) -> list[str]:
        expected = self._lookup(self.rank_pattern, module, self.r)
        if rank == expected:
            return []
        return [f"rank {rank} for {module!r}, but the config says {expected}"]

    def dense_problems(self, dense: Mapping[str, Tensor]) -> list[str]:
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
