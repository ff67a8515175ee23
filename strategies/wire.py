"""How tensors are written into messages: float32, float16, bfloat16 or int8.

The type is declared in the message (``wire-dtype``) and both sides restore what was
declared. Only LoRA factors and other matrices shrink under int8; vectors stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from strategies.lora import factor_of

WIRE_KEY = "wire-dtype"
_STEP = "::step"  # suffix of the array that holds the int8 steps of another

WIRE_DTYPES = ("float32", "float16", "bfloat16", "int8")


def check_wire_dtype(name: str) -> str:
    """Return ``name`` if it is a wire type.

    Raises
    ------
    ValueError
        If it is none; the message lists them.
    """
    if name not in WIRE_DTYPES:
        raise ValueError(f"wire dtype: expected one of {', '.join(WIRE_DTYPES)}; got {name!r}")
    return name


def encode(tensors: Mapping[str, Tensor], wire: str) -> dict[str, Tensor]:
    """Return tensors as they travel; numpy can hold every one of them.

    - ``float32``, ``float16``: as such. A value float16 cannot hold is cut to its largest.
    - ``bfloat16``: its bits as int16, for numpy has no bfloat16.
    - ``int8``: 127 steps either way for each row of ``A`` and column of ``B`` (entries of
      the rank axis, so that one large entry does not coarsen the others), and those steps
      in a float32 array of its own. Vectors and single values stay float32.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Any floating-point type.
    wire : str
        One of ``WIRE_DTYPES``.
    """
    write = _ENCODERS[check_wire_dtype(wire)]
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        write(out, name, tensor.detach().cpu().float())
    return out


def decode(arrays: Mapping[str, Tensor], wire: str) -> dict[str, Tensor]:
    """Return what ``encode`` wrote as float32.

    Raises
    ------
    ValueError
        If an array has not the type that was declared, or lacks its steps.
    """
    check_wire_dtype(wire)
    out: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if wire == "int8" and name.removesuffix(_STEP) in arrays and name.endswith(_STEP):
            continue
        if wire == "int8" and array.dtype == torch.int8:
            if name + _STEP not in arrays:
                raise ValueError(f"{name!r} came without its steps, {name + _STEP!r}")
            step = arrays[name + _STEP]
            if step.dtype != torch.float32 or not _fits(step, array):
                raise ValueError(
                    f"the steps of {name!r} have shape {tuple(step.shape)}, which does not fit "
                    f"{tuple(array.shape)}"
                )
            out[name] = array.float() * step
            continue
        expected = {"float16": torch.float16, "bfloat16": torch.int16}.get(wire, torch.float32)
        if array.dtype != expected:
            raise ValueError(f"{name!r} is {array.dtype}, but wire dtype {wire!r} was declared")
        out[name] = (array.view(torch.bfloat16) if wire == "bfloat16" else array).float()
    return out


def _write_float32(out: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    out[name] = tensor


def _write_float16(out: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    limit = torch.finfo(torch.float16).max
    cut = torch.where(tensor.isfinite(), tensor.clamp(-limit, limit), tensor)  # NaN stays NaN
    out[name] = cut.half()


def _write_bfloat16(out: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    out[name] = tensor.bfloat16().view(torch.int16)


def _write_int8(out: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if tensor.dim() < 2:
        out[name] = tensor
        return
    # By name: shapes do not tell where a layer is as wide as its rank.
    factor = factor_of(name)
    axis = 1 if factor == "B" or (factor is None and tensor.shape[0] > tensor.shape[1]) else 0
    others = [d for d in range(tensor.dim()) if d != axis]
    step = tensor.abs().amax(dim=others, keepdim=True) / 127
    codes = torch.where(step > 0, tensor / step, 0.0).round().clamp(-127, 127)
    # NaN and Inf arrive through their steps, to be refused by name.
    out[name] = torch.where(step.isfinite(), codes, 1.0).to(torch.int8)
    out[name + _STEP] = step


def _fits(step: Tensor, array: Tensor) -> bool:
    long = [d for d in range(step.dim()) if step.shape[d] != 1]
    return (
        step.dim() == array.dim()
        and len(long) <= 1
        and all(step.shape[d] == array.shape[d] for d in long)
    )


_ENCODERS: dict[str, Callable[[dict[str, Tensor], str, Tensor], None]] = {
    "float32": _write_float32,
    "float16": _write_float16,
    "bfloat16": _write_bfloat16,
    "int8": _write_int8,
}
