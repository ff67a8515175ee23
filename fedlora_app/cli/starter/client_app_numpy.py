"""The client: one line loads what the server sent, one packs what it asks for."""

from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar
from strategies.client import receive_parameters, send_parameters, training_metrics

from APPNAME.task import make_model, own_rows, test, train

Config = dict[str, Scalar]


class OwnClient(NumPyClient):
    """Trains the rank that this node was sent on its own rows."""

    def __init__(self, context: Context) -> None:
        self.node, self.run, self.state = context.node_config, context.run_config, context.state
        self.model, self.rows = make_model(rank=1), own_rows(context)

    def get_properties(self, config: Config) -> Config:
        """Say who this is: ranks go by it."""
        return {key: self.node[key] for key in ("partition-id", "max-rank") if key in self.node}

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """Train what the server sent: rank, scale and values, as it has them."""
        receive_parameters(self.model, parameters, config, self.state, node=self.node)
        steps = int(self.run["steps"])
        loss = train(self.model, self.rows, steps, float(self.run["learning-rate"]))
        metrics = {"loss": loss, **training_metrics(self.model, config, steps=steps)}
        return send_parameters(self.model, config, self.state), len(self.rows[1]), metrics

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Test what the server sent on this node's own rows."""
        receive_parameters(self.model, parameters, config, self.state, node=self.node)
        metrics = test(self.model, self.rows)
        return metrics.pop("loss"), len(self.rows[1]), metrics


def client_fn(context: Context) -> Client:
    """Return the client of one node."""
    return OwnClient(context).to_client()


app = ClientApp(client_fn)
