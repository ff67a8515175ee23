"""For the client side: put an adapter into a PEFT model in place, and read it back.

A Message API app needs ``apply_adapter`` and ``make_reply``; a ``NumPyClient`` needs
``receive_parameters`` and ``send_parameters``. All follow what the message says of rank,
scale, wire type, what is trained, kept and sent back, and what is merged into the base;
both are thin over ``receive`` and ``send``, for those who pack messages themselves.
The rank policies that ask more of a client have a helper each: ``register_profile`` and
``profile`` (autorank), ``capacity`` (capacity), ``tail_penalty`` (self-pruning).
"""

from strategies.client.bundling import bundled
from strategies.client.exchange import KEPT_KEY, RankLimitError, check_limit, receive, send
from strategies.client.message_api import apply_adapter, make_reply, training_metrics
from strategies.client.numpy_api import fit_reply, receive_parameters, send_parameters
from strategies.client.peft_model import (
    adapter_state,
    check_mergeable,
    load_adapter,
    merge_into_base,
    tail_penalty,
)
from strategies.client.probing import MEASURED_KEY, capacity
from strategies.client.profiling import (
    IDENTITY_KEYS,
    PROFILED_KEY,
    LossesAndLabels,
    Measure,
    profile,
    profile_wanted,
    register_identity,
    register_profile,
)
from strategies.client.rescaling import trained_at
from strategies.client.timing import timed
from strategies.profiling import Profile

__all__ = [
    "IDENTITY_KEYS",
    "KEPT_KEY",
    "MEASURED_KEY",
    "PROFILED_KEY",
    "LossesAndLabels",
    "Measure",
    "Profile",
    "RankLimitError",
    "adapter_state",
    "apply_adapter",
    "bundled",
    "capacity",
    "check_limit",
    "check_mergeable",
    "fit_reply",
    "load_adapter",
    "make_reply",
    "merge_into_base",
    "profile",
    "profile_wanted",
    "receive",
    "receive_parameters",
    "register_identity",
    "register_profile",
    "send",
    "send_parameters",
    "tail_penalty",
    "timed",
    "trained_at",
    "training_metrics",
]
