"""Random numbers without a state: all follows from (seed, step), so a resumed run draws as it would have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step; `stream` separates independent uses of the same step."""
    return np.random.default_rng([seed, step, stream])


def uniform(seed: int, step: int, shape: Sequence[int], stream: int) -> Float[Tensor, ...]:
    """Uniform [0, 1) float32 tensor of one step."""
    return torch.from_numpy(generator(seed, step, stream).random(tuple(shape), dtype=np.float32))
