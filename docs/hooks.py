"""What the pages take from elsewhere in the repository when they are built."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put in the paths of files that are not on the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def outside(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        if not path.startswith("../"):
            return link[0]
        name = f"`{path.removeprefix('../')}`"
        return name if link["text"].strip("`") in name else f"{link['text']} ({name})"

    return LINK.sub(outside, markdown)
