"""``fedlora new``: the project that it writes runs as it is."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel

from fedlora_app.cli.main import main
from fedlora_app.cli.new import Api, files
from tests.integration.test_examples import run_in_process, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def new(api):
        assert main(["new", "my-app", "--api", api]) == 0
        monkeypatch.syspath_prepend(str(tmp_path / "my-app"))
        return tmp_path / "my-app"

    yield new
    for name in [name for name in sys.modules if name.split(".")[0] == "my_app"]:
        del sys.modules[name]


@pytest.mark.parametrize("api", [str(api) for api in Api])
def test_it_trains_clients_of_different_rank_and_plain_peft_loads_the_result(api, made, capsys):
    folder = made(api)
    assert f"run it with: fedlora run --app {Path('my-app')}" in capsys.readouterr().out
    parts = [importlib.import_module(f"my_app.{name}") for name in ("server_app", "client_app")]
    task = importlib.import_module("my_app.task")
    before = task.test(task.make_model(16), task.digits()[1])
    config = settings(folder, rounds=2, steps=10)
    seen = run_in_process(*parts, config)
    sizes = {sum(arrays.count_bytes() for arrays in message.content.array_records.values())
             for message, _ in seen}  # fmt: skip
    assert len(sizes) >= 4  # one for each rank
    base = task.make_model(16).unload()
    after = task.test(PeftModel.from_pretrained(base, "adapter").eval(), task.digits()[1])
    assert after["accuracy"] > before["accuracy"] + 0.3


def test_it_is_clean(made):
    folder = made("message")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    words = "".join(file.read_text() for file in folder.rglob("*.*"))
    assert not {
        word for word in ("APPNAME", "PROJECTNAME", "VERSION", "CLIENT_API") if word in words
    }
    assert {len(files(api)) for api in Api} == {5}


@pytest.mark.parametrize(
    ("name", "said"),
    [("My_App", "expected a name of small letters"), ("there", "is there already")],
)
def test_what_it_does_not_write(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert main(["new", name]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.slow
@pytest.mark.parametrize("api", [str(api) for api in Api])
def test_it_runs_in_flowers_simulation(api, made):
    folder = made(api)
    command = [sys.executable, "-m", "fedlora_app.cli", "run", "--app", "my-app", "--clients", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "rounds=2"], cwd=folder.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder.parent / "adapter" / "adapter_config.json").exists()
