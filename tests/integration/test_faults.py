"""What goes wrong in a federation, each fault on a real SuperLink with real SuperNodes."""

import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flwr.app import ArrayRecord
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from fedlora_app.launch.superlink import RunStatus, SuperLink
from strategies import FedLoRA
from strategies.guard import COUNT_FACTOR
from strategies.messages import to_record
from strategies.ranks import UniformRank
from strategies.sampling import FractionSampling
from tests.fakes import FakeGrid, message_reply, query_reply, random_adapter
from tests.integration.conftest import ROOT, records, wait_for

FAULTY = Path(__file__).parent / "faulty_app"
TIMEOUT = 300.0  # seconds; for what takes a few where nothing else runs


class Run(NamedTuple):
    """A run that is over."""

    folder: Path
    log: str
    status: RunStatus

    def part(self, client: int) -> dict[int, str]:
        """Return a client's status by round."""
        done = records(self.folder, "client")
        return {r["round"]: r["status"] for r in done if r["client"] == client}

    def reason(self, client: int, server_round: int) -> str:
        """Return why a reply was rejected, as metrics.jsonl has it; the log must have it too."""
        (record,) = (
            r
            for r in records(self.folder, "client")
            if (r["client"], r["round"]) == (client, server_round)
        )
        assert record["status"] == "rejected"
        name = f"client {client} (node {record['node']})"
        assert f"round {server_round}: rejected {name}: {record['reason'][:30]}" in self.log
        return record["reason"]

    def final(self) -> float:
        """Return what every number of the model has become."""
        ends = [x for pair in json.loads((self.folder / "final.json").read_text()).values()
                for x in pair]  # fmt: skip
        assert ends == pytest.approx([ends[0]] * len(ends), rel=1e-5)
        return ends[0]


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """Let the app of these tests import ``strategies``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


def node(link: SuperLink, partition: int, *faults: str):
    words = f' faults="{",".join(faults)}"' if faults else ""
    # One of them is the warm one, whose clients are copies of a process that has to live on.
    return link.start_supernode(f"partition-id={partition}{words}", warm=partition == 2)


def watch(
    link: SuperLink,
    folder: Path,
    config: dict[str, Any],
    meanwhile: Callable[[], object] = lambda: None,
) -> Run:
    """Run the app to its end; ``meanwhile`` is called once it has been submitted."""
    run_id = link.run(FAULTY, {"output": str(folder), **config})
    meanwhile()
    return Run(folder, "\n".join(link.stream(run_id)), link.status(run_id))


def begun(folder: Path, server_round: int) -> bool:
    """Tell whether a round has begun."""
    if not (folder / "metrics.jsonl").exists():
        return False
    return server_round in [r["round"] for r in records(folder, "round-start")]


# --- one run with every bad reply, a newcomer and a full disk

CLIP = 1000.0
NUMBERS = 4 * 6 + 5 * 4 + 30_000  # of the app's model; a client adds its step to each
FAULTS = {
    1: ["raise", "nan", "rank", "truncated"],
    2: ["norm", "zero", "negative", "nan-count"],
    3: ["text", "absurd", "", ""],
}
REASONS = {
    "raise": r"error 2: .*CUDA out of memory",
    "nan": r"'.*' holds NaN or Inf",
    "rank": r"rank 3 for 'layer', but rank 4 was assigned",
    "truncated": r"array 'head.bias' cannot be read",
    "zero": r"num-examples is 0, expected a number above 0",
    "negative": r"num-examples is -5, expected a number above 0",
    "nan-count": r"num-examples is nan, expected a number above 0",
    "text": r"'num-examples', by which replies are weighted, is missing",
    "absurd": r"num-examples is 1e\+12, more than 1000 times what others report",
}


@pytest.fixture(scope="module")
def stormy(tmp_path_factory) -> Run:
    """Return four rounds of clients 0 (honest), 1, 2 and 3 (each bad) and 4 (from round 3)."""
    folder = tmp_path_factory.mktemp("stormy") / "run"
    config = {"rounds": 4, "min-nodes": 4, "clip-norm": CLIP}
    config |= {"newcomer-round": 3, "full-disk-round": 2}
    with SuperLink(timeout=TIMEOUT) as link:
        node(link, 0)
        for partition, faults in FAULTS.items():
            node(link, partition, *faults)

        def add_one() -> None:
            wait_for(lambda: begun(folder, 2))
            node(link, 4)

        run = watch(link, folder, config, add_one)
    assert run.status.completed, (run.status, run.log)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("fault", REASONS)
def test_a_bad_reply_is_rejected_with_its_node_and_cause(stormy, fault):
    client = next(i for i, faults in FAULTS.items() if fault in faults)
    reason = stormy.reason(client, FAULTS[client].index(fault) + 1)
    assert re.search(REASONS[fault], reason, re.DOTALL), reason


@pytest.mark.slow
def test_who_was_bad_is_asked_again_and_the_others_are_not_touched(stormy):
    assert stormy.part(0) == dict.fromkeys((1, 2, 3, 4), "ok")
    assert stormy.part(1) == dict.fromkeys((1, 2, 3, 4), "rejected")
    assert stormy.part(2) == {1: "ok", 2: "rejected", 3: "rejected", 4: "rejected"}
    assert stormy.part(3) == {1: "rejected", 2: "rejected", 3: "ok", 4: "ok"}


@pytest.mark.slow
def test_a_newcomer_works_from_the_round_it_came_in(stormy):
    assert stormy.part(4) == {3: "ok", 4: "ok"}


@pytest.mark.slow
def test_a_change_of_a_hundred_times_the_norm_is_scaled_down_and_named(stormy):
    said = re.search(r"round 1: client 2 \(node \d+\): its change of norm (\S+) was", stormy.log)
    assert said, stormy.log
    assert float(said[1]) == pytest.approx(300 * math.sqrt(NUMBERS), rel=1e-3)


@pytest.mark.slow
def test_the_model_is_the_mean_of_the_good_replies(stormy):
    """Every number of client i's reply is i + 1 more than it was sent, or less after clipping."""
    clipped = CLIP / math.sqrt(NUMBERS)
    moves = [(1 + clipped) / 2, 1, (1 + 4 + 5) / 3, (1 + 4 + 5) / 3]
    assert stormy.final() == pytest.approx(1 + sum(moves), rel=1e-4)


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(stormy):
    assert re.search(r"no checkpoint of round 2: .*; the run goes on, and older", stormy.log)
    found = sorted(p.name for p in (stormy.folder / "checkpoints").glob("round-*"))
    assert [int(name.split("-")[1]) for name in found] == [1, 3, 4]


