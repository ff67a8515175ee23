"""Frozen weights of 4 or 8 bits, and optimiser states of 8: what bitsandbytes does.

The package is optional, and imported only where a run asks for it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

INSTALL = "bitsandbytes is not installed; run: pip install 'fedlora[quantization]'"

#: ``model.quantization`` → bits of a weight.
BITS = {"4bit": 4, "8bit": 8}

#: ``train.optimizer`` → the class of bitsandbytes; "adamw" is torch's.
OPTIMIZERS = {
    "adamw-8bit": "AdamW8bit",
    "paged-adamw": "PagedAdamW32bit",
    "paged-adamw-8bit": "PagedAdamW8bit",
}


def installed() -> bool:
    """Return whether bitsandbytes is there; nothing is imported."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantization_config(kind: str, dtype: Any) -> Any:
    """Return how transformers is to load weights; None: as they are.

    Parameters
    ----------
    kind : {"none", "4bit", "8bit"}
        4 bits are nf4 with double quantisation, as in QLoRA (Dettmers et al. 2023).
    dtype : torch.dtype
        In what products with 4-bit weights are computed.

    Raises
    ------
    ValueError
        If bitsandbytes is not installed.
    """
    if kind == "none":
        return None
    if not installed():
        raise ValueError(f"model.quantization = {kind!r}: {INSTALL}")
    import transformers

    # It says with every product that 8-bit ones are computed in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantised_problem(settings: Any, wanted: str) -> str:
    """Return why a checkpoint that is quantised in its files cannot be used; empty: it can.

    Parameters
    ----------
    settings : transformers.PretrainedConfig
    wanted : str
        ``model.quantization``.
    """
    found = getattr(settings, "quantization_config", None)
    if found is None:
        return ""
    held = found if isinstance(found, dict) else found.to_dict()
    method = str(held.get("quant_method", "an unknown method")).rpartition(".")[2].lower()
    if method != "bitsandbytes":
        return (
            f"its files are quantised by {method}, which cannot be trained here; name the model "
            "they were made from, and set model.quantization = '4bit' for as little memory"
        )
    kind = "8bit" if held.get("load_in_8bit") else "4bit"
    if wanted != kind:
        return (
            f"its files are quantised to {BITS[kind]} bits by bitsandbytes, and "
            f"model.quantization = {wanted!r}; set model.quantization = {kind!r}"
        )
    return ""


def optimizer(name: str, weight_decay: float) -> Callable[[Any], Any] | None:
    """Return what makes the optimiser of this name; None: torch's own AdamW.

    Parameters
    ----------
    name : str
        ``adamw`` or one of ``OPTIMIZERS``. Paged states are kept in the CPU's memory while a GPU
        has none to spare; without a GPU they are plain ones.
    weight_decay : float

    Raises
    ------
    ValueError
        If bitsandbytes is not installed.
    """
    if name not in OPTIMIZERS:
        return None
    if not installed():
        raise ValueError(f"train.optimizer = {name!r}: {INSTALL}")
    import bitsandbytes

    return partial(getattr(bitsandbytes.optim, OPTIMIZERS[name]), weight_decay=weight_decay)
