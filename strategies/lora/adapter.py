"""``Adapter``: the one value type of the library.

An ``Adapter`` is read once from a PEFT state dict, validated there, and is immutable
from then on. Nothing outside this file and ``peft_keys`` knows PEFT's key names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from strategies.lora import algebra
from strategies.lora.pair import AdapterError, LoraPair, pair_problems
from strategies.lora.peft_keys import ConfigRule, parse


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
        factors, dense, problems = parse(state_dict)
        rule = ConfigRule(config) if config is not None else None
        pairs: dict[str, LoraPair] = {}
        for module, found in factors.items():
            missing = [f"lora_{f} of {module!r} is missing" for f in "AB" if f not in found]
            wrong = missing or pair_problems(repr(module), found["A"], found["B"])
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
