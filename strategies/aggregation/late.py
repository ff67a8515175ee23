"""Replies to an older model: what they have changed, on top of the model that is there now.

A client that started from ``x_sent`` and sends ``x_k`` when the model is ``x`` already counts as
``x + d (x_k - x_sent)``, with d its discount: as three updates, with the weights ``d w``, ``-d w``
and ``w``, which are w together. So a rule takes it without a line of its own, if

- its sums are linear in what updates bring, weights below 0 included: factors for a rule that sums
  factors, products for one that sums products, which does not mind that the factors have been
  turned since; and
- clients of every round train the leading entries of the same factors.

Such a rule promises ``late`` (see ``strategies.promises``: not inherited). The others: ``hetlora``
weighs by norms, ``rolora`` trains another factor every round, ``fedsvd`` turns the factor that is
not sent, ``fslora`` and ``fold`` draw entries anew. This is this project's decision; FedBuff,
https://arxiv.org/abs/2106.06639, has it for whole models (as published).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from strategies.aggregation.update import Update
from strategies.lora import Adapter
from strategies.promises import declares, those_that_declare

if TYPE_CHECKING:
    from strategies.aggregation.base import Aggregator


def beside(update: Update, current: Adapter) -> Iterator[tuple[Update, float]]:
    """Yield what is summed beside a late update, with shares of its weight; else nothing."""
    if update.late is None or update.sent is None:
        return
    for model, share in ((update.sent.adapter, -update.late), (current, 1.0)):
        ranks = {module: pair.rank for module, pair in update.adapter.pairs.items()}
        pairs = {module: model.pairs[module].with_rank(rank) for module, rank in ranks.items()}
        dense = {key: model.dense[key] for key in update.adapter.dense}
        yield replace(update, adapter=Adapter(pairs, dense)), share


def refuse_late(rule: Aggregator[Any]) -> str:
    """Return why replies to an older model cannot count with a rule; empty: they can."""
    from strategies.aggregation.base import AGGREGATIONS

    if declares(rule, "late"):
        return ""
    if rule.robust is not None:
        return f"robust = {rule.robust.name!r} compares what clients make of one model"
    return (
        f"aggregation {rule.name!r}, as it is set, does not declare that they can be added as what "
        f"they have changed, as {those_that_declare(AGGREGATIONS, 'late')} do"
    )
