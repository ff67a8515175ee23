"""Tests of this room run where torch sees a GPU (``make test-gpu``), and are skipped elsewhere."""

import pytest
import torch


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="no GPU, or hidden (make test-gpu)"))
