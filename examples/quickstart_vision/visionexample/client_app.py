"""visionexample: A Flower / PyTorch app."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from strategies.client import apply_adapter, make_reply
from visionexample.task import RANK, load_data, make_model
from visionexample.task import test as test_fn
from visionexample.task import train as train_fn

# Flower ClientApp
app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model on local data."""
    # Load the model and initialize it with the received weights
    model = make_model(RANK, int(context.run_config["pretrain-steps"]))
    apply_adapter(model, msg, context)

    # Load the data
    partition_id = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    batch_size = int(context.run_config["batch-size"])
    trainloader, _ = load_data(partition_id, num_partitions, batch_size)

    # Call the training function
    lr = float(msg.content["config"]["lr"])
    epochs = int(context.run_config["local-epochs"])
    train_loss, steps = train_fn(model, trainloader, epochs, lr)

    # Construct and return reply Message
    n = len(trainloader.dataset)
    return make_reply(model, msg, num_examples=n, loss=train_loss, steps=steps, context=context)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model on local data."""
    # Load the model and initialize it with the received weights
    model = make_model(RANK, int(context.run_config["pretrain-steps"]))
    apply_adapter(model, msg, context)

    # Load the data
    partition_id = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    batch_size = int(context.run_config["batch-size"])
    _, valloader = load_data(partition_id, num_partitions, batch_size)

    # Call the evaluation function
    eval_loss, eval_acc = test_fn(model, valloader)

    # Construct and return reply Message
    n = len(valloader.dataset)
    return make_reply(model, msg, num_examples=n, loss=eval_loss, metrics={"accuracy": eval_acc})
