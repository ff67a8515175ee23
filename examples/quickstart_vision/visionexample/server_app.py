"""visionexample: A Flower / PyTorch app."""

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from strategies import FedLoRA
from strategies.ranks import ListRank
from visionexample.task import RANK, SCALE, load_test_data, make_model
from visionexample.task import test as test_fn

# Create ServerApp
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the ServerApp."""
    # Read run config
    fraction_evaluate = float(context.run_config["fraction-evaluate"])
    num_rounds = int(context.run_config["num-server-rounds"])
    lr = float(context.run_config["learning-rate"])
    ranks = [int(rank) for rank in str(context.run_config["ranks"]).split(",")]

    # Load global model
    global_model = make_model(RANK, int(context.run_config["pretrain-steps"]))
    arrays = ArrayRecord(get_peft_model_state_dict(global_model))

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate the model on central data."""
        set_peft_model_state_dict(global_model, arrays.to_torch_state_dict())
        loss, accuracy = test_fn(global_model, load_test_data())
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    # Initialize FedLoRA strategy
    policy = ListRank(ranks, cycle=True)  # by client, up to RANK
    strategy = FedLoRA(
        aggregation="replication", ranks=policy, scale=SCALE, evaluate_fraction=fraction_evaluate
    )

    # Start strategy, run FedLoRA for `num_rounds`
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": lr}),
        num_rounds=num_rounds,
        evaluate_fn=global_evaluate,
    )

    # Save final model to disk
    set_peft_model_state_dict(global_model, result.arrays.to_torch_state_dict())
    global_model.save_pretrained(str(context.run_config["output"]))
