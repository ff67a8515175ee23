"""The same clients under a server of the new style."""

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from digits.task import RANK, SCALE, load_test_data, make_model, test
from strategies import FedLoRA
from strategies.ranks import ListRank

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the server."""
    ranks = [int(rank) for rank in str(context.run_config["ranks"]).split(",")]
    model = make_model(RANK)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        loss, accuracy = test(model, load_test_data())
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedLoRA(client_api="numpy", ranks=ListRank(ranks, cycle=True), scale=SCALE)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=int(context.run_config["num-server-rounds"]),
        train_config=ConfigRecord({"lr": float(context.run_config["learning-rate"])}),
        evaluate_fn=evaluate,
    )
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    model.save_pretrained(str(context.run_config["output"]))
