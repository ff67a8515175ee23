"""What a run has spent, in a file that is never behind what clients have given away."""

from __future__ import annotations

import json
from pathlib import Path

from strategies.files import replace_text
from strategies.privacy.accountant import PrivacyAccountant

FORMAT = 1


def write_ledger(file: Path, accountant: PrivacyAccountant, *, open_round: bool) -> None:
    """Write what was spent, so that it survives a power failure.

    Parameters
    ----------
    file : Path
    accountant : PrivacyAccountant
    open_round : bool
        Whether clients are being asked of whom nobody knows yet what the model will tell.

    Raises
    ------
    OSError
        If it cannot be written; the file is then as it was.
    """
    spent = accountant.state_dict()
    text = json.dumps({"format": FORMAT, "open_round": open_round, "spent": spent})
    replace_text(file, text)


def read_ledger(file: Path, accountant: PrivacyAccountant) -> None:
    """Put back what was spent; a round that was cut off counts as if its model had been seen.

    Raises
    ------
    ValueError
        If it cannot be read. To go on without it would promise too much.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        accountant.load_state_dict(found["spent"])
        if found["open_round"]:
            accountant.record_fixed(1, 1, 1, summed=False, amplified=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected the ledger of a private run (format {FORMAT}), got {error!r}; "
            "without it nobody can say what these clients have given away: put it back, or begin "
            "a new run and count both"
        ) from error
