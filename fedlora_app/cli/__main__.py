"""``python -m fedlora_app.cli``, which is ``fedlora``."""

import sys

from fedlora_app.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
