"""Flower strategies for federated LoRA fine-tuning when clients differ."""

from strategies.strategy import FedLoRA

__all__ = ["FedLoRA"]
