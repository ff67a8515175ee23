"""The command ``fedlora``: what it shows, how it ends, and that asking for help costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from fedlora_app import supernode as node
from fedlora_app.cli import main as cli
from fedlora_app.cli.main import COMMANDS, main, run_as
from fedlora_app.config.keys import RunConfig
from fedlora_app.launch import project, watch

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "flwr", "transformers", "peft", "ray", "numpy", "matplotlib", "datasets"}


def test_help_imports_nothing_that_takes_a_while():
    code = (
        "import sys; from fedlora_app.cli.main import main; code = main(['--help']);"
        f"print(sorted({HEAVY!r} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for _, name, _, _ in COMMANDS)


@pytest.mark.parametrize("name", [name for _, name, _, _ in COMMANDS])
def test_every_command_says_what_it_does_and_shows_a_use(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: fedlora {name}" in shown
    assert "Try:" in shown
    assert f"fedlora {name}" in shown.partition("Try:")[2]
    command = typer.main.get_command(cli.app).commands[name]
    for param in command.params:
        if param.param_type_name == "argument":
            cli._explain(command, next(f for f, other, _, _ in COMMANDS if other == name))
            assert param.help
    assert run_as(name, ["--help"], f"python {name}.py") == 0
    assert f"Usage: python {name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["sit"], ["report"], ["run", "--clients", "0"], ["run", "seed"]])
def test_what_cannot_be_is_2(words, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Error" in shown.err


def test_what_is_not_installed_is_named_with_what_to_do(monkeypatch, capsys):
    with monkeypatch.context() as lacking:
        lacking.setitem(sys.modules, "fedlora_app.partition_report", None)
        with pytest.raises(ModuleNotFoundError):  # that would be a fault of ours
            main(["partition"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def lacks(*_):
        import matplotlib  # noqa: F401

    monkeypatch.setattr("fedlora_app.partition_report.show", lacks)
    assert main(["partition"]) == 2
    said = capsys.readouterr().err
    assert said == f"this needs matplotlib, which is not installed: {cli.EXTRA}\n"


def test_keys_are_found_by_words_of_their_name_and_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["config", "learning", "RATE"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["key", "default"]
    found = [line.split()[0] for line in lines[1:]]
    assert {"train.learning-rate", "train.head-learning-rate", "train.round-decay"} <= set(found)
    assert main(["config", "learning-rat"]) == 0
    capsys.readouterr()
    assert main(["config", "larning-rate"]) == 2
    assert "did you mean 'train.learning-rate'?" in capsys.readouterr().err


def test_keys_are_completed():
    from fedlora_app.cli.shared import keys

    assert keys("data.al") == ["data.alpha="]
    assert len(keys("")) == len(RunConfig().to_flat())


def test_the_defaults_of_a_node_are_those_of_its_module():
    command = typer.main.get_command(cli.app).commands["supernode"]
    told = {param.name: param.default for param in command.params}
    assert (told["poll"], told["patience"]) == (node.POLL, watch.PATIENCE)
    assert told["keep"] == node.KEEP


def test_what_a_node_does_not_know_is_passed_on_in_order(monkeypatch):
    called = []
    monkeypatch.setattr(node, "become", lambda *args, **more: called.append((args, more)))
    theirs = ["--superlink", "a:1", "--insecure", "--node-config", "max-rank=8 x=-1"]
    assert main(["supernode", *theirs[:3], "--poll", "2", *theirs[3:]]) == 0
    settings = (theirs, node.PRELOAD, 2.0, watch.PATIENCE, node.KEEP)
    assert called == [(settings, {"unchecked": False})]


def test_a_check_starts_nothing(monkeypatch, tmp_path, capsys):
    from fedlora_app.launch import simulation

    monkeypatch.chdir(tmp_path)
    for name in ("SuperLink", "RayHead", "simulate"):
        monkeypatch.setattr(simulation, name, None)
    words = ["model.name=packaged:minilm-l3", "data.partition=iid"]
    assert main(["check", "--clients", "3", "--rounds", "2", *words]) == 0
    shown = capsys.readouterr().out
    assert "shares: 3 clients" in shown
    assert shown.endswith("3 clients, 2 rounds: nothing is in the way\n")
    assert main(["check", "--node-config", "max-rank=0"]) == 2
    assert "expected a whole number of at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_project_is_a_copy_without_what_else_lies_there(tmp_path, monkeypatch):
    with project.project_folder() as folder:
        names = {path.name for path in folder.iterdir()}
        assert names == {"pyproject.toml", "LICENSE", "fedlora_app", "strategies"}
        copied = [path.relative_to(folder) for path in folder.rglob("*.py")]
        assert len(copied) > 200
        for path in ("pyproject.toml", "LICENSE", *copied):
            assert (folder / path).read_bytes() == (ROOT / path).read_bytes()
    site = tmp_path / "site-packages"
    for name in project.PACKAGES:
        (site / name / "__pycache__").mkdir(parents=True)
        (site / name / "__init__.py").write_text("")
    monkeypatch.setattr(project, "APP", site / "fedlora_app")
    with pytest.raises(FileNotFoundError, match=r"expected app\.toml, LICENSE in it"):
        project.project_folder().__enter__()
    for name in project.SHIPPED:
        (site / "fedlora_app" / name).write_text(name)
    with project.project_folder() as folder:
        made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert made == {
            "LICENSE", "pyproject.toml", "fedlora_app/__init__.py", "strategies/__init__.py"
        }  # fmt: skip
    assert not folder.exists()
