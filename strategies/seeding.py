"""A stream of random numbers for each purpose, from one seed."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """Return the generator of a purpose at a place, say a round; no two share one.

    Lists of numbers as seeds are padded with zeros: ``[seed, 3]`` and ``[seed, 3, 0]`` are the same
    generator, so two purposes that make one each would draw the same numbers.

    Parameters
    ----------
    seed : int
    purpose : str
        What the numbers are for.
    *where : int
        Round, client or the like; none is below 0.
    """
    key = (zlib.crc32(purpose.encode()), *where)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
