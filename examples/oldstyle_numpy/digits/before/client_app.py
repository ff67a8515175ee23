"""The client, as it was."""

import torch
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from digits.task import RANK, load_data, make_model, test, train


class DigitsClient(NumPyClient):
    """Train the adapter on this client's own digits."""

    def __init__(self, context: Context) -> None:
        self.model = make_model(RANK)
        partition_id = int(context.node_config["partition-id"])
        self.data = load_data(partition_id, int(context.node_config["num-partitions"]))
        self.steps = int(context.run_config["local-steps"])

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train what the server sent."""
        set_parameters(self.model, parameters)
        loss = train(self.model, self.data, self.steps, float(config["lr"]))
        metrics = {"loss": loss}
        return get_parameters(self.model), len(self.data[1]), metrics

    def evaluate(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate what the server sent."""
        set_parameters(self.model, parameters)
        loss, accuracy = test(self.model, self.data)
        return loss, len(self.data[1]), {"accuracy": accuracy}


def get_parameters(model: PeftModel) -> NDArrays:
    """Return the adapter as arrays."""
    return [tensor.cpu().numpy() for tensor in get_peft_model_state_dict(model).values()]


def set_parameters(model: PeftModel, parameters: NDArrays) -> None:
    """Load the adapter from arrays."""
    names = get_peft_model_state_dict(model).keys()
    tensors = map(torch.from_numpy, parameters)
    set_peft_model_state_dict(model, dict(zip(names, tensors, strict=True)))


def client_fn(context: Context) -> Client:
    """Return the client of one node."""
    return DigitsClient(context).to_client()


app = ClientApp(client_fn)
