"""The one curve that turns measures into weights."""

from jaxtyping import Float
from torch import Tensor


def smoothstep(x: Float[Tensor, "*n"], low: float, high: float) -> Float[Tensor, "*n"]:
    """u^2 (3 - 2u), u = clip((x - low) / (high - low), 0, 1)."""
    u = ((x - low) / (high - low)).clamp(0, 1)
    return u * u * (3 - 2 * u)
