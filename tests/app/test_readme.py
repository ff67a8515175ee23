"""What the pages say of a run's folder, against the code that fills it."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = (ROOT / "strategies" / "records.py").read_text(encoding="utf-8")


def test_every_kind_of_record_is_told():
    kinds = set(re.findall(r"kind: Literal\[\"([a-z-]+)\"\]", RECORDS))
    assert len(kinds) >= 10
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    table = page[page.index("| `kind` in `metrics.jsonl`") :]
    assert {kind for kind in kinds if f"`{kind}`" not in table} == set()


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)


def test_every_extra_tracker_and_exit_code_is_told():
    from fedlora_app.report.trackers import TRACKERS

    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    installing = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    runs = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert {
        e for e in toml["project"]["optional-dependencies"] if f"`{e}`" not in installing
    } == set()
    assert all(package in installing for package in toml["dependency-groups"]["demo"])
    assert {name for name in TRACKERS if f"| `{name}` |" not in runs} == set()


def test_every_room_is_in_the_page_about_working_here():
    page = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    rooms = [
        path.name for path in (ROOT / "fedlora_app").iterdir() if (path / "__init__.py").exists()
    ]
    assert {room for room in rooms if f"`{room}/`" not in page} == set()
    assert len(page.splitlines()) <= 100
