"""Models: found, loaded, given a head and LoRA modules."""
