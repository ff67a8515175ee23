#!/usr/bin/env python
"""A federation on this machine behind real, shaped links: see docs/testbed.md.

``deploy/testbed.py up --nodes 12 --profile rural``, ``run -- rounds=5``, ``down``.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # ``testbed`` is a package beside this file

from deploy.testbed.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
