"""``python -m fedlora_app.report``."""

import sys

from fedlora_app.report.page import main

if __name__ == "__main__":
    sys.exit(main())
