"""What a person should look at though nothing failed: warnings of a round, each logged once.

All of it is this project's decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import Any, Literal

from flwr.common import log

from strategies.clients import Client
from strategies.messages import STEPS_KEY, training_loss
from strategies.records import RoundWarning
from strategies.trained import Trained

#: A loss grows when it is, twice in a row, so many times the client's first.
GROWN = 1.1


class Watch:
    """Sees in good replies and in the ranks of a round what is worth a warning.

    - ``unmoved``: a factor that was to be trained, or the whole update, came back exactly as it was
      sent. Not where the client says that it took no step.
    - ``loss``: a client's training loss was a tenth above its first twice in a row: what others
      train does it harm, or its learning rate does.
    - ``lone``: entries of the rank axis that one client alone holds, under a rule that averages an
      entry over its holders. What that client trains there is as large as what all train
      elsewhere, and nobody else ever sees it.
    """

    def __init__(self) -> None:
        self._losses: dict[int, tuple[float, float]] = {}  # first and last, by client index
        self._said: set[tuple[str, int]] = set()

    def ranks(self, clients: Sequence[Client], ranks: Mapping[int, int]) -> list[RoundWarning]:
        """Return the warning about entries that one client alone holds, if there are any.

        Parameters
        ----------
        clients : sequence of Client
            All that could take part.
        ranks : Mapping[int, int]
            By node id.
        """
        if len(clients) < 2:
            return []
        second, most = sorted(ranks[client.node_id] for client in clients)[-2:]
        if second == most:
            return []
        (owner,) = (client for client in clients if ranks[client.node_id] == most)
        entries = f"entries {second + 1} to {most} of the rank axis are"
        if most == second + 1:
            entries = f"entry {most} of the rank axis is"
        return [
            self._warning(
                "lone",
                owner,
                f"{entries} held by {owner.name} alone, at full strength: give another client that "
                "rank or this one less, or use a rule that weighs an entry by who holds it",
            )
        ]

    def reply(self, trained: Trained, asked: str, wire: str) -> list[RoundWarning]:
        """Return the warnings about one good reply.

        Parameters
        ----------
        trained : Trained
        asked : str
            The factors that were to be trained and sent.
        wire : str
            How numbers travel.
        """
        found = []
        client = trained.client
        if trained.metrics.get(STEPS_KEY) != 0 and (still := trained.unmoved(asked)):
            nothing = set(still) == set(asked) and trained.unmoved_dense()
            text = (
                f"{client.name}: {' and '.join(f'lora_{factor}' for factor in still)} came back "
                f"exactly as it was sent{' (its update is exactly zero)' if nothing else ''}: make "
                "the optimiser after apply_adapter (receive_parameters), which makes new "
                f"parameters; or its steps are smaller than {wire} can tell"
            )
            found.append(self._warning("unmoved", client, text))
        loss = training_loss(trained.metrics)
        if loss is not None and math.isfinite(loss):
            first, last = self._losses.get(client.index, (loss, loss))
            self._losses[client.index] = first, loss
            if min(last, loss) > GROWN * first > 0:
                grows = f"{first:.3g} at first, {last:.3g}, now {loss:.3g}"
                text = f"{client.name}: its training loss grows: {grows}"
                found.append(self._warning("loss", client, text))
        return found

    def forget(self, index: int) -> None:
        """Forget a client's losses: the place is another's now."""
        self._losses.pop(index, None)

    def say(self, warnings: Sequence[RoundWarning], server_round: int) -> None:
        """Log those that were not logged before: one line a client and kind in a run."""
        for warning in warnings:
            key = warning["about"], warning["client"]
            if key not in self._said:
                self._said.add(key)
                log(WARNING, "round %s: %s", server_round, warning["text"])

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, as JSON can hold them."""
        return {"losses": {str(i): list(pair) for i, pair in sorted(self._losses.items())}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned; nothing is known to an older checkpoint."""
        self._losses = {int(i): (a, b) for i, (a, b) in state.get("losses", {}).items()}

    @staticmethod
    def _warning(
        about: Literal["unmoved", "loss", "lone"], client: Client, text: str
    ) -> RoundWarning:
        return {"about": about, "client": client.index, "text": text}
