"""No two purposes share a stream of random numbers."""

import numpy as np

from strategies import FedLoRA
from strategies.seeding import stream


def test_every_purpose_and_place_has_its_own():
    places = [(), (0,), (1,), (1, 0), (0, 1), (1, 0, 0)]
    draws = [stream(42, name, *at).random() for name in ("plan", "order") for at in places]
    draws += [stream(seed, "plan").random() for seed in (0, 43, 2**40)]
    # What the strategy draws from, padded with zeros by NumPy.
    draws += [FedLoRA(seed=42)._rng(*at).random() for at in ((1,), (2, 0), (1, 1), (1, 2, 3))]
    assert len(set(draws)) == len(draws)


def test_same_seed_same_numbers():
    assert np.array_equal(stream(7, "plan", 3).random(9), stream(7, "plan", 3).random(9))
