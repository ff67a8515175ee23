"""LoRA adapters as immutable values, and the tensor algebra on them."""

from strategies.lora.adapter import WRAPPERS, Adapter, AdapterError, LoraPair, factor_of

__all__ = ["WRAPPERS", "Adapter", "AdapterError", "LoraPair", "factor_of"]
