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
        Its ``name`` is a packaged model, a local folder or a Hugging Face id; its
        ``quantization`` says whether the linear layers have 4 or 8 bits.
    precision : {"float32", "bfloat16"}
        Type of the weights, and of products with 4-bit ones (default: "float32").
    shapes_only : bool (default: False)
        Read no weights.

    Raises
    ------
    FileNotFoundError or ValueError
        As of ``pretrained.load_pretrained``; also if a weight is in no file, or bitsandbytes is
        needed and not installed.
    """
    found = load_pretrained(
        config.name,
        2,  # labels of a head that there is none of
        auto="AutoModelForCausalLM",
        dtype=DTYPES[precision],
        shapes_only=shapes_only,
        quantization=config.quantization,
    )
    if found.fresh:
        raise ValueError(
            f"model.name = {config.name!r}: its files lack {', '.join(found.fresh[:3])}, without "
            "which it cannot write; name a model that was trained to"
        )
    model: nn.Module = found.model
    if config.quantization != "none" and not shapes_only:
        from peft import prepare_model_for_kbit_training

        for module in model.modules():  # on some CPUs evaluation would round the scales for good
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        # In float32: what keeps its digits (norms, embeddings). Checkpoints are the loop's.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.loaded = found  # type: ignore[assignment]
    return model.eval()
