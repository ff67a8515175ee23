"""LoRA adapters as immutable values, and the tensor algebra on them."""

from strategies.lora.adapter import Adapter
from strategies.lora.pair import AdapterError, LoraPair
from strategies.lora.peft_keys import WRAPPERS, factor_of

__all__ = ["WRAPPERS", "Adapter", "AdapterError", "LoraPair", "factor_of"]
