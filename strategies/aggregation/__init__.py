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
from strategies.aggregation.product import FlexLoRA, Florist, RaFLoRA, RBLoRA
from strategies.aggregation.stacking import FedEx, FLoRA

__all__ = [
    "AGGREGATIONS",
    "RBLA",
    "AggregationResult",
    "Aggregator",
    "FLoRA",
    "FedEx",
    "FedIT",
    "FlexLoRA",
    "Florist",
    "RBLoRA",
    "RaFLoRA",
    "Replication",
    "State",
    "Update",
    "ZeroPadding",
    "make_aggregator",
    "register",
]
