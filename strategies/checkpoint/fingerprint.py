"""Whether a run may go on from a checkpoint that other settings wrote."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.checkpoint.format import Scalar


def compare_fingerprints(
    saved: Mapping[str, Scalar],
    now: Mapping[str, Scalar],
    *,
    fatal: set[str],
    ignored: set[str],
) -> tuple[list[str], list[str]]:
    """Return how the settings of a checkpoint and of the run that resumes it differ.

    Parameters
    ----------
    saved, now : Mapping[str, scalar]
    fatal : set of str
        Keys without which the result would be wrong; those in one of both only are warnings,
        as another version may have had more or fewer.
    ignored : set of str
        Keys that are free to differ.

    Returns
    -------
    (list of str, list of str)
        Warnings and errors, a line a key.
    """
    warnings: list[str] = []
    errors: list[str] = []
    for key in sorted((saved.keys() | now.keys()) - ignored):
        if key not in now:
            warnings.append(f"{key}: {saved[key]!r} in the checkpoint, unknown to this run")
        elif key not in saved:
            warnings.append(f"{key}: not in the checkpoint, {now[key]!r} in this run")
        elif not _equal(saved[key], now[key]):
            line = f"{key}: {saved[key]!r} in the checkpoint, {now[key]!r} in this run"
            (errors if key in fatal else warnings).append(line)
    return warnings, errors


def _equal(a: Scalar, b: Scalar) -> bool:
    return a == b or (a != a and b != b)  # NaN is like NaN here