# --- nodes that are gone, or say nothing


@pytest.mark.slow
def test_a_supernode_or_a_clients_process_killed_in_a_round_is_named(tmp_path):
    """Flower tells once either has missed two heartbeats, a minute after the last one."""
    folder = tmp_path / "run"
    with SuperLink(timeout=TIMEOUT) as link:
        node(link, 0)
        victim = node(link, 1, "", "hang")
        node(link, 2, "", "die")

        def kill() -> None:
            wait_for(lambda: begun(folder, 2))
            time.sleep(3)  # in the middle of it
            victim.send_signal(signal.SIGKILL)

        config = {"rounds": 4, "min-nodes": 3, "round-timeout": 2 * TIMEOUT}
        run = watch(link, folder, config, kill)
    assert run.status.completed, (run.status, run.log)
    assert run.part(0) == dict.fromkeys((1, 2, 3, 4), "ok")
    assert run.part(1) == {1: "ok", 2: "rejected"}
    assert run.part(2) == {1: "ok", 2: "rejected", 3: "ok", 4: "ok"}
    assert "Node Unavailable" in run.reason(1, 2)
    assert "ClientApp stopped responding" in run.reason(2, 2)
    assert re.search(r"client 1 \(node \d+\) is gone", run.log)
    assert run.final() == pytest.approx(1 + (1 + 2 + 3) / 3 + 1 + (1 + 3) / 2 + (1 + 3) / 2)


