"""What of Flower is not public but needed, each with its reason, and the versions that have it.

``tests/strategies/test_flower.py`` sees to it that nothing else of this kind is imported anywhere.
"""

from __future__ import annotations

from importlib.metadata import version

TESTED = ((1, 41), (1, 43))
"""The first version of Flower this was tested with, and the first it was not.

pyproject.toml says the same to pip; 1.43 drops services over gRPC and changes what is below.
"""


def require_tested(installed: str) -> None:
    """Raise ImportError unless a version of Flower is one that was tested.

    Parameters
    ----------
    installed : str
        Such as ``"1.42.0"``.
    """
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    try:
        number = tuple(int(part) for part in installed.split(".")[:2])
    except ValueError:
        number = ()
    if not TESTED[0] <= number < TESTED[1]:
        raise ImportError(
            f"flwr {installed} is installed, but FedLoRA works with flwr>={low},<{high}: "
            f"run pip install 'flwr>={low},<{high}'"
        )


require_tested(version("flwr"))  # before what follows, which another version may lack

# Records of today's API from and to what clients of the old one take and return.
# The type of what a mod calls.
from flwr.clientapp.typing import ClientAppCallable as ClientAppCallable  # noqa: E402
from flwr.compat.common import recorddict_compat as recorddict_compat  # noqa: E402

# What a ClientManager holds; no public module has its name.
from flwr.server.client_proxy import ClientProxy as ClientProxy  # noqa: E402

# The default of Flower's own strategies for metrics, so that ours have the same.
from flwr.serverapp.strategy.strategy_utils import (  # noqa: E402
    aggregate_metricrecords as aggregate_metricrecords,
)

# Messages are only made by a process that has an identity, which a server of the old style lacks.
from flwr.supercore.task_identity import TaskIdentity as TaskIdentity  # noqa: E402


def is_network(grid: object) -> bool:
    """Tell whether there is one between a grid and its clients; a simulation's has none."""
    return type(grid).__name__ != "InMemoryGrid"  # its module has whole servers


def is_transport_error(error: Exception) -> bool:
    """Tell whether Flower's grid failed to reach its SuperLink, rather than to read a reply.

    The grid raises what its HTTP client raises, and has no class of its own for it. A reply too
    large for a response is one that cannot be read.
    """
    if isinstance(error, OSError):
        return True
    import httpx  # Flower's own client

    if isinstance(error, httpx.HTTPStatusError):
        return bool(error.response.status_code != httpx.codes.REQUEST_ENTITY_TOO_LARGE)
    return isinstance(error, httpx.HTTPError)
