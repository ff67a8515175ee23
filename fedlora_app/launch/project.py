"""The Flower project of this app: the checkout, or one made of the installed package."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

APP = Path(__file__).parents[1]
PACKAGES = (APP.name, "strategies")
SHIPPED = {"app.toml": "pyproject.toml", "LICENSE": "LICENSE"}
"""What the wheel has of the checkout's top level for this, and how it is called there."""


@contextmanager
def project_folder() -> Iterator[Path]:
    """Yield the folder that ``flwr run`` takes: with ``pyproject.toml`` and both packages.

    A copy, of a checkout too: Flower looks at each file below the folder of an app, and a virtual
    environment in it has seventy thousand, which takes seconds.

    Raises
    ------
    FileNotFoundError
        If this package was copied from somewhere without what makes it a Flower app.
    """
    here = APP.parent
    checkout = (here / "pyproject.toml").exists()
    shipped = {here / n: n for n in SHIPPED.values()} if checkout else _shipped()
    if missing := [file.name for file in shipped if not file.exists()]:
        raise FileNotFoundError(
            f"{APP}: expected {', '.join(missing)} in it, or pyproject.toml beside it; install "
            "fedlora with pip, or run it from a checkout"
        )
    with tempfile.TemporaryDirectory(prefix="fedlora-") as place:
        folder = Path(place) / "fedlora"  # Flower has rules for the name
        ignored = shutil.ignore_patterns("__pycache__", *SHIPPED)
        for name in PACKAGES:
            shutil.copytree(here / name, folder / name, ignore=ignored)
        for file, there in shipped.items():
            shutil.copyfile(file, folder / there)
        yield folder


def _shipped() -> dict[Path, str]:
    """Return what the wheel has for this, and how it is called in a checkout."""
    return {APP / name: there for name, there in SHIPPED.items()}
