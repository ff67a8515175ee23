"""``python -m fedlora_app.report``, which is ``fedlora report``."""

import sys

from fedlora_app.cli.main import run_as

if __name__ == "__main__":
    sys.exit(run_as("report", None, "python -m fedlora_app.report"))
