"""The Flower app: federated LoRA fine-tuning of a text classifier."""
