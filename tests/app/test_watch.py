"""Why a SuperNode ends, in words and in time; real processes: tests/integration."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError

from fedlora_app.flower import part
from fedlora_app.launch.warm import _look_often
from fedlora_app.launch.watch import Watch, refusal


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        (17, "17 s ahead of"),
        (400, "400 s ahead of"),
        (-400, "400 s behind"),
        (0, "does not know this node"),
        (-200, "does not know this node"),  # within the limits, so it is something else
    ],
)
def test_the_clock_is_named_where_it_is_the_clock(ahead: float, words: str) -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert words in refusal(format_datetime(now - timedelta(seconds=ahead), usegmt=True), now)


@pytest.mark.parametrize("date", [None, "", "yesterday", "Wed, 25 Nov 2026 10:00:00"])
def test_an_answer_without_a_date_is_no_proof(date: str | None) -> None:
    assert "does not know this node" in refusal(date)


class Node:
    """Flower's state of a node with one task."""

    status = "pending"

    def get_tasks(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(status=SimpleNamespace(status=self.status))]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr("fedlora_app.launch.watch.time.sleep", lambda seconds: None)
    monkeypatch.setattr("fedlora_app.launch.watch.FORCE", 3600)
    return Watch(poll=0.5, patience=10)


def waits(watch: Watch, node: Node, seconds: float) -> None:
    def push(state: Node) -> None:
        for _ in range(int(seconds / 0.5)):
            watch._sleep(0.5)

    watch._attended(push)(node)


def test_patience_ends_only_for_a_message_without_a_live_client(watch, capsys) -> None:
    node = Node()
    for _ in range(3):
        waits(watch, node, 9)  # each message has its own time
    node.status = "running"
    waits(watch, node, 1000)
    assert watch.reason == ""
    for _ in range(100):
        watch._sleep(3)  # no message, no hurry
    node.status = "finished"  # dead before it fetched its message: Flower would wait for ever
    with pytest.raises(SystemExit) as ended:
        waits(watch, node, 11)
    assert ended.value.code == 1
    assert "for 10 s it has had a message" in capsys.readouterr().err


class Late:
    """The parts of a record, each of which is there at the eighth look."""

    def __init__(self) -> None:
        self.record = ConfigRecord({"a": 1})
        self.contents = {i: o.deflate() for i, o in get_all_nested_objects(self.record).items()}
        self.looks = 0

    def pull(self, part: str) -> bytes:
        self.looks += 1
        if self.looks < 8:
            raise ObjectUnavailableError(part)
        return self.contents[part]


def test_parts_of_a_message_are_looked_for_at_short_pauses(watch, monkeypatch) -> None:
    """Flower's double: eight looks of its own take more than a minute."""
    watch._poll, late = 0.01, Late()
    loop, connection = vars(part("supernode_loop")), vars(part("supernode_connection"))
    for module in (loop, connection):
        for name in module.keys() & {"time", "pull_objects", "_push_messages", "HeartbeatSender",
                                     "NodeAuthHttpInterceptor"}:  # fmt: skip
            monkeypatch.setitem(module, name, module[name])
    watch.install()
    began = time.monotonic()
    assert loop["pull_objects"](list(late.contents), late.pull) == late.contents

    client, name = vars(part("clientapp")), "pull_and_inflate_object_from_tree"
    monkeypatch.setitem(client, name, client[name])
    _look_often(0.01)
    late, had = Late(), []
    found = client[name](get_object_tree(late.record), late.pull, had.append,
                         return_type=ConfigRecord)  # fmt: skip
    assert found == late.record
    assert had == [late.record.object_id]
    assert time.monotonic() - began < 3


def test_the_first_reason_counts(watch, capsys) -> None:
    watch.end("one")
    watch.end("two")
    assert watch.reason == "one"
    assert capsys.readouterr().err == "this SuperNode ends: one\n"


def test_a_process_ends_with_its_parent_also_if_that_was_first() -> None:
    script = """
import os, sys, time
from fedlora_app.launch.processes import die_with
parent = os.getpid()
if os.fork() == 0:
    time.sleep(float(sys.argv[1]))
    die_with(parent)
    os.write(1, b"here\\n")  # at once: two processes write here
    time.sleep(600)
os.write(1, b"%d\\n" % parent)
time.sleep(float(sys.argv[2]))
"""
    for child, parent in ((0, 600), (1, 0)):
        started = subprocess.Popen(
            [sys.executable, "-c", script, str(child), str(parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        if parent:
            assert {started.stdout.readline().strip() for _ in range(2)} == {
                "here",
                str(started.pid),
            }
            os.kill(started.pid, signal.SIGKILL)
        began = time.monotonic()
        rest = started.stdout.read()  # ends when the child has
        assert time.monotonic() - began < 20
        assert ("here" in rest) is False
        started.wait()
