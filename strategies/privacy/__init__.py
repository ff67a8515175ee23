"""Differential privacy for what a client sends: clip, noise, and what follows from it.

``mechanism`` is the client's part and needs nothing but torch and numpy. ``accounting`` and
``accountant`` are the server's; what they compute needs the extra ``[privacy]``, importing them
does not. ``checks`` says which settings would void the guarantee.
"""

from strategies.privacy.accountant import PrivacyAccountant
from strategies.privacy.accounting import central_epsilon, epsilon, local_epsilon, top_up
from strategies.privacy.checks import refuse_amplification, refuse_private
from strategies.privacy.mechanism import Privacy, add_noise, clip_displacement, clip_update
from strategies.privacy.none import NoPrivacy
from strategies.privacy.releases import Fixed, Gaussian, Poisson
from strategies.privacy.run import PrivateRun

__all__ = [
    "Fixed",
    "Gaussian",
    "NoPrivacy",
    "Poisson",
    "Privacy",
    "PrivacyAccountant",
    "PrivateRun",
    "add_noise",
    "central_epsilon",
    "clip_displacement",
    "clip_update",
    "epsilon",
    "local_epsilon",
    "refuse_amplification",
    "refuse_private",
    "top_up",
]
