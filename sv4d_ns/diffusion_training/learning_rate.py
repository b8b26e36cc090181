"""The learning rate of a training run."""

import math

LEAST = 0.02
"""Share of the peak at the end."""


def learning_rate(peak: float, step: int, total: int, warmup: int, decay: int) -> float:
    """Linear warm-up, constant, then half a cosine down to `LEAST` of the peak.

    Args:
        step: from 0, of `total`.
        warmup: steps of the warm-up.
        decay: steps of the cosine, the last ones.
    """
    progress = min(max((step - total + decay) / decay, 0.0), 1.0)
    return peak * min((step + 1) / warmup, 1.0) * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * progress)))


def highest_sentence(peak: float, total: int, warmup: int, decay: int) -> str | None:
    """What to say of a run too short for its warm-up and decay; None for one that reaches the peak."""
    highest = max(learning_rate(peak, step, total, warmup, decay) for step in range(total))
    if highest > 0.9 * peak:
        return None
    return (
        f"The learning rate reaches {highest:.1e} of {peak:.1e} only: {total} steps are few for {warmup} of warm-up "
        f"(--warmup-steps) and {decay} of decay (--decay-steps)."
    )
