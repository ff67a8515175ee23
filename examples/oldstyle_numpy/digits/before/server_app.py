"""The server, as it was."""

from flwr.app import Context
from flwr.common import NDArrays, Scalar, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from digits.before.client_app import get_parameters, set_parameters
from digits.task import RANK, load_test_data, make_model, test


def server_fn(context: Context) -> ServerAppComponents:
    """Return the server's parts."""
    num_rounds = int(context.run_config["num-server-rounds"])
    lr = float(context.run_config["learning-rate"])
    model = make_model(RANK)

    def evaluate(
        server_round: int, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, dict[str, Scalar]]:
        set_parameters(model, parameters)
        loss, accuracy = test(model, load_test_data())
        if server_round == num_rounds:
            model.save_pretrained(str(context.run_config["output"]))
        return loss, {"accuracy": accuracy}

    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters(get_parameters(model)),
        evaluate_fn=evaluate,
        on_fit_config_fn=lambda server_round: {"lr": lr},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=num_rounds))


app = ServerApp(server_fn=server_fn)
