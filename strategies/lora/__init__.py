"""LoRA adapters as immutable values, and the tensor algebra on them."""

from strategies.lora.adapter import Adapter, AdapterError, LoraPair, factor_of

__all__ = ["Adapter", "AdapterError", "LoraPair", "factor_of"]
