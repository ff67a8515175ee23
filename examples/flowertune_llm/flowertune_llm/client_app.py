"""A FlowerTune client with training of its own; lines marked FedLoRA are all that is new."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from strategies.client import apply_adapter, make_reply, register_identity
from strategies.huggingface import train_with_trainer

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
IGNORED = -100  # label of tokens that are read and not trained

app = ClientApp()
register_identity(app)  # FedLoRA: says max-rank and partition-id of the node config


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the rank this node was sent on its own instructions."""
    run = context.run_config
    name = str(run["model"])
    model = resident_model(name)
    config = apply_adapter(model, message, context)  # FedLoRA: not set_peft_model_state_dict
    done = train_with_trainer(  # FedLoRA: or your SFTTrainer, with a FedLoRACallback
        model,
        own_rows(context),
        config,
        args={
            "max_steps": int(run["steps"]),
            "per_device_train_batch_size": int(run["batch-size"]),
            "learning_rate": float(run["learning-rate"]),
            "bf16": torch.cuda.is_available(),
        },
        data_collator=DataCollatorForSeq2Seq(tokenizer_of(name)),  # pads labels too
    )
    return make_reply(  # FedLoRA: not get_peft_model_state_dict
        model, message, num_examples=done.num_examples, metrics=done.metrics(), context=context
    )


def own_rows(context: Context) -> list[dict[str, Any]]:
    """Return the rows of the node's own jsonl, or of its share of the run's in a simulation."""
    run, node = context.run_config, context.node_config
    lines = Path(str(node.get("data-path", run["data"]))).read_text("utf-8").splitlines()
    if "data-path" not in node:
        lines = lines[int(node["partition-id"]) :: int(node["num-partitions"])]
    tokenizer, rows = tokenizer_of(str(run["model"])), []
    for line in lines:
        row = json.loads(line)
        start = tokenizer(PROMPT.format(**row)).input_ids
        answer = tokenizer(row["response"] + tokenizer.eos_token, add_special_tokens=False)
        ids = [*start, *answer.input_ids]
        labels = [IGNORED] * len(start) + answer.input_ids
        most = int(run["max-length"])
        rows.append({"input_ids": ids[:most], "labels": labels[:most]})
    return rows


def build_model(name: str, rank: int) -> PeftModel:
    """Return a causal language model with LoRA modules on queries and values."""
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank,
                        target_modules=["q_proj", "v_proj"])  # fmt: skip
    return get_peft_model(base.to("cuda" if torch.cuda.is_available() else "cpu"), config)


@lru_cache(maxsize=1)
def resident_model(name: str) -> PeftModel:
    """Return the process's one model: each message gives it its rank."""
    return build_model(name, rank=1)


@lru_cache(maxsize=1)
def tokenizer_of(name: str) -> Any:
    """Return the tokenizer of a model, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
