"""Language models as they are fine-tuned: no new head, every weight from its files."""

from __future__ import annotations

from torch import nn

from fedlora_app.config.keys import ModelConfig
from fedlora_app.models.loading import DTYPES
from fedlora_app.models.pretrained import load_pretrained


def build_language_model(
    config: ModelConfig, *, precision: str = "float32", shapes_only: bool = False
) -> nn.Module:
    """Return a causal language model, in evaluation mode.

    Parameters
    ----------
    config : ModelConfig
        Its ``name`` is a packaged model, a local folder or a Hugging Face id.
    precision : {"float32", "bfloat16"}
        Type of the weights (default: "float32").
    shapes_only : bool (default: False)
        Read no weights.

    Raises
    ------
    FileNotFoundError or ValueError
        As of ``pretrained.load_pretrained``; also if a weight is in no file.
    """
    found = load_pretrained(
        config.name,
        2,  # labels of a head that there is none of
        auto="AutoModelForCausalLM",
        dtype=DTYPES[precision],
        shapes_only=shapes_only,
    )
    if found.fresh:
        raise ValueError(
            f"model.name = {config.name!r}: its files lack {', '.join(found.fresh[:3])}, without "
            "which it cannot write; name a model that was trained to"
        )
    model: nn.Module = found.model
    model.loaded = found  # type: ignore[assignment]
    return model.eval()
