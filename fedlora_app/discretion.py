"""What a site tells of its errors: file, line and kind, never what is in a row.

Every message is answered through ``discreet``. The error's full text stays in the site's own
log; the server gets what the error itself declares fit to be told (``SiteError.told``), or
else its type and the place in the app's code that raised it.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from flwr.app import Context, Error, Message

from fedlora_app.flower import ClientAppCallable

LOG = logging.getLogger("flwr")
RAISED = 2  # Flower's code for "the ClientApp raised an exception"
OURS = ("fedlora_app", "strategies")  # whose code the server has anyway


class SiteError(ValueError):
    """An error whose full text may quote data, and that says what of it may be told.

    Parameters
    ----------
    text : str
        Everything, for the site's own log and for whoever owns the data.
    told : str
        The same without contents: no words, labels, names of columns, or folders.
    """

    def __init__(self, text: str, told: str = "") -> None:
        super().__init__(text, told)
        self.told = told or "the data are not what is expected; the site's own log says why"

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DataError(SiteError):
    """Something about one file of data.

    Parameters
    ----------
    path : str or Path
        The file; its name without the folder is told.
    kind : str
        What was expected, without any content of the file. Told.
    got : str
        What came instead. Not told (default: nothing).
    remedy : str
        What to do; without content too. Told (default: nothing).
    line : str
        Where in the file, such as ``line 7`` (default: the file as a whole). Told.
    """

    def __init__(
        self, path: str | Path, kind: str, got: str = "", remedy: str = "", line: str = ""
    ) -> None:
        def sentence(name: str, got: str) -> str:
            where = f"{name}, {line}" if line else name
            return f"{where}: {kind}" + (f", got {got}" if got else "") + end

        end = f"; {remedy}" if remedy else ""
        super().__init__(sentence(str(path), got), sentence(Path(path).name, ""))
        self.args = (str(path), kind, got, remedy, line)
        self.text = sentence(str(path), got)

    def __str__(self) -> str:
        return self.text


class NoDataError(DataError, FileNotFoundError):
    """There are no data where they should be."""


def told(error: BaseException) -> str:
    """Return what the server may know of an error that was raised at a site."""
    kind = type(error).__name__
    declared = getattr(error, "told", None)
    if isinstance(declared, str):
        return f"{kind}: {declared}"
    reason = ""
    if isinstance(error, OSError) and isinstance(error.errno, int):
        reason = f": {os.strerror(error.errno)}"
    return f"{kind}{reason}{_place(error)}; the full text is in the node's own log"


def _place(error: BaseException) -> str:
    """Return the innermost line of the app's own code on the way to the error."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.parent.name in OURS or path.parent.parent.name in OURS:
            place = f" in {path.name}, line {frame.lineno}"
    return place


def simulated(context: Context) -> bool:
    """Tell whether the rows are the server's own: a Ray worker without data of its own."""
    ray = sys.modules.get("ray")
    return "data-path" not in context.node_config and ray is not None and ray.is_initialized()


def discreet(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer a message; an error is logged in full here, and told without contents (a mod)."""
    try:
        return call_next(message, context)
    except Exception as error:  # whatever it is, its text must not leave unread
        LOG.error("this client failed: %s", error, exc_info=error)
        full = f"{type(error).__name__}: {error}"
        reason = full if simulated(context) else told(error)
    return Message(Error(code=RAISED, reason=reason), reply_to=message)
