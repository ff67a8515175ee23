"""A client that adds ``1 + its partition id`` to every number, or misbehaves.

``faults`` in the node config says how, one word a round. No torch here: every message is
a process of its own, and this one must start fast.
"""

import os
import signal
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

EXAMPLES = 10
COUNTS = {"zero": 0, "negative": -5, "nan-count": float("nan"), "absurd": 10**12}

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    own = {"partition-id": context.node_config["partition-id"], "num-examples": EXAMPLES}
    return Message(RecordDict({"own": ConfigRecord(own)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    server_round = int(message.content["config"]["server-round"])
    faults = str(context.node_config.get("faults", "")).split(",")
    fault = faults[server_round - 1] if server_round <= len(faults) else ""
    step = 1.0 + int(context.node_config["partition-id"])
    match fault:
        case "raise":
            raise RuntimeError("CUDA out of memory")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "slow":
            time.sleep(20)
        case "norm":
            step *= 100
        case "nan":
            step = float("nan")
    arrays = {k: a.numpy() + np.float32(step) for k, a in message.content["arrays"].items()}
    if fault == "rank":
        one_less = {"lora_A": np.s_[:-1], "lora_B": np.s_[:, :-1]}
        cuts = {k: next((c for part, c in one_less.items() if part in k), ...) for k in arrays}
        arrays = {k: np.ascontiguousarray(a[cuts[k]]) for k, a in arrays.items()}
    record = ArrayRecord({k: Array(a) for k, a in arrays.items()})
    if fault == "truncated":
        array = record["head.bias"]
        array.data = array.data[:-3]
    metrics = MetricRecord({"num-examples": COUNTS.get(fault, EXAMPLES), "loss": 1.0})
    content = RecordDict({"arrays": record, "metrics": metrics})
    if fault == "text":  # a metric record takes numbers alone
        del metrics["num-examples"]
        content["more"] = ConfigRecord({"num-examples": "many"})
    return Message(content, reply_to=message)
