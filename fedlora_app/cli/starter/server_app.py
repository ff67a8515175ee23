"""The server: FedLoRA in the place of FedAvg, each client at its own rank."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from strategies import FedLoRA, save_adapter
from strategies.client import adapter_state, receive
from strategies.messages import from_record, to_record
from strategies.ranks import ListRank

from APPNAME.task import SCALE, digits, make_model, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds and save the adapter."""
    run = context.run_config
    ranks = [int(rank) for rank in str(run["ranks"]).split(",")]
    model = make_model(max(ranks))  # of the largest rank: each client is sent its slice

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        receive(model, from_record(arrays), {"lora-scale": SCALE})
        return MetricRecord(test(model, digits()[1]))

    strategy = FedLoRA(
        aggregation=str(run["aggregation"]),
        ranks=ListRank(ranks, cycle=True),  # by client; `ReportedRank` takes each node's max-rank
        scale=SCALE,
        seed=int(run["seed"]),
        query_timeout=600,  # clients of a simulation queue for a core to say who they areCLIENT_API
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=to_record(adapter_state(model)),
        num_rounds=int(run["rounds"]),
        evaluate_fn=evaluate,
    )
    save_adapter(result.arrays, str(run["output"]), scale=SCALE)  # plain PEFT loads it
    print(f"the adapter is in {run['output']}")
