"""What training and evaluation set around them, each put back at the end of its block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from strategies.dropout import QuickDropout


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` CPU threads inside the block; None: as many as before."""
    previous = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Have the model train or not inside the block."""
    previous = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(previous)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed what torch's own dropout draws from inside the block: it takes no other generator."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Have a transformers model compute activations again on the way back instead of keeping them.

    Raises
    ------
    ValueError
        If it cannot, or dropout would be drawn anew the second time.
    """
    active = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if any(isinstance(found, QuickDropout) for found in active):
        raise ValueError(
            "gradient_checkpointing: QuickDropout cannot draw the same numbers a second time; "
            "leave one of them out"
        )
    # By class: a wrapper such as PEFT's passes on what it is asked for, but not what is set.
    inner: Any = next(
        (m for m in model.modules() if getattr(type(m), "supports_gradient_checkpointing", False)),
        None,
    )
    if inner is None:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} holds no transformers model that can; "
            "leave it out, or use smaller batches with accumulation"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        yield
        return
    # transformers 5 has another name for it.
    name = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    use_cache = getattr(inner.config, "use_cache", None)
    getattr(inner, f"{name}_checkpointing_enable")({"use_reentrant": False})
    if use_cache:
        inner.config.use_cache = False  # or transformers does, and warns
    try:
        yield
    finally:
        getattr(inner, f"{name}_checkpointing_disable")()
        if use_cache:
            inner.config.use_cache = use_cache
