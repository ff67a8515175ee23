"""Aggregation rules: how adapters of different rank become one."""

from strategies.aggregation.averaging import RBLA, FedIT, Replication, ZeroPadding
from strategies.aggregation.base import (
    AGGREGATIONS,
    AggregationResult,
    Aggregator,
    State,
    Update,
    make_aggregator,
    register,
)

__all__ = [
    "AGGREGATIONS",
    "RBLA",
    "AggregationResult",
    "Aggregator",
    "FedIT",
    "Replication",
    "State",
    "Update",
    "ZeroPadding",
    "make_aggregator",
    "register",
]
