"""Tests compare with oracles on the CPU, to the last bit here and there: GPUs are hidden.

Of tests/gpu, which need one, ``make test-gpu`` shows it to them.
"""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
