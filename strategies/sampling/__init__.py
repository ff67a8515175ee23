"""Samplers: which clients join a round."""

from strategies.sampling.base import SAMPLERS, Sampler, make_sampler, register
from strategies.sampling.fraction import FractionSampling

__all__ = ["SAMPLERS", "FractionSampling", "Sampler", "make_sampler", "register"]
