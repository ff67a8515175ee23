"""The client: one line loads what the server sent, one packs what it asks for."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from strategies.client import apply_adapter, make_reply, register_identity

from APPNAME.task import make_model, own_rows, test, train

app = ClientApp()
register_identity(app)  # says max-rank and partition-id of the node config, by which ranks go


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train the rank that this node was sent on its own rows."""
    model, rows, run = make_model(rank=1), own_rows(context), context.run_config
    apply_adapter(model, message, context)  # rank, scale and values, as the server has them
    steps = int(run["steps"])
    loss = train(model, rows, steps, float(run["learning-rate"]))
    return make_reply(
        model, message, num_examples=len(rows[1]), loss=loss, steps=steps, context=context
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test what the server sent on this node's own rows."""
    model, rows = make_model(rank=1), own_rows(context)
    apply_adapter(model, message, context)
    metrics = test(model, rows)
    return make_reply(model, message, num_examples=len(rows[1]), metrics=metrics, context=context)
