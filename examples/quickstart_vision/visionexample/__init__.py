"""Flower's PyTorch quickstart as a LoRA app on images."""
