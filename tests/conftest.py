"""How tests are shared out where several processes run them (``pytest -n 2 --dist loadgroup``)."""

from pathlib import Path

import pytest

INTEGRATION = Path(__file__).parent / "integration"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep the tests of a file together, and of those that start processes one at a time."""
    for item in items:
        group = "processes" if INTEGRATION in item.path.parents else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    # What takes longest begins first.
    items.sort(key=lambda item: INTEGRATION not in item.path.parents)
