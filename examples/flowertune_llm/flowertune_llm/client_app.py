"""The client: an ordinary ``@app.train()`` with PEFT and ``Trainer``; three lines are FedLoRA's."""

from __future__ import annotations

from functools import lru_cache

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq

from flowertune_llm.data import Row, load_rows, load_split
from flowertune_llm.model import build_model, build_tokenizer
from strategies.client import apply_adapter, make_reply
from strategies.huggingface import train_with_trainer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the rank this device was sent on its own questions."""
    run = context.run_config
    torch.set_num_threads(int(run["threads"]))
    name, seed = str(run["model"]), int(run["seed"])
    model = resident_model(name, seed)
    config = apply_adapter(model, message, context)
    done = train_with_trainer(
        model,
        own_rows(context),
        config,
        args={
            "max_steps": int(run["steps"]),
            "per_device_train_batch_size": int(run["batch-size"]),
            "gradient_accumulation_steps": int(run["accumulation"]),
            "learning_rate": float(run["learning-rate"]),
            "lr_scheduler_type": "constant",
            "bf16": run["precision"] == "bfloat16",
            "fp16": run["precision"] == "float16",
            "seed": seed,
        },
        data_collator=DataCollatorForSeq2Seq(build_tokenizer(name)),  # pads labels too
    )
    return make_reply(
        model,
        message,
        num_examples=done.num_examples,
        metrics=done.metrics(),
        context=context,
    )


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Say who this is and which rank the device can hold."""
    known: dict[str, int] = {"max-rank": device_rank(context)}
    if "partition-id" in context.node_config:  # a lasting order of clients, whatever their node id
        known["partition-id"] = int(context.node_config["partition-id"])
    content = RecordDict({"properties": ConfigRecord(known)})  # type: ignore[arg-type]
    return Message(content, reply_to=message)


def own_rows(context: Context) -> list[Row]:
    """Return the rows of the node's own file, or of its share in a simulation."""
    run, node = context.run_config, context.node_config
    name, length = str(run["model"]), int(run["max-length"])
    if "data-path" in node:
        return load_rows(str(node["data-path"]), name, length)[1]
    split = load_split(str(run["data"]), name, length, int(run["test-rows"]), int(run["seed"]))
    return split.share(int(node["partition-id"]), int(node["num-partitions"]))


def device_rank(context: Context) -> int:
    """Return ``max-rank`` of the node config; a simulated node's is by its partition."""
    if "max-rank" in context.node_config:
        return int(context.node_config["max-rank"])
    ranks = [int(rank) for rank in str(context.run_config["device-ranks"]).split(",")]
    return ranks[int(context.node_config["partition-id"]) % len(ranks)]


@lru_cache(maxsize=1)
def resident_model(name: str, seed: int) -> PeftModel:
    """Return the process's one model: each message gives it its rank."""
    return build_model(name, rank=1, scale=1.0, seed=seed)
