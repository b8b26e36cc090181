"""Random numbers without a state: all follows from (seed, step), so a resumed run draws as it would have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sv4d_ns.utils.devices import upload


def generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step; `stream` separates independent uses of the same step."""
    return np.random.default_rng([seed, step, stream])


def uniform(seed: int, step: int, shape: Sequence[int], stream: int) -> Float[Tensor, ...]:
    """Uniform [0, 1) float32 tensor of one step."""
    return torch.from_numpy(generator(seed, step, stream).random(tuple(shape), dtype=np.float32))


def draw_true(
    mask: Bool[Tensor, " m"], count: int, rng: np.random.Generator
) -> tuple[Int[Tensor, " count"], Bool[Tensor, ""]]:
    """Places where a mask is true, drawn with replacement, and whether there is any (else the places are arbitrary).

    How many are true stays on the device: to read it would wait for all work before it.
    """
    place = mask.cumsum(0)
    draws = upload(rng.integers(0, 2**32, count, dtype=np.uint32).astype(np.int64), mask.device)
    chosen = (draws * place[-1]) >> 32  # NumPy's `integers(0, place[-1])`, but for one draw in 2**32 / place[-1]
    return torch.searchsorted(place, chosen + 1).clamp(max=len(mask) - 1), place[-1] > 0
