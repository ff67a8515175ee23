"""What ``pip install`` of this project brings: the wheel, what it needs, and its types."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DECLARED = {"flwr", "numpy", "safetensors", "torch"}
# Only for who has what it builds on installed anyway; nothing else in `strategies` imports it.
FOR_OTHERS = {"strategies.huggingface"}

pytest.importorskip("hatchling", reason="the wheel is built without a network")

# Everything in `strategies`, used and not only imported; prints what is wrong.
USE = """
import importlib, json, pkgutil, sys
import numpy as np
import strategies
wrong = []
for module in pkgutil.walk_packages(strategies.__path__, "strategies."):
    if not module.name.endswith(".__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            wrong.append(module.name)
from strategies import FedLoRA, presets
from strategies.aggregation import AGGREGATIONS
from strategies.sampling import SAMPLERS
for name in AGGREGATIONS:
    FedLoRA(aggregation=name)
for name in SAMPLERS:
    FedLoRA(sampling=name)
for preset in vars(presets).values():
    if isinstance(preset, type) and issubclass(preset, FedLoRA):
        preset()
print(json.dumps({"wrong": wrong, "from": strategies.__file__, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def needed(names):
    """Return every distribution that pip installs for these, by what each declares."""
    found, waiting = {}, sorted(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform, or it came with the system
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Make an environment with the wheel and what it declares, and nothing else."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for distribution in needed(DECLARED).values():
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "/"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return venv / "bin" / "python"


def test_the_wheel_declares_what_strategies_need_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        head = message_from_bytes(archive.read(name))
    required = [Requirement(line) for line in head.get_all("Requires-Dist")]
    unconditional = {r.name for r in required if r.marker is None}
    assert unconditional == DECLARED
    assert all("extra" in str(r.marker) for r in required if r.marker is not None)
    assert "License :: OSI Approved :: Apache Software License" in head.get_all("Classifier")


def test_the_wheel_ships_types_and_licence_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licence = next(n for n in names if n.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert {"strategies/py.typed", "fedlora_app/py.typed"} <= set(names)
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"strategies", "fedlora_app"}
    packages = {path.parent for path in (ROOT / "strategies").rglob("*.py")}
    assert all(f"{p.relative_to(ROOT).as_posix()}/__init__.py" in names for p in packages)


def test_strategies_work_where_only_that_is_installed(clean, tmp_path):
    for absent in ("peft", "transformers", "datasets", "ray", "matplotlib", "sklearn", "scipy"):
        done = subprocess.run([clean, "-c", f"import {absent}"], capture_output=True, cwd=tmp_path)
        assert done.returncode != 0, f"{absent} is there; the environment proves nothing"
    done = subprocess.run([clean, "-I", "-c", USE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["wrong"]) <= FOR_OTHERS
    assert Path(found["from"]).is_relative_to(clean.parents[1])
    assert not [m for m in found["modules"] if m.split(".")[0] == "fedlora_app"]


def test_strategies_never_import_the_app():
    for path in (ROOT / "strategies").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [n for n in names if n.split(".")[0] == "fedlora_app"], path


def test_every_paper_that_the_code_follows_is_cited():
    named = re.compile(r"ar[Xx]iv(?:\.org/abs/|:| |\n *)(\d{4}\.\d{5})")
    cited = set(named.findall((ROOT / "CITATION.cff").read_text(encoding="utf-8")))
    for path in (ROOT / "strategies").rglob("*.py"):
        assert set(named.findall(path.read_text(encoding="utf-8"))) <= cited, path


@pytest.mark.slow
def test_a_strictly_typed_project_can_use_them(clean, tmp_path):
    """The examples of docs/extending.md and a consumer, under ``mypy --strict``."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    files = []
    for i, block in enumerate(page.split("```python\n")[1:]):
        files.append(tmp_path / f"own_{i}.py")
        files[-1].write_text(block.split("```")[0], encoding="utf-8")
    files.append(tmp_path / "consumer.py")
    files[-1].write_text(CONSUMER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(clean)]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), *files],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = {"strategy": "strategies.FedLoRA", "client": "strategies.client.apply_adapter"}
    for page, name in shown.items():
        text = (tmp_path / "api" / f"{page}.html").read_text(encoding="utf-8")
        assert f'id="{name}"' in text


CONSUMER = """
from typing import assert_type

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from strategies import FedLoRA
from strategies.aggregation import FlexLoRA, Update, make_aggregator
from strategies.lora import Adapter
from strategies.presets import AutoRank
from strategies.ranks import ListRank, RankPolicy


def serve(grid: Grid, arrays: ArrayRecord) -> Result:
    policy = ListRank([4, 8], cycle=True)
    assert_type(policy.max_rank, int)
    strategy = FedLoRA(aggregation=FlexLoRA(), ranks=policy, scale=2.0)
    assert_type(strategy.ranks, RankPolicy)
    return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=3)


def combine(current: Adapter, updates: list[tuple[Adapter, float]]) -> Adapter:
    rule = make_aggregator("flexlora")
    return rule.aggregate(current, [Update(a, w) for a, w in updates]).adapter


strategy: FedLoRA = AutoRank(min_rank=2, budget=8)
"""


def test_the_bundle_is_code_alone_and_of_the_format_that_flower_hub_takes(tmp_path):
    """By Flower's own reading of it, as `flwr build` and `flwr app publish` do."""
    from flwr.cli.app_cmd.publish import _validate_app_name, _validate_description
    from flwr.cli.build import build_fab_from_files
    from flwr.cli.utils import collect_files

    project = tmp_path / "project"
    for name in ("fedlora_app", "strategies"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    (project / "site-a.jsonl").write_text('{"text": "private"}\n')
    (project / "strategies" / "rows.json").write_text("[]")
    subprocess.run([str(Path(sys.executable).with_name("flwr")), "build"], cwd=project, check=True)
    (bundle,) = project.glob("*.fab")
    content, known = build_fab_from_files(collect_files(project))
    assert bundle.read_bytes() == content
    assert (known.fab_format_version, known.flwr_version_min) == (1, "1.41")
    assert known.flwr_version_target == metadata.version("flwr")
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
        assert archive.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {"fedlora_app/client_app.py", "fedlora_app/server_app.py"} <= set(names)
    assert {Path(n).suffix for n in names if not n.startswith(".info")} == {".py", ".toml", ""}
    head = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _validate_app_name(head["name"], "name")
    _validate_description(head["description"])


@pytest.fixture(scope="module")
def sent():
    """Return what Flower Hub would take of the repository: paths, by their names in it."""
    from flwr.cli.utils import filter_paths_for_publish

    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if known.returncode:
        pytest.skip("not a git repository")
    files = {name: ROOT / name for name in known.stdout.split("\n") if (ROOT / name).is_file()}
    return filter_paths_for_publish(files)


def test_flower_hub_would_take_every_file_of_the_repository(sent):
    from flwr.cli.app_cmd.publish import _validate_files

    assert {"pyproject.toml", "README.md", "LICENSE", "fedlora_app/client_app.py"} <= set(sent)
    _validate_files(list(sent.values()))  # sizes, numbers, UTF-8


@pytest.fixture(scope="module")
def from_hub(sent, tmp_path_factory):
    """Return the project as `flwr new` brings it: what Flower Hub takes, and nothing else."""
    folder = tmp_path_factory.mktemp("hub") / "fedlora"
    for name, path in sent.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return folder


def test_a_copy_from_the_hub_can_be_installed(from_hub, tmp_path):
    """The second of a Hub app's three lines; from what is here, so with no build of its own."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--target", str(tmp_path), str(from_hub)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "fedlora_app/app.toml").exists()


def test_a_copy_from_the_hub_writes_new_projects(from_hub, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(from_hub), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "fedlora_app.cli", "new", "my-app"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {"my-app/pyproject.toml", "my-app/README.md", "my-app/my_app/task.py"} <= made


def test_what_flower_installs_is_the_extra_and_a_model_and_data_to_begin_with():
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups, uv = toml["dependency-groups"], toml["tool"]["uv"]
    assert groups["app"] == toml["project"]["optional-dependencies"]["app"]
    pinned = (ROOT / "fedlora_app/requirements-assets.txt").read_text(encoding="utf-8")
    assert all(f"\n{package} " in pinned for package in groups["demo"])
    alone = {f"{known['name']}=={known['version']}" for known in uv["dependency-metadata"]}
    assert alone == set(groups["demo"])
    assert set(uv["default-groups"]) == {"app", "demo"}


# What each extra is for, imported as this project does.
OF_EXTRAS = {
    "": "import strategies, fedlora_app.cli.main",
    "app": "import fedlora_app.server_app, fedlora_app.client_app, fedlora_app.launch.simulation; "
    "import fedlora_app.compare.runs, fedlora_app.partition_report, fedlora_app.supernode",
    "llm": "import fedlora_app.tasks.causal_lm, bitsandbytes",
    "vision": "import fedlora_app.tasks.image_classification, PIL",
    "privacy": "import strategies.privacy.spent, dp_accounting.pld",
    "quantization": "import bitsandbytes",
    "huggingface": "import strategies.huggingface, accelerate",
    "tensorboard": "from torch.utils.tensorboard import SummaryWriter",
    "mlflow": "import mlflow",
    "wandb": "import wandb",
    "trackio": "import trackio",
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", OF_EXTRAS)
def test_an_extra_brings_what_it_is_for(wheel, extra, tmp_path):
    """In an empty environment, from the registry; the build of torch that is here."""
    uv = [sys.executable, "-m", "uv"]  # which flwr brings, and which shares files between them
    places = os.environ.get("PIP_FIND_LINKS", "")
    environment = os.environ | ({"UV_FIND_LINKS": places} if places else {})
    build = metadata.version("torch").partition("+")[0]
    (tmp_path / "torch.txt").write_text(f"torch=={build}\n")
    python = tmp_path / "venv" / "bin" / "python"
    wanted = f"fedlora[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
    made = [*uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")]
    subprocess.run(made, check=True)
    command = [*uv, "pip", "install", "--quiet", "--python", str(python), wanted]
    done = subprocess.run(
        [*command, "--constraint", str(tmp_path / "torch.txt")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if "Failed to fetch" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [python, "-I", "-c", OF_EXTRAS[extra]], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_every_extra_is_tried():
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(OF_EXTRAS) == {"", *toml["project"]["optional-dependencies"]}
