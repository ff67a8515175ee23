"""Samplers: which clients join a round."""

from strategies.sampling.base import SAMPLERS, Outlook, Sampler, make_sampler, register
from strategies.sampling.fraction import FractionSampling
from strategies.sampling.independent import BernoulliSampling, IndependentSampling
from strategies.sampling.planned import PlannedSampling
from strategies.sampling.proportional import StatisticalSampling, WeightedSampling

__all__ = [
    "SAMPLERS",
    "BernoulliSampling",
    "FractionSampling",
    "IndependentSampling",
    "Outlook",
    "PlannedSampling",
    "Sampler",
    "StatisticalSampling",
    "WeightedSampling",
    "make_sampler",
    "register",
]
