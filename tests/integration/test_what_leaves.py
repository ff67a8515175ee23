"""docs/privacy.md against the messages of real runs: every field, and none that is not there."""

import re
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict

from fedlora_app import client_app, server_app
from fedlora_app.config.keys import RunConfig
from strategies import FedLoRA, claims, guard, messages, participation
from strategies.aggregation import Replication
from strategies.capacity import DEVICE_FREE_BYTES, ECHO_KEY, RankCost
from strategies.client import apply_adapter, capacity, make_reply, probing, register_profile
from strategies.privacy import Privacy, PrivateRun
from strategies.ranks import AutoRank, CapacityRank, QualityRank, UniformRank
from tests.app.test_discretion import ask
from tests.app.test_models import folders  # noqa: F401
from tests.fakes import FakeGrid
from tests.integration.test_options import BASE, NODES, Nodes, files  # noqa: F401
from tests.integration.test_plugin import data, make_model, train

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "privacy.md"
KINDS = {
    "get_properties": "Answer to a query",
    "query": "Answer to a query",
    "train": "Reply to a training message",
    "evaluate": "Reply to an evaluation message",
}
SECTIONS = tuple(dict.fromkeys(KINDS.values()))


def table(section):
    """Return what the page says of one kind of reply: by API, field -> what DP makes of it."""
    text = PAGE.read_text().split(f"### {section}")[1].split("\n### ")[0]
    found = {"numpy": {}, "message": {}}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) != 5 or "`" not in "".join(cells[:2]):
            continue
        for api, cell in zip(found, cells[:2], strict=True):
            found[api] |= dict.fromkeys(re.findall(r"`([^`]+)`", cell), cells[4])
    return found


def fields(content):
    """Return the fields of a reply as the page writes them; arrays are one field."""
    found = set(content.array_records)
    for name, record in (*content.metric_records.items(), *content.config_records.items()):
        found |= {f"{name}: {key}" for key in record}
    return found


class Listener:
    """A handler that keeps what leaves the nodes."""

    def __init__(self, handler):
        self.handler, self.left, self.contents = handler, {s: set() for s in SECTIONS}, []

    def __call__(self, message):
        content = self.handler(message)
        assert isinstance(content, RecordDict), content
        section = KINDS[message.metadata.message_type]
        self.left[section] |= fields(content)
        self.contents.append((section, content))
        return content


def numpy_run(files, folder, monkeypatch, **option):  # noqa: F811
    monkeypatch.setattr("fedlora_app.report.folder.plot_run", lambda *_: [])
    flat = {**BASE, **files, "output": str(folder), **option}
    flat = RunConfig.from_flat(flat).to_flat()
    nodes = Nodes(flat)
    for context in nodes.contexts.values():
        context.node_config["data-path"] = str(Path(files["data.name"]) / "train.csv")
        context.node_config["num-examples"] = 48
        context.node_config["site"] = "stays here"
    client_app._resident_model.cache_clear()
    heard = Listener(nodes)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    server_app.main(FakeGrid(NODES, heard), context)
    return heard


def message_app():
    app = ClientApp()
    register_profile(
        app,
        lambda context: (data(context.node_id)[0].abs().sum(1), [0, 1, 1]),
        capacity_of=lambda context, config: capacity(context.state, config, lambda: int),
    )

    @app.train()
    def fit(message, context):
        model = make_model()
        config = apply_adapter(model, message, context, measure=lambda: ([0.5, 0.1], [0, 1]))
        x, y = data(context.node_id)
        loss = train(model, x, y, 0.1)
        extra = {"quality": 0.5} if config.get("report-quality") else {}
        extra |= {"validation-loss": 1.0} if config.get("validate") else {}
        return make_reply(model, message, context=context, num_examples=len(x), loss=loss,
                          metrics=extra, steps=5)  # fmt: skip

    @app.evaluate()
    def score(message, context):
        model = make_model()
        apply_adapter(model, message, context)
        return make_reply(model, message, context=context, num_examples=40, loss=0.5,
                          metrics={"accuracy": 0.5, "macro_f1": 0.5})  # fmt: skip

    return app


def message_run(**options):
    app = message_app()
    contexts = {
        node: Context(
            1, node, {"partition-id": i, "max-rank": 4, "num-examples": 40, "site": "stays here"},
            RecordDict(), {},
        )
        for i, node in enumerate(NODES)
    }  # fmt: skip
    heard = Listener(lambda m: app(m, contexts[m.metadata.dst_node_id]).content)
    FedLoRA(scale=2.0, **options).start(
        grid=FakeGrid(NODES, heard),
        initial_arrays=ArrayRecord(get_peft_model_state_dict(make_model())),
        num_rounds=2,
        train_config=ConfigRecord({}),
    )
    return heard


def joined(runs):
    return {section: set().union(*(run.left[section] for run in runs)) for section in SECTIONS}


