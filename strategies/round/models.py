"""The global model as the arrays of a record, as tensors, and packed for clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from strategies.aggregation import Aggregator
from strategies.messages import from_record, to_record
from strategies.model import GlobalModel
from strategies.packing import Packing


class Models:
    """Reads the global arrays, once for every new record.

    Parameters
    ----------
    rule : Aggregator
    scale : float
        ``s`` in ``W0 + s·B A``.
    wire_dtype : str
        How numbers travel.
    """

    def __init__(self, rule: Aggregator[Any], scale: float, wire_dtype: str) -> None:
        self.rule = rule
        self.scale = scale
        self.wire_dtype = wire_dtype
        self._last: tuple[ArrayRecord, GlobalModel] | None = None

    def of(self, arrays: ArrayRecord) -> GlobalModel:
        """Return the model in ``arrays``."""
        if self._last is None or self._last[0] is not arrays:
            self._last = (arrays, GlobalModel.from_tensors(from_record(arrays), self.scale))
        return self._last[1]

    def packed(self, arrays: ArrayRecord, server_round: int) -> Packing:
        """Return the packing of the model in ``arrays`` for one round."""
        return Packing(self.rule, self.of(arrays), self.wire_dtype, server_round)

    def packing(self, tensors: Mapping[str, Tensor], server_round: int) -> Packing:
        """Return the packing of a model of before, from its arrays."""
        model = GlobalModel.from_tensors(tensors, self.scale)
        return Packing(self.rule, model, self.wire_dtype, server_round)

    def record(self, model: GlobalModel) -> ArrayRecord:
        """Return a model as arrays."""
        arrays = to_record(model.to_tensors())
        self._last = (arrays, model)
        return arrays
