"""``python -m fedlora_app.compare``."""

import sys

from fedlora_app.compare.runs import main

if __name__ == "__main__":
    sys.exit(main())
