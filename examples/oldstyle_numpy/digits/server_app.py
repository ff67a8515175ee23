"""The server, in the old style: server_fn and ServerAppComponents."""

from flwr.app import Context
from flwr.common import NDArrays, Scalar
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp
from peft import get_peft_model_state_dict

from digits.task import RANK, SCALE, load_test_data, make_model, test
from strategies import FedLoRA
from strategies.client import receive_parameters
from strategies.legacy import LegacyFedLoRA
from strategies.ranks import ListRank


def server_fn(context: Context) -> ServerAppComponents:
    """Return the server's parts."""
    num_rounds = int(context.run_config["num-server-rounds"])
    lr = float(context.run_config["learning-rate"])
    ranks = [int(rank) for rank in str(context.run_config["ranks"]).split(",")]
    model = make_model(RANK)

    def evaluate(
        server_round: int, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, dict[str, Scalar]]:
        receive_parameters(model, parameters, config)
        loss, accuracy = test(model, load_test_data())
        if server_round == num_rounds:
            model.save_pretrained(str(context.run_config["output"]))
        return loss, {"accuracy": accuracy}

    strategy = LegacyFedLoRA(
        FedLoRA(client_api="numpy", ranks=ListRank(ranks, cycle=True), scale=SCALE),
        get_peft_model_state_dict(model),
        num_rounds=num_rounds,
        evaluate_fn=evaluate,
        on_fit_config_fn=lambda server_round: {"lr": lr},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=num_rounds))


app = ServerApp(server_fn=server_fn)
