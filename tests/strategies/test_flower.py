"""What of Flower is used: public, or gathered in two modules with its reason."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedlora_app.flower import PARTS, part
from strategies.flower import TESTED, require_tested

ROOT = Path(__file__).parents[2]
GATHERED = {ROOT / "strategies/flower.py", ROOT / "fedlora_app/flower.py"}
PUBLIC = {
    "flwr.app",
    "flwr.client",
    "flwr.client.mod",
    "flwr.clientapp",
    "flwr.clientapp.mod",
    "flwr.common",
    "flwr.server",
    "flwr.server.strategy",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of every import of Flower in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.split(".")[0] == "flwr")


def test_what_is_private_is_gathered() -> None:
    private = []
    for folder in ("strategies", "fedlora_app", "deploy"):
        for path in set((ROOT / folder).rglob("*.py")) - GATHERED:
            private += [
                (path.name, module, name)
                for module, name in imports(path)
                if module not in PUBLIC or name not in importlib.import_module(module).__all__
            ]
    assert not private


@pytest.mark.parametrize("name", PARTS)
def test_each_part_exists_and_has_a_reason(name: str) -> None:
    part(name)
    assert PARTS[name].why


def test_the_names_that_are_replaced_exist() -> None:
    """Replacing a name that Flower no longer uses would do nothing, in silence."""
    loop, connection = part("supernode_loop"), part("supernode_connection")
    for module, names in (
        (loop, ("time", "pull_objects", "_push_messages")),
        (connection, ("NodeAuthHttpInterceptor", "HeartbeatSender")),
        (part("superexec_loop"), ("get_executor",)),
        (part("clientapp"), ("flwr_exit", "push_message", "pull_and_inflate_object_from_tree")),
    ):
        source = Path(module.__file__).read_text()
        for name in names:
            assert hasattr(module, name)
            assert re.search(rf"\b{name}\b[.(]", source), name


def test_a_missing_part_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "gone", PARTS["executor"]._replace(name="Gone"))
    with pytest.raises(ImportError, match=r"flwr \S+ lacks flwr\.supercore\S+\.Gone \(starts"):
        part("gone")


@pytest.mark.parametrize("version", ["1.41.0", "1.42.7", "1.42.0.dev20261101"])
def test_tested_versions_are_taken(version: str) -> None:
    require_tested(version)


@pytest.mark.parametrize("version", ["1.40.2", "1.43.0", "1.43.0rc1", "2.0.0", "1", "unknown"])
def test_others_are_refused_in_one_sentence(version: str) -> None:
    expected = f"flwr {version} is installed, but FedLoRA works with flwr>=1.41,<1.43: run pip"
    with pytest.raises(ImportError, match=re.escape(expected)):
        require_tested(version)


def test_one_range_and_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    lines = [*project["project"]["dependencies"], *groups["app"]]
    for example in (ROOT / "examples").glob("*/pyproject.toml"):
        lines += tomllib.loads(example.read_text())["project"]["dependencies"]
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    stated = {str(Requirement(line).specifier) for line in lines if re.match(r"flwr\b(?!-)", line)}
    assert stated - {""} == {str(SpecifierSet(f">={low},<{high}"))}

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    require_tested(pinned["flwr"])
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    for name in ("superlink", "supernode"):
        assert services[name]["image"] == f"fedlora/{name}:{pinned['flwr']}"
        build = services[name]["build"]["dockerfile_inline"]
        assert f"FROM flwr/{name}:{pinned['flwr']}-" in build
        assert "--constraint constraints.txt" in build
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text()


def test_every_requirement_is_pinned_once_and_satisfied() -> None:
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins]
    assert sorted(names) == sorted(set(names))
    pinned = dict(zip(names, (line.split("==")[1] for line in pins), strict=True))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    for line in [*project["project"]["dependencies"], *groups["app"], *groups["dev"]]:
        requirement = Requirement(line)
        if requirement.name == "torch":  # the machine's own build; see the Makefile
            continue
        assert pinned[requirement.name] in requirement.specifier, line
