"""A Flower app: federated instruction tuning of a small language model."""