@pytest.mark.slow
def test_a_node_that_never_answers_costs_a_deadline(tmp_path):
    with SuperLink(timeout=TIMEOUT) as link:
        node(link, 0)
        node(link, 1, "hang")
        config = {"rounds": 2, "round-timeout": 40.0, "min-replies": 2}
        run = watch(link, tmp_path / "run", config)
    assert run.status.completed, (run.status, run.log)
    assert "no answer" in run.reason(1, 1)
    assert "round 1: 1 good replies, fewer than min_replies = 2" in run.log
    first = records(run.folder, "round")[0]
    assert 40 <= first["seconds"] < 80
    assert run.final() == 1  # one reply was never enough


# --- what needs no processes


def honest(message, partition):
    if message.metadata.message_type == "query":
        return query_reply(**{"partition-id": partition})
    return message_reply(random_adapter(4, seed=partition), weight=10)


def start(grid, rounds: int, **options) -> tuple[ArrayRecord, list[dict]]:
    found: list[dict] = []
    strategy = FedLoRA(
        ranks=UniformRank(4), sampling=FractionSampling(1.0), scale=2.0, query=True,
        evaluate_fraction=0.0, listeners=[found.append], **options,
    )  # fmt: skip
    initial = to_record(random_adapter(4, seed=9).to_state_dict())
    return strategy.start(grid, initial, rounds, timeout=5).arrays, found


@pytest.mark.parametrize(("count", "good"), [(100, True), (101, False), (1, True), (1e12, False)])
def test_a_count_is_measured_by_what_the_node_said_before(count, good):
    """What it said in round 1 is its own measure; from then on ten times is most."""
    assert COUNT_FACTOR == 10

    def handler(message):
        content = honest(message, message.metadata.dst_node_id)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1:
            round_two = message.content["config"]["server-round"] == 2
            content["metrics"]["num-examples"] = count if round_two else 10
        return content

    _, found = start(FakeGrid([0, 1], handler), 2)
    (record,) = (r for r in found if r["kind"] == "client" and (r["client"], r["round"]) == (1, 2))
    assert record["status"] == ("ok" if good else "rejected")
    if not good:
        assert f"num-examples is {count:g}, but this node reported 10 before" in record["reason"]


def test_weights_that_are_no_counts_may_change_as_they_like():
    def handler(message):
        content = honest(message, message.metadata.dst_node_id)
        if message.metadata.message_type == "train":
            content["metrics"]["trust"] = 1e-9 * 1e6 ** message.content["config"]["server-round"]
        return content

    _, found = start(FakeGrid([0, 1], handler), 3, weighted_by_key="trust")
    assert {r["status"] for r in found if r["kind"] == "client"} == {"ok"}


class Losing(FakeGrid):
    """A SuperLink that has lost node 1: it answers in its own name, as Flower's does."""

    def pull_messages(self, message_ids):
        lost = [m for m in self.sent if m.metadata.dst_node_id == 1]
        gone = {
            m.metadata.message_id: m.metadata for m in lost if m.metadata.message_type != "query"
        }
        own = [create_message_error_unavailable_res_message(gone[i], "node_unavail")
               for i in message_ids if i in gone]  # fmt: skip
        return [*own, *super().pull_messages(i for i in message_ids if i not in gone)]


def test_what_the_superlink_says_of_a_node_is_put_down_to_that_node(caplog):
    caplog.set_level("WARNING", logger="flwr")
    grid = Losing([0, 1], lambda m: honest(m, m.metadata.dst_node_id))
    began = time.monotonic()
    _, found = start(grid, 1)
    assert time.monotonic() - began < 5  # nobody waits for a node that is known to be gone
    (record,) = (r for r in found if r["kind"] == "client" and r["client"] == 1)
    assert re.match(r"error 5: .*Node Unavailable", record["reason"])
    assert "rejected client 1 (node 1): error 5" in caplog.text
    assert "ignored" not in caplog.text


def test_min_nodes_are_waited_for_at_first_and_not_when_one_has_gone(caplog):
    caplog.set_level("WARNING", logger="flwr")

    def handler(message):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 2:
            grid.nodes.remove(2)
            return None
        return honest(message, message.metadata.dst_node_id)

    grid = FakeGrid([0, 1, 2], handler)
    _, found = start(grid, 2, min_available_nodes=3, min_replies=2)
    assert [r["accepted"] for r in found if r["kind"] == "round"] == [2, 2]
    assert "client 2 (node 2) is gone" in caplog.text
