"""An adapter as the folder that ``peft.PeftModel.from_pretrained`` reads, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from safetensors.torch import save_file
from torch import Tensor

from strategies.lora import Adapter
from strategies.messages import from_record
from strategies.model import GlobalModel

PREFIX = "base_model.model."
# For these tasks PEFT itself saves such modules, whole: naming their parts would save them twice.
HEADED, HEADS = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(
    adapter: Adapter,
    folder: Path | str,
    *,
    base_model: str | None = None,
    target_modules: Iterable[str] | None = None,
    task_type: str | None = None,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``.

    Every module keeps its own rank and scale (``rank_pattern`` and ``alpha_pattern``). What is
    trained in full comes under ``modules_to_save``.

    Parameters
    ----------
    adapter : Adapter
        For a model with a part merged into its base: ``GlobalModel.combined()``.
    folder : Path or str
        Made if needed; must not hold an adapter.
    base_model : str, optional
        Name or folder of the base model, for readers that load it by themselves.
    target_modules : Iterable[str], optional
        As in ``LoraConfig`` (default: the full name of every module of the adapter).
    task_type : str, optional
        As in ``LoraConfig``, e.g. "SEQ_CLS".

    Raises
    ------
    FileExistsError
        If the folder holds an adapter.
    ValueError
        If the adapter has no LoRA modules, or biases trained without their weights.
    """
    folder = Path(folder).expanduser()
    if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        raise FileExistsError(f"{folder} already holds an adapter; name another folder")
    if not adapter.pairs:
        raise ValueError("expected an adapter with LoRA modules, got none")
    config = _config(adapter, target_modules, HEADS if task_type in HEADED else ())
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    tensors = {
        PREFIX + key.removeprefix(PREFIX): tensor.detach().cpu().contiguous().clone()
        for key, tensor in adapter.to_state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_adapter(
    arrays: ArrayRecord | Mapping[str, Tensor],
    folder: Path | str,
    *,
    scale: float = 1.0,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the global model of a run as an adapter that plain PEFT reads, whatever the rule.

    With it ``PeftModel.from_pretrained(base, folder)`` computes what the server's model does. The
    habit of loading the arrays into a model and calling ``save_pretrained`` loses what rules that
    merge (``flora``, ``fedex``) have put into the base; here it becomes part of the adapter, whose
    rank grows by it. Of ``fedsa`` it holds what is shared: B stays on the clients.

    Parameters
    ----------
    arrays : ArrayRecord or Mapping[str, Tensor]
        ``result.arrays`` of ``FedLoRA.start``.
    folder, base_model, task_type
        As in ``export_peft``.
    scale : float (default: 1.0)
        That of ``FedLoRA(scale=…)``.

    Raises
    ------
    FileExistsError, ValueError
        As ``export_peft``, and if the arrays are no global model.
    """
    tensors = from_record(arrays) if isinstance(arrays, ArrayRecord) else arrays
    adapter = GlobalModel.from_tensors(tensors, scale).combined()
    export_peft(adapter, folder, base_model=base_model, task_type=task_type)


def _config(
    adapter: Adapter, target_modules: Iterable[str] | None, heads: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of ``LoraConfig`` that are not as PEFT would set them."""
    pairs = {module.removeprefix(PREFIX): pair for module, pair in adapter.pairs.items()}
    rank = adapter.rank
    alpha = next(iter(pairs.values())).scale * rank

    def exact(module: str) -> str:
        """Return a pattern for this module alone; PEFT matches the end of a name."""
        return f"^{module}" if any(m.endswith(f".{module}") for m in pairs) else module

    saved: list[str] = []
    dora = lora_bias = False
    for key in adapter.dense:
        module, _, last = key.removeprefix(PREFIX).rpartition(".")
        if (first := module.partition(".")[0]) in heads:
            module = first
        if last == "lora_magnitude_vector":
            dora = True
        elif key.endswith(".lora_B.bias"):
            lora_bias = True
        elif last == "bias" and f"{key.removesuffix('bias')}weight" not in adapter.dense:
            raise ValueError(
                f"{key!r} was trained without its weight, which modules_to_save cannot say; load "
                "the adapter into the model and use its save_pretrained"
            )
        elif module not in saved:
            saved.append(module)
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact(m): p.rank for m, p in pairs.items() if p.rank != rank},
        "alpha_pattern": {
            exact(m): p.scale * p.rank for m, p in pairs.items() if p.scale * p.rank != alpha
        },
        "target_modules": list(pairs if target_modules is None else target_modules),
        "modules_to_save": saved or None,
        "use_dora": dora,
        "lora_bias": lora_bias,
    }
