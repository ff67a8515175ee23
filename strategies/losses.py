"""The loss of each sample, without training: for AutoRank's profile and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from strategies.profiling import Profile
from strategies.surroundings import mode

Batch = Mapping[str, Any]

IGNORED = -100  # the label that Hugging Face models and cross_entropy leave out
# None: no autocast.
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def sample_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    losses: Callable[[Tensor, dict[str, Any]], Tensor],
    *,
    precision: str = "float32",
    withhold: Collection[str] = (),
) -> NDArray[np.float32]:
    """Return the loss of each sample, shape (n,), in the order of the batches.

    Nothing is drawn: the model stays as it is, in evaluation mode meanwhile.

    Parameters
    ----------
    model : nn.Module
        ``model(**batch)`` returns ``.logits``.
    batches : Iterable[Mapping[str, Tensor]]
        Tensors are moved to the model's device.
    losses : callable
        ``losses(logits, batch)`` returns those of the rows of a batch; logits in float32.
    precision : str (default: "float32")
        As in ``train_loop``.
    withhold : collection of str (default: none)
        What of a batch is for ``losses`` alone: without ``labels`` most models save themselves the
        mean loss of a batch, which nobody reads here.
    """
    dtype = autocast_type(precision)
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.zeros(0)]
    with mode(model, training=False):
        for batch in batches:
            moved = on_device(batch, device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(**{k: v for k, v in moved.items() if k not in withhold}).logits
            found.append(losses(logits.float(), moved).cpu())
    return torch.cat(found).numpy()


def losses_and_labels(
    model: nn.Module, batches: Iterable[Batch], *, precision: str = "float32"
) -> Profile:
    """Return the loss of each sample and the labels, as AutoRank's profile needs them.

    For Hugging Face models that classify, or predict tokens: the loss of a text is the mean
    over its predicted tokens, and its labels are those tokens [D]. For other models measure
    in your own function. Nothing is drawn: the model stays as it is, in evaluation mode
    meanwhile.

    Parameters
    ----------
    model : nn.Module
        Returns ``.logits``, of shape (rows, classes) or (rows, tokens, vocabulary).
    batches : Iterable[Mapping[str, Tensor]]
        With ``labels``, integers of shape (rows,) or (rows, tokens).
    precision : str (default: "float32")
        As in ``train_loop``.

    Returns
    -------
    Profile
        ``losses`` of shape (rows,), ``labels`` of shape (rows,) or (predicted tokens,), and the
        number of rows; ``losses, labels = …`` unpacks it.

    Raises
    ------
    ValueError
        If there are no such labels.
    """
    found: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    shifted = predicts_next(model)

    def each(logits: Tensor, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"]
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="none"
        ).view(len(labels), -1)
        kept = labels != IGNORED
        found.append(labels[kept].cpu())
        mean: Tensor = losses.sum(1) / kept.view(len(labels), -1).sum(1).clamp(min=1)
        return mean

    # Given labels, some forward methods return no logits (TRL's).
    losses = sample_losses(
        model, _labelled(batches), each, precision=precision, withhold={"labels"}
    )
    return Profile(losses, torch.cat(found).numpy(), len(losses))


def _labelled(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        labels = batch.get("labels")
        if labels is None or labels.is_floating_point() or labels.ndim > 2:
            raise ValueError(
                "expected integer labels, one a row or one a token, got "
                f"{'none' if labels is None else f'{labels.dtype} of {tuple(labels.shape)}'}; "
                "measure the losses of this model in a function of your own"
            )
        yield batch


def predicts_next(model: nn.Module) -> bool:
    """Tell whether a model's own loss shifts the labels by one."""
    kind = getattr(model, "loss_type", None)
    if kind is not None:
        return bool(kind == "ForCausalLM")
    # GPT-2 and others shift without saying so; Hugging Face lists them as what they are.
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:  # then it is no model of theirs
        return False
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    known = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(cls.__name__ in known for cls in type(inner).__mro__)


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors where the model is."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def autocast_type(precision: str) -> torch.dtype | None:
    """Return what autocast computes in; None: as the weights are.

    Raises
    ------
    ValueError
        If there is no such precision.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: expected {', '.join(_PRECISIONS)}, got {precision!r}")
    return _PRECISIONS[precision]
