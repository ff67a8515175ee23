"""The client."""

from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar

from digits.task import RANK, load_data, make_model, test, train
from strategies.client import receive_parameters, send_parameters, training_metrics


class DigitsClient(NumPyClient):
    """Train the adapter on this client's own digits."""

    def __init__(self, context: Context) -> None:
        self.model = make_model(RANK)
        self.state = context.state
        self.partition_id = int(context.node_config["partition-id"])
        self.data = load_data(self.partition_id, int(context.node_config["num-partitions"]))
        self.steps = int(context.run_config["local-steps"])

    def get_properties(self, config: dict[str, Scalar]) -> dict[str, Scalar]:
        """Say who this is: ranks go by it."""
        return {"partition-id": self.partition_id}

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train what the server sent."""
        receive_parameters(self.model, parameters, config, self.state)
        loss = train(self.model, self.data, self.steps, float(config["lr"]))
        metrics = {"loss": loss, **training_metrics(self.model, config, steps=self.steps)}
        return send_parameters(self.model, config, self.state), len(self.data[1]), metrics

    def evaluate(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate what the server sent."""
        receive_parameters(self.model, parameters, config, self.state)
        loss, accuracy = test(self.model, self.data)
        return loss, len(self.data[1]), {"accuracy": accuracy}


def client_fn(context: Context) -> Client:
    """Return the client of one node."""
    return DigitsClient(context).to_client()


app = ClientApp(client_fn)
