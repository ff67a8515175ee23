"""What of Flower is not public but needed by the app, each with its reason.

``tests/strategies/test_flower.py`` sees to it that all of it exists, and that nothing else of
this kind is imported anywhere. For what the library needs see ``strategies.flower``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

# The type of what a mod calls.
from flwr.clientapp.typing import ClientAppCallable as ClientAppCallable

# A run config is read as Flower reads it: `[tool.flwr.app.config.train] steps` is `train.steps`.
from flwr.common.config import flatten_dict as flatten_dict
from flwr.common.config import parse_config_args as parse_config_args


class Part(NamedTuple):
    """Where a part is, and why nothing public does."""

    module: str
    name: str | None
    why: str


# A SuperNode that starts warm and watches itself has no public place to say so. Imported late:
# the process that is copied for each client must not have the SuperNode's modules, nor threads.
PARTS = {
    "flower_supernode": Part(
        "flwr.supernode.cli.flower_supernode", "flower_supernode", "the command itself"
    ),
    "supernode_loop": Part(
        "flwr.supernode.start_client_internal",
        None,
        "its `time`, `pull_objects` and `_push_messages` are replaced: pauses, waits without end",
    ),
    "supernode_connection": Part(
        "flwr.supernode.fleet_http_connection",
        None,
        "its `NodeAuthHttpInterceptor` and `HeartbeatSender` are replaced: why a node is refused",
    ),
    "supercore_constants": Part("flwr.supercore.constant", None, "the default host and port"),
    "task_status": Part("flwr.common.constant", "Status", "whether a client is alive"),
    "superexec": Part("flwr.supercore.cli", "flower_superexec", "the executor's own command"),
    "superexec_loop": Part(
        "flwr.supercore.superexec.run_superexec", None, "its `get_executor` is replaced"
    ),
    "executor": Part(
        "flwr.supercore.superexec.executor", "SubprocessExecutor", "starts a client cold"
    ),
    "launched": Part("flwr.supercore.superexec.executor", "LaunchResult", "what starting returns"),
    "task_type": Part("flwr.supercore.constant", "TaskType", "only clients are started warm"),
    "flwr_clientapp": Part(
        "flwr.supernode.cli.flwr_clientapp", "flwr_clientapp", "what a copy becomes"
    ),
    "clientapp": Part(
        "flwr.supernode.runtime.run_clientapp",
        None,
        "its `flwr_exit`, `push_message` and `start_parent_process_monitor` are replaced: "
        "it comes back; and its `pull_and_inflate_object_from_tree`: pauses",
    ),
    "exit_handlers": Part(
        "flwr.supercore.exit.exit_handler",
        "trigger_exit_handlers",
        "what a client does when it ends",
    ),
}


def part(name: str) -> Any:
    """Import one of ``PARTS``.

    Raises
    ------
    ImportError
        If this version of Flower has no such part.
    """
    wanted = PARTS[name]
    try:
        module = import_module(wanted.module)
        return module if wanted.name is None else getattr(module, wanted.name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"flwr {version('flwr')} lacks {wanted.module}.{wanted.name or ''} ({wanted.why}): "
            "install the version that constraints.txt names"
        ) from error