@pytest.fixture(autouse=True)
def with_an_accelerator(monkeypatch):
    """Have a node say what one with an accelerator says."""
    real = probing.probe
    monkeypatch.setattr(
        probing, "probe", lambda *a, **k: {**real(*a, **k), DEVICE_FREE_BYTES: 1e12}
    )


def test_the_app_sends_what_the_page_says_and_nothing_else(files, tmp_path, monkeypatch):  # noqa: F811
    options = [
        {"ranks.policy": "autorank", "ranks.reassign-every": 1},
        {"ranks.policy": "quality"},
        {"ranks.policy": "capacity", "evaluate.clients": 0.0},
        {"sampling.policy": "weighted", "wire-dtype": "int8"},
    ]
    runs = [
        numpy_run(files, tmp_path / str(i), monkeypatch, **option)
        for i, option in enumerate(options)
    ]
    for section, found in joined(runs).items():
        assert found == table(section)["numpy"].keys(), section
    for _, content in (pair for run in runs for pair in run.contents):
        for name, record in content.config_records.items():
            if not name.endswith(".status"):
                texts = {key for key, value in record.items() if isinstance(value, str | bytes)}
                assert texts <= {ECHO_KEY}  # the server's own, back
            elif "message" in record:
                assert record["message"] in ("Success", "")


def test_a_message_api_app_sends_what_the_page_says_and_nothing_else():
    runs = [
        message_run(ranks=AutoRank(2, 4, reassign_every=1), evaluate_fraction=1.0),
        message_run(ranks=QualityRank(2, 4)),
        message_run(ranks=CapacityRank(4, cost=RankCost(1e6, 1e3, 5, 1e3, 1e3))),
        message_run(aggregation=Replication(holder_weights="quality"), ranks=UniformRank(4)),
    ]
    for section, found in joined(runs).items():
        assert found == table(section)["message"].keys(), section


SENT = ("sent", "clipped, with noise", "the constant 1")


@pytest.mark.parametrize("api", ["numpy", "message"])
def test_a_private_node_sends_what_the_page_says(files, tmp_path, monkeypatch, api):  # noqa: F811
    pytest.importorskip("dp_accounting")
    if api == "numpy":
        private = {"privacy.noise-multiplier": 1.0, "privacy.clip": 0.5, "evaluate.clients": 0.0}
        run = numpy_run(files, tmp_path, monkeypatch, **private, **{"ranks.policy": "reported"})
    else:
        private = PrivateRun(Privacy(clip=0.5, noise_multiplier=1.0))
        run = message_run(privacy=private, ranks=UniformRank(4), evaluate_fraction=0.0)
    for section, found in run.left.items():
        said = table(section)[api]
        assert found == {field for field, fate in said.items() if fate.startswith(SENT)}, section
    for section, content in run.contents:
        counts = [v for r in content.metric_records.values() for v in r.values()]
        assert section != SECTIONS[1] or counts == [1]


def test_an_error_tells_what_the_page_says(tmp_path, monkeypatch):
    """Both kinds of the page's examples, word for word but for the place."""
    page = PAGE.read_text()
    bad = tmp_path / "d.csv"
    bad.write_bytes(b"text,label\n\xe9,food\n")
    reason = ask("query", {"data-path": str(bad)}).error.reason
    assert f"`{reason}`" in page

    def fails(*_):
        raise KeyError("Jane Placeholder")

    monkeypatch.setattr(client_app, "_own_rows", fails)
    place = re.compile(r"in \w+\.py, line \d+")
    reason = ask("query", {"data-path": str(bad)}).error.reason
    assert place.search(reason)
    assert f"`{place.sub('', reason)}`" in place.sub("", page)


def test_the_page_of_guards_has_the_numbers_of_the_code():
    page = (DOCS / "guards.md").read_text()
    for said in (
        f"up to {messages.BYTES_FACTOR} times those that were planned, and "
        f"{messages.BYTES_MORE >> 20} MiB",
        f"up to {guard.NORM_FACTOR:g} times the median of the last {guard.REMEMBERED}",
        f"with fewer than {guard.FEWEST} of these, {guard.NORM_FACTOR:g} times",
        f"up to {guard.COUNT_FACTOR:g} times its own first one",
        f"up to {guard.OTHERS_FACTOR:g} times the median of the others",
        f"up to {guard.MOST_ALONE:g}",
        f"up to {guard.EVALUATION_FACTOR:g} times the first one",
        f"no more than {claims.LARGEST:.1e}",
        f"Up to {claims.MOST_METRICS} of them",
        f"names of up to {claims.LONGEST_NAME} characters",
        f"{claims.REASON_LENGTH} characters, on one line",
    ):
        assert said in page, said
    assert f"{claims.REASON_LENGTH} characters of it, on one line" in PAGE.read_text()
    sampling = (DOCS / "sampling.md").read_text()
    assert f"`1/p` ends at {participation.MOST_MADE_UP:g}" in sampling
