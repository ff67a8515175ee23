"""Every node answers with its partition id, after ``seconds``; ``seed = 13`` fails.

So does a node in the round of its ``fails-in``; with ``says-process`` it prints the number of its
client's process.
"""

import json
import os
import time
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

server = ServerApp()
client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    if context.node_config.get("says-process"):
        print(f"process {os.getpid()}", flush=True)
    if message.content["config"]["round"] == context.node_config.get("fails-in"):
        raise ValueError("as it was told")
    time.sleep(float(context.node_config.get("seconds", 0)))
    return Message(RecordDict({"reply": MetricRecord({"id": partition})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    if config["seed"] == 13:
        raise ValueError("thirteen brings bad luck")
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    log(WARNING, "this is a test")
    folder = Path(str(config["output"]))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a", buffering=1) as metrics:
        for number in range(1, int(config["rounds"]) + 1):
            nodes = sorted(grid.get_node_ids())
            record = {"kind": "round-start", "round": number, "clients": len(nodes)}
            print(json.dumps(record), file=metrics)
            content = RecordDict({"config": ConfigRecord({"round": number})})
            messages = [
                Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes
            ]
            replies = grid.send_and_receive(messages, timeout=60)
            good = [reply for reply in replies if not reply.has_error()]
            ids = sorted(int(str(reply.content["reply"]["id"])) for reply in good)
            for _ in ids:
                print(json.dumps({"kind": "client", "round": number}), file=metrics)
                time.sleep(0.4)
            print(json.dumps({"kind": "round", "round": number}), file=metrics)
            log(INFO, "  round %d: %s", number, ids)
