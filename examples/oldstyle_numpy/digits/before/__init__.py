"""The same project before FedLoRA: FedAvg, and one rank for all clients."""
