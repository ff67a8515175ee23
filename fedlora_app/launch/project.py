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

    Raises
    ------
    FileNotFoundError
        If this package was copied from somewhere without what makes it a Flower app.
    """
    here = APP.parent
    if (here / "pyproject.toml").exists():
        yield here
        return
    if missing := [name for name in SHIPPED if not (APP / name).exists()]:
        raise FileNotFoundError(
            f"{APP}: expected {', '.join(missing)} in it, or pyproject.toml beside it; install "
            "fedlora with pip, or run it from a checkout"
        )
    with tempfile.TemporaryDirectory(prefix="fedlora-") as place:
        folder = Path(place) / "fedlora"  # Flower has rules for the name
        ignored = shutil.ignore_patterns("__pycache__", *SHIPPED)
        for name in PACKAGES:
            shutil.copytree(here / name, folder / name, ignore=ignored)
        for name, there in SHIPPED.items():
            shutil.copyfile(APP / name, folder / there)
        yield folder
