"""The terms of 4Diffusion's objective beside score distillation; pure functions, each a scalar.

Source: aejion/4Diffusion @ 627d0cd for what is computed, the works named below for the formulas.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


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
