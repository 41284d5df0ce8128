"""Every random number of a training, as a function of the seed and of the place of a sample in the training.

Knows that sample number p of the endless training sequence (global, over all processes and steps) has its own
generator.  So a resumed training draws what an uninterrupted one does, and two processes draw together what one with
a doubled batch does.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """A well-mixed 63-bit seed from a few non-negative integers (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def generator_of(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*numbers))
