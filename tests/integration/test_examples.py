"""The examples run as their READMEs say, and what they and the documentation show is true."""

import difflib
import importlib
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Context, Error, RecordDict
from peft import PeftModel
from safetensors.torch import load_file

from fedlora_app.launch.superlink import SuperLink
from tests.fakes import FakeGrid

ROOT = Path(__file__).parents[2]
VISION, OLDSTYLE = ROOT / "examples/quickstart_vision", ROOT / "examples/oldstyle_numpy"
PRETRAIN_STEPS = 150  # enough to see what training adds


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Return a folder for the pretrained model, shared by the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def example(monkeypatch, cache):
    """Make an example's packages importable, here and in the processes of a run."""

    def enter(folder):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.syspath_prepend(str(folder))

    yield enter
    for name in [n for n in sys.modules if n.split(".")[0] in ("visionexample", "digits")]:
        del sys.modules[name]


def settings(folder, **changes):
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    return project["tool"]["flwr"]["app"]["config"] | changes


def run_in_process(server, client, config, nodes=4):
    """Run the two apps of an example without SuperLink; return the messages and replies."""
    contexts = {
        10 + i: Context(1, 10 + i, {"partition-id": i, "num-partitions": nodes}, RecordDict(),
                        config)
        for i in range(nodes)
    }  # fmt: skip
    seen = []

    def handler(message):
        try:
            reply = client.app(message, contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower reports it
            return Error(code=0, reason=repr(error))
        seen.append((message, reply))
        return reply.content

    server.app(NamedGrid(list(contexts), handler), Context(1, 0, {}, RecordDict(), config))
    return seen


def run_with_ray(folder, config, nodes=4):
    with SuperLink(simulation=True) as link:
        federation = {"num-supernodes": nodes, "client-resources-num-cpus": 1}
        run_id = link.run(folder, config, federation)
        lines = list(link.stream(run_id))
        assert link.status(run_id).completed, "\n".join(lines)
    return lines


def accuracy(task, model, folder, data):
    """Return the accuracy of a saved adapter, read by PEFT and not by us."""
    base = model.unload()
    return task.test(PeftModel.from_pretrained(base, str(folder)).eval(), data)[1]


def vision_accuracy(task, folder):
    torch.set_num_threads(1)
    model = task.make_model(task.RANK, PRETRAIN_STEPS)
    return accuracy(task, model, folder, task.load_test_data())


def digits_accuracy(task, folder):
    return accuracy(task, task.make_model(task.RANK), folder, task.load_test_data())


class NamedGrid(FakeGrid):
    """A server of the old style asks its grid for the number of the run."""

    run = SimpleNamespace(run_id=1)


# ----- quickstart_vision ---------------------------------------------------------------


@pytest.mark.parametrize("version", ["", pytest.param(".before", marks=pytest.mark.slow)])
def test_vision_before_and_after(version, example, tmp_path):
    example(VISION)
    task = importlib.import_module("visionexample.task")
    changes = {"num-server-rounds": 2, "pretrain-steps": PRETRAIN_STEPS}
    server, client = (
        importlib.import_module(f"visionexample{version}.{app}")
        for app in ("server_app", "client_app")
    )
    seen = run_in_process(server, client, settings(VISION, output=str(tmp_path), **changes))
    start = task.test(task.make_model(task.RANK, PRETRAIN_STEPS), task.load_test_data())[1]
    assert start < 0.2 < 0.4 < vision_accuracy(task, tmp_path)
    trained = [m for m, _ in seen if m.metadata.message_type == "train"]
    sizes = {sum(len(a.data) for a in m.content["arrays"].values()) for m in trained}
    assert len(sizes) == (1 if version else 4)  # one rank for all, or four


@pytest.mark.slow
def test_vision_with_ray(example, tmp_path):
    example(VISION)
    task = importlib.import_module("visionexample.task")
    changes = {"num-server-rounds": 2, "pretrain-steps": PRETRAIN_STEPS}
    lines = run_with_ray(VISION, {"output": str(tmp_path), **changes})
    assert any("4/4 clients, ranks 2-16" in line for line in lines), lines
    assert vision_accuracy(task, tmp_path) > 0.4


# ----- oldstyle_numpy ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ("server_app", "client_app"),
        ("new_style_server", "client_app"),
        ("before.server_app", "before.client_app"),
    ],
)
def test_digits_before_and_after(server, client, example, tmp_path):
    example(OLDSTYLE)
    task = importlib.import_module("digits.task")
    apps = (importlib.import_module(f"digits.{app}") for app in (server, client))
    run_in_process(*apps, settings(OLDSTYLE, output=str(tmp_path)))
    start = task.test(task.make_model(task.RANK), task.load_test_data())[1]
    assert start < 0.25 < 0.65 < digits_accuracy(task, tmp_path)


def test_old_and_new_servers_give_the_same_adapter(example, tmp_path):
    example(OLDSTYLE)
    client = importlib.import_module("digits.client_app")
    found = []
    for name in ("server_app", "new_style_server"):
        server = importlib.import_module(f"digits.{name}")
        config = settings(OLDSTYLE, output=str(tmp_path / name), **{"num-server-rounds": 2})
        run_in_process(server, client, config)
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.slow
def test_digits_with_ray(example, tmp_path):
    example(OLDSTYLE)
    task = importlib.import_module("digits.task")
    changes = {"num-server-rounds": 3, "local-steps": 40}
    lines = run_with_ray(OLDSTYLE, {"output": str(tmp_path), **changes})
    assert any("round 3/3 | 4/4 clients, ranks 1-8" in line for line in lines), lines
    assert digits_accuracy(task, tmp_path) > 0.5


# ----- what is written about them ------------------------------------------------------

PAGES = ["docs/plugging-in.md", *(f"examples/{e.name}/README.md" for e in (VISION, OLDSTYLE))]
BLOCK = re.compile(r"<!-- (examples/[^>]+) -->\n```(\w+)\n(.*?)```", re.DOTALL)


def changed(before, after):
    """Return the removed and the added lines between two files, with their signs."""
    a, b = (Path(ROOT, file).read_text().splitlines() for file in (before, after))
    return {line for line in difflib.ndiff(a, b) if line[0] in "+-"}


@pytest.mark.parametrize("page", PAGES)
def test_code_on_a_page_is_that_of_the_examples(page):
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert len(blocks) >= 2
    for files, language, text in blocks:
        files = files.split()
        if language == "diff":
            lines = changed(*files)
            shown = [f"{x[0]} {x[1:]}" for x in text.splitlines() if x != "…"]
            assert [line for line in shown if line not in lines] == [], files
        else:
            source = (ROOT / files[0]).read_text()
            assert [x for x in text.splitlines() if x.strip() and x not in source] == [], files
