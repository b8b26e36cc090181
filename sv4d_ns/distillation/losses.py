"""The terms of 4Diffusion's objective beside score distillation; pure functions, each a scalar.

Source: aejion/4Diffusion @ 627d0cd for what is computed, the works named below for the formulas.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


@lru_cache(maxsize=4)
def gaussian_window(size: int = WINDOW, sigma: float = SIGMA) -> Float[Tensor, "size size"]:
    """A normalised Gaussian of `sigma` pixels."""
    distance = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-distance.square() / (2 * sigma**2))
    line = (line / line.sum()).float()
    return torch.outer(line, line)


def ssim(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """Mean structural similarity (Wang et al. 2004), Gaussian window of 11 pixels, zeros beyond the border.

    torchmetrics and pytorch-msssim leave the border out, which gives other values.
    """
    channels = a.shape[1]
    kernel = gaussian_window().to(a).expand(channels, 1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return functional.conv2d(x, kernel, padding=WINDOW // 2, groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return (similarity / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean()


def orientation(
    weights: Float[Tensor, " m"],
    normals: Float[Tensor, "m 3"],
    directions: Float[Tensor, "m 3"],
    opacity: Float[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Ref-NeRF's penalty (Verbin et al. 2022, eq. 11) on visible normals that look away, per ray that meets anything.

    Args:
        weights: of m samples in their pixels; a constant here.
        normals: unit outward normals of the samples.
        directions: of each sample's ray.
        opacity: of n rays.
    """
    away = (normals * directions).sum(-1).clamp(min=0).square()
    return (weights.detach() * away).sum() / (opacity > 0).sum().clamp(min=1)


def sparsity(opacity: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean of sqrt(opacity^2 + 0.01): the less matter the better."""
    return (opacity.square() + 0.01).sqrt().mean()


def opaque(opacity: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean binary entropy of the opacity: rays are to be empty or opaque."""
    clamped = opacity.clamp(1e-3, 1 - 1e-3)
    return functional.binary_cross_entropy(clamped, clamped)


def z_variance(variance: Float[Tensor, " n"], opacity: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """HiFA's penalty (Zhu and Zhuang 2024): mean `depth_variance` of the rays that are at least half opaque."""
    solid = (opacity > 0.5).to(variance)
    return (variance * solid).sum() / solid.sum().clamp(min=1)


def depth_variance(
    weights: Float[Tensor, " m"], distances: Float[Tensor, " m"], rays: Int[Tensor, " m"], n_rays: int
) -> Float[Tensor, " n"]:
    """Sum of w (t - depth)^2 along each ray, depth being the sum of w t."""
    depth = weights.new_zeros(n_rays).index_add(0, rays, weights * distances)
    return weights.new_zeros(n_rays).index_add(0, rays, weights * (distances - depth[rays]).square())
