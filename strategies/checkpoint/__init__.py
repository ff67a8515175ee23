"""Checkpoints of a run: what a server needs to go on after it was stopped, or killed.

A checkpoint is written under another name, synced to disk and then renamed, and older ones are
removed only after that: a process killed at any moment leaves the checkpoints before it as they
were. Which one is the best follows from the scores inside them; no pointer can go stale.

``python -m strategies.checkpoint FOLDER`` lists what is there and can export one to PEFT.
"""

from strategies.checkpoint.fingerprint import compare_fingerprints
from strategies.checkpoint.folder import Checkpoints
from strategies.checkpoint.format import Checkpoint, CheckpointError, DamagedError, read
from strategies.checkpoint.peft_export import export_peft, save_adapter

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "DamagedError",
    "compare_fingerprints",
    "export_peft",
    "read",
    "save_adapter",
]
