"""The same app before FedLoRA: FedAvg, and one rank for all clients."""
