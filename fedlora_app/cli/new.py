"""``fedlora new``."""

from __future__ import annotations

import re
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.shared import refuse

STARTER = Path(__file__).with_name("starter")  # plain files: Flower Hub takes no other endings
NAMES = {"project.toml": "pyproject.toml"}  # else tools would take it for one of this project
NUMPY = '\n        client_api="numpy",'
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 32  # characters of a name that Flower takes


class Api(StrEnum):
    """How the clients of a project are written."""

    message = "message"
    numpy = "numpy"


def new(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder to make; its name is the project's.",
            show_default=False,
        ),
    ],
    api: Annotated[
        Api, typer.Option(help="How clients are written: Message API or NumPyClient.")
    ] = Api.message,
) -> None:
    """Write a small Flower project with the strategies plugged in, which runs as it is.

    FOLDER is made, and must not be there. The project trains a small network on the digits of
    scikit-learn, with clients of rank 2 to 16; `task.py` is where your model and data go.

    Try:

        fedlora new myapp
        fedlora run --app myapp --clients 4
        fedlora new myapp --api numpy
    """
    name = folder.name
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        refuse(
            f"FOLDER: expected a name of small letters, digits and hyphens that begins with a "
            f"letter, of at most {LONGEST} characters, as Flower takes it; got {name!r}"
        )
    if folder.exists():
        refuse(f"FOLDER: {folder} is there already; name another, nothing was written")
    package = name.replace("-", "_")
    words = {
        "APPNAME": package,
        "PROJECTNAME": name,
        "VERSION": metadata.version("fedlora"),
        "CLIENT_API": NUMPY if api is Api.numpy else "",
    }
    try:
        (folder / package).mkdir(parents=True)
        for file in files(api):
            place = folder / package if file.suffix == ".py" else folder
            text = re.sub("|".join(words), lambda m: words[m[0]], file.read_text("utf-8"))
            there = file.name.replace(f"_{api}.", ".")
            (place / NAMES.get(there, there)).write_text(text, encoding="utf-8")
        about = f'"""{name}: a Flower app whose clients train LoRA adapters of different rank."""\n'
        (folder / package / "__init__.py").write_text(about, encoding="utf-8")
    except OSError as error:
        refuse(error)
    print(f"{folder} is there; run it with: fedlora run --app {folder} --clients 4")


def files(api: Api) -> list[Path]:
    """Return the files of a project for this kind of client."""
    others = tuple(f"_{other}.py" for other in Api if other is not api)
    found = sorted(path for path in STARTER.iterdir() if path.is_file())  # pip compiles beside them
    return [file for file in found if not file.name.endswith(others)]
