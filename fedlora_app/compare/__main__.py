"""``python -m fedlora_app.compare``, which is ``fedlora compare``."""

import sys

from fedlora_app.cli.main import run_as

if __name__ == "__main__":
    sys.exit(run_as("compare", None, "python -m fedlora_app.compare"))
