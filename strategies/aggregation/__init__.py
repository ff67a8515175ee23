"""Aggregation rules: how adapters of different rank become one."""

from strategies.aggregation.averaging import RBLA, FedIT, HetLoRA, Replication, ZeroPadding
from strategies.aggregation.base import (
    AGGREGATIONS,
    AggregationResult,
    Aggregator,
    Download,
    Update,
    make_aggregator,
    register,
)
from strategies.aggregation.folding import Fold
from strategies.aggregation.partial import FFA, FedSA, FedSVD, RoLoRA
from strategies.aggregation.population import Population
from strategies.aggregation.product import FlexLoRA, Florist, RaFLoRA, RBLoRA
from strategies.aggregation.robust import (
    ROBUST,
    Krum,
    Median,
    NormFilter,
    Robust,
    TrimmedMean,
    make_robust,
)
from strategies.aggregation.sketching import FSLoRA
from strategies.aggregation.stacking import FedEx, FedMomentum, FLoRA
from strategies.aggregation.state import State
from strategies.aggregation.support import Support

__all__ = [
    "AGGREGATIONS",
    "FFA",
    "RBLA",
    "ROBUST",
    "AggregationResult",
    "Aggregator",
    "Download",
    "FLoRA",
    "FSLoRA",
    "FedEx",
    "FedIT",
    "FedMomentum",
    "FedSA",
    "FedSVD",
    "FlexLoRA",
    "Florist",
    "Fold",
    "HetLoRA",
    "Krum",
    "Median",
    "NormFilter",
    "Population",
    "RBLoRA",
    "RaFLoRA",
    "Replication",
    "RoLoRA",
    "Robust",
    "State",
    "Support",
    "TrimmedMean",
    "Update",
    "ZeroPadding",
    "make_aggregator",
    "make_robust",
    "register",
]
