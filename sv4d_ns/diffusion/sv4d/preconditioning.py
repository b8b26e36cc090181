"""Between latents and what the network sees and says: v-prediction for the noise process x + sigma n (Karras et al.
2022, table 1, with the coefficients of SVD's `VScalingWithEDMcNoise`)."""

from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

Level = TypeVar("Level", float, Tensor)
"""Standard deviation of the noise: one, or a tensor that broadcasts against latents."""


def scaled(latents: Float[Tensor, "..."], sigma: Level) -> Float[Tensor, "..."]:
    """Noisy latents as the network sees them, of variance 1."""
    return latents / (sigma**2 + 1) ** 0.5


def v_target(x: Float[Tensor, "..."], noise: Float[Tensor, "..."], sigma: Level) -> Float[Tensor, "..."]:
    """What the network should predict: (noise - sigma x) / sqrt(sigma^2 + 1)."""
    return scaled(noise - sigma * x, sigma)


def denoised(seen: Float[Tensor, "..."], output: Float[Tensor, "..."], sigma: Level) -> Float[Tensor, "..."]:
    """Clean latents from `scaled` noisy ones and the network's output."""
    scale = (sigma**2 + 1) ** 0.5
    return seen / scale - sigma / scale * output
