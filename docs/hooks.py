"""What the pages take from elsewhere in the repository when they are built."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedlora_app.config import markdown_table  # the one source of the table

MARK = "<!-- run config -->"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put in the table of the run config, and the paths of files that are not on the site."""
    folder = posixpath.dirname(page.file.src_uri)
    if MARK in markdown:
        markdown = markdown.replace(MARK, markdown_table().replace("<", "&lt;"))

    def outside(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        if not path.startswith("../"):
            return link[0]
        name = f"`{path.removeprefix('../')}`"
        return name if link["text"].strip("`") in name else f"{link['text']} ({name})"

    return LINK.sub(outside, markdown)
