"""What a client that failed says: the exception, out of what Flower and Ray wrap around it."""

from __future__ import annotations

import re

# Flower reports `<class 'ValueError'>:<'the text'>`.
_WRAPPED = re.compile(r"<class '([\w.]+)(?:\(\w+\))?'>:<'(.*)'>", re.DOTALL)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_FRAMES = re.compile(r"^(?:ray::.*|Traceback \(most recent call last\):)$", re.MULTILINE)
_CAUSED = "The above exception was the direct cause of the following exception:"
_DURING = "During handling of the above exception, another exception occurred:"
_FLOWER = ("ClientAppException", "LoadClientAppError")  # they repeat the text of their cause


def cause(text: str) -> str:
    """Return the exception in the reason of a client that failed, as ``ValueError: its text``.

    In a simulation the reason is Ray's whole chain of tracebacks, with the exception
    somewhere in its middle; cut to any length it would be lost.

    Parameters
    ----------
    text : str
        The reason of Flower's ``Error``.
    """
    text = _COLOUR.sub("", text)
    kind = ""
    if wrapped := _WRAPPED.fullmatch(text.strip()):
        kind, text = wrapped[1].rpartition(".")[2], wrapped[2]
    if _FRAMES.search(text) is None:
        return f"{kind}: {text.strip()}" if kind else text
    raised = [_raised(block) for block in re.split(f"{_CAUSED}|{_DURING}", text)]
    raised = [line for line in raised if line]
    while len(raised) > 1 and raised[-1].partition(":")[0].rpartition(".")[2] in _FLOWER:
        raised.pop()
    return raised[-1] if raised else text


def _raised(traceback: str) -> str:
    """Return what one traceback ends with: the first line after its frames, and the rest."""
    header = _FRAMES.search(traceback)
    lines = (traceback[header.end() :] if header else traceback).strip("\n").split("\n")
    first = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), None)
    return "" if first is None else "\n".join(lines[first:]).strip()
