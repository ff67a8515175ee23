"""What the README says of a run's folder, against the code that fills it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for package in ("strategies", "fedlora_app")
    for path in sorted((ROOT / package).rglob("*.py"))
)


def test_every_kind_of_record_is_told():
    kinds = set(re.findall(r"\"kind\": \"([a-z-]+)\"", SOURCES))
    assert len(kinds) >= 10
    table = README[README.index("| `kind` in `metrics.jsonl`") :]
    assert {kind for kind in kinds if f"`{kind}`" not in table} == set()


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)
