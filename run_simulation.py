"""Run one federated simulation, watch it, and leave nothing behind.

``python run_simulation.py --clients 10 --rounds 6 --config aggregation=flexlora`` is
``fedlora run`` with the same arguments. The exit code is 0 only if the run completed (1: it
failed, 2: the configuration is wrong, or a node of the Ray cluster named with ``--ray-address``
lacks something, 130: Ctrl-C).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedlora_app.cli.main import run_as


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the program's) and return the exit code."""
    return run_as("run", argv, "python run_simulation.py")


if __name__ == "__main__":
    sys.exit(main())
