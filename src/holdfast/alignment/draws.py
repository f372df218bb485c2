"""What a defense draws, as a function of the run's seed and of a number alone: an update's, or a round's.

Nothing is drawn from a random state that goes on from update to update, so nothing has to be saved, passed on or kept
in step: all ranks draw the same, as they have the same seed and count the same updates; accumulation, dropout, data
order and attacks in between change nothing; and a run that is resumed draws what it would have drawn.
"""

from __future__ import annotations

import zlib

import numpy as np


def draws(seed: int, purpose: str, number: int) -> np.random.Generator:
    """The generator for one purpose at one update or round; two purposes of one update draw independently.

    numpy hashes the three (`SeedSequence`), so neighbouring numbers share nothing.

    Args:
        seed: The run's seed.
        purpose: What is drawn.
        number: The update's, from 0, or the round's, from 1.
    """
    return np.random.default_rng((seed, zlib.crc32(purpose.encode()), number))
