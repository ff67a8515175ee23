"""The keys of the model: what is fine-tuned, with which LoRA modules, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedlora_app.config.fields import option


@dataclass(frozen=True)
class ModelConfig:
    """What is fine-tuned."""

    name: str = option(
        "packaged:minilm-l6",
        "packaged model (minilm-l6, minilm-l3), Hugging Face model id, or local folder",
        on_resume="fatal",
    )
    head: str = option(
        "auto",
        "classification head: mean-pool (mean of token states), stock "
        "(AutoModelForSequenceClassification), auto (what suits the model)",
        choices=("auto", "mean-pool", "stock"),
        on_resume="fatal",
    )
    quantization: str = option(
        "none",
        "causal-lm: bits of the frozen weights: none (as they are), 4bit (nf4, twice quantised) or "
        "8bit; needs the extra [quantization]",
        choices=("none", "4bit", "8bit"),
        on_resume="fatal",
    )


@dataclass(frozen=True)
class LoraConfig:
    """How the LoRA modules are made."""

    scale: float = option(
        2.0,
        "s in W0 + s*B*A, one for all ranks (alpha of a client = s * its rank)",
        above=0,
        on_resume="fatal",
    )
    target_modules: str = option(
        "auto",
        "comma-separated module names, auto (query and value projections) or all-linear (every "
        "linear layer but the head)",
        on_resume="fatal",
    )
    variant: str = option(
        "lora",
        "lora; rslora: a client of rank r trains at scale / sqrt(r); pissa or olora: the factors "
        "start as the leading ones of the frozen weights",
        on_resume="fatal",
    )
    dropout: float = option(0.0, "dropout on the LoRA input", low=0, high=0.9, on_resume="fatal")
    dora: bool = option(False, "train DoRA magnitudes as well", on_resume="fatal")


@dataclass(frozen=True)
class TrainConfig:
    """Local training on a client."""

    steps: int = option(10, "optimiser steps a round; 0: use epochs", low=0)
    epochs: float = option(1.0, "passes over the client's rows when steps = 0", above=0)
    batch_size: int = option(16, "rows of a step", low=1)
    optimizer: str = option(
        "adamw",
        "adamw, or with the extra [quantization]: adamw-8bit (states of 8 bits), paged-adamw and "
        "paged-adamw-8bit (states wait in the CPU's memory while the GPU has none to spare)",
        choices=("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"),
    )
    accumulate: int = option(
        1,
        "parts in which the rows of a step pass through the model: less memory, the same step",
        low=1,
    )
    group_by_length: bool = option(
        False, "batches of rows of like length: less padding, an order that is less random"
    )
    gradient_checkpointing: bool = option(
        False, "compute activations again on the way back: less memory, about a third more time"
    )
    personal_steps: int = option(
        0, "method personal: optimiser steps of every client at the end; 0: those of a round", low=0
    )
    learning_rate: float = option(3e-3, "AdamW learning rate of the LoRA weights", above=0)
    head_learning_rate: float = option(5e-3, "AdamW learning rate of the head", above=0)
    round_decay: float = option(
        0.9, "both learning rates are multiplied by this after every round", above=0, high=1
    )
    weight_decay: float = option(0.0, "AdamW weight decay", low=0)
    beta: float = option(
        0.1,
        "preference: how dear it is to move away from the frozen model (DPO's beta)",
        above=0,
    )
    schedule: str = option(
        "constant",
        "learning rate within a client's round: constant, linear or cosine down to 0",
        choices=("constant", "linear", "cosine"),
    )
    proximal_mu: float = option(
        0.0,
        "FedProx: weight of the pull back to what the client was sent; 0: none",
        low=0,
    )
    max_grad_norm: float = option(1.0, "gradient clipping; 0: none", low=0)
    precision: str = option(
        "auto",
        "float32, bfloat16 (frozen weights and activations; trained weights stay float32) or auto: "
        "on each node what its hardware multiplies fast, float32 for rules that merge",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = option(1, "torch CPU threads of a client", low=1)

    def in_round(self, number: int) -> TrainConfig:
        """Return the config of one round."""
        decay = self.round_decay ** (number - 1)
        return replace(
            self,
            learning_rate=self.learning_rate * decay,
            head_learning_rate=self.head_learning_rate * decay,
        )
