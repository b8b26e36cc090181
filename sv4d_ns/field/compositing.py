"""What packed samples along rays add up to: weights, opacity, depth, and how spread out they are, with gradients.

Volume rendering as in Mildenhall et al. 2020 (NeRF) eq. 3. Each function is one compiled pass over the samples on a CPU
and torch operations elsewhere, which tests compare it to.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sv4d_ns.field.kernels import fused, njit

LEAST_ALPHA = 1e-3
"""Opacity that a ray's weights are at least divided by."""


@dataclass(frozen=True)
class RaySamples:
    """m packed samples of n rays, ordered by ray and then by distance."""

    ray_indices: Int[Tensor, " m"]
    distances: Float[Tensor, " m"]
    """From the ray origin, world units (directions are unit vectors), at the middle of the sample's interval."""
    step: float
    """Length of every interval."""
    n_rays: int


def sum_before(values: Float[Tensor, " m"], rays: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Of packed values, the sum of those before each on its own ray: one running sum, minus its value at the ray's
    start (in float64, because it grows with the batch)."""
    before = values.cumsum(0) - values
    place = torch.arange(len(rays), device=rays.device)
    new = torch.ones_like(rays, dtype=torch.bool)
    new[1:] = rays[1:] != rays[:-1]
    start = torch.where(new, place, 0).cummax(0).values if len(rays) else place
    return before - before[start]


def transmittance(optical: Float[Tensor, " m"], samples: RaySamples) -> Float[Tensor, " m"]:
    """T_i = exp(-sum of optical thickness (density * step) before i on the same ray), in [0, 1]."""
    return torch.exp(-sum_before(optical.double(), samples.ray_indices)).to(optical.dtype)


def accumulate(weights: Float[Tensor, " m"], values: Float[Tensor, "m c"], samples: RaySamples) -> Float[Tensor, "n c"]:
    """Per-ray sums of weights * values."""
    out = values.new_zeros(samples.n_rays, values.shape[1])
    return out.index_add(0, samples.ray_indices, weights[:, None] * values)


def composite(
    density: Float[Tensor, " m"], samples: RaySamples, backend: str = "numba"
) -> tuple[Float[Tensor, " m"], Float[Tensor, "n 2"]]:
    """Weights w_i = T_i (1 - exp(-density_i step)) of samples; of rays their sum, alpha, and that of w_i distance_i."""
    if _fits(density, backend):
        return _Composite.apply(density.contiguous(), samples)  # type: ignore[no-any-return]
    optical = density * samples.step
    weights = transmittance(optical, samples) * -torch.expm1(-optical)
    distances = samples.distances
    return weights, accumulate(weights, torch.stack([torch.ones_like(distances), distances], -1), samples)


def spread(weights: Float[Tensor, " m"], samples: RaySamples, backend: str = "numba") -> Float[Tensor, ""]:
    """How spread out along its ray what is seen is: Barron et al. 2022 (mip-NeRF 360) eq. 15 in world units for packed
    samples, sum_ij w_i w_j |s_i - s_j| + step / 3 sum_i w_i^2.

    Ours differs in one point: each ray's weights are first divided by their sum, and rays are averaged by that sum as
    a constant. As published, the loss is also lowered by making the object transparent, and early fog vanishes.
    """
    if _fits(weights, backend):
        return _Spread.apply(weights.contiguous(), samples)  # type: ignore[no-any-return]
    rays = samples.ray_indices
    alpha = weights.new_zeros(samples.n_rays).index_add(0, rays, weights)
    w, s = (weights / alpha.clamp(min=LEAST_ALPHA)[rays]).double(), samples.distances.double()
    # Samples are ordered by distance, so |s_i - s_j| needs no absolute value: i after j.
    per_sample = 2 * (w * s * sum_before(w, rays) - w * sum_before(w * s, rays)) + samples.step / 3 * w.square()
    share = alpha.detach() / alpha.detach().sum().clamp(min=1e-6)
    return (share[rays] * per_sample).sum().to(weights.dtype)


def _fits(values: Tensor, backend: str) -> bool:
    return fused(backend, values) and values.dtype == torch.float32


_JIT: Any = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}


@njit(**_JIT)
def _composite_kernel(density, distances, rays, step, weights, passed, sums):  # type: ignore[no-untyped-def]
    """`passed` is the transmittance behind each sample."""
    ray, opened = -1, 1.0
    for i in range(len(density)):
        if rays[i] != ray:
            ray, opened = rays[i], 1.0
        behind = opened * exp(-density[i] * step)
        weight = opened - behind
        weights[i], passed[i] = weight, behind
        sums[ray, 0] += weight
        sums[ray, 1] += weight * distances[i]
        opened = behind


@njit(**_JIT)
def _composite_gradient(distances, rays, step, weights, passed, grad_weights, grad_sums, grad_density):  # type: ignore[no-untyped-def]
    """Matter at a sample adds to its weight what has passed it, and takes from all behind it."""
    ray, behind = -1, 0.0
    for i in range(len(weights) - 1, -1, -1):
        if rays[i] != ray:
            ray, behind = rays[i], 0.0
        grad = grad_weights[i] + grad_sums[ray, 0] + grad_sums[ray, 1] * distances[i]
        grad_density[i] = step * (grad * passed[i] - behind)
        behind += grad * weights[i]


@njit(**_JIT)
def _spread_kernel(weights, distances, rays, step, gradient):  # type: ignore[no-untyped-def]
    """The sum over rays of alpha times spread, and of alpha; and the first one's gradient with alpha held constant."""
    total, all_alpha = 0.0, 0.0
    first, count = 0, len(weights)
    while first < count:
        last, alpha = first, 0.0
        while last < count and rays[last] == rays[first]:
            alpha += weights[last]
            last += 1
        divisor = max(alpha, LEAST_ALPHA)
        nearer, nearer_at = 0.0, 0.0
        for i in range(first, last):
            w, s = weights[i] / divisor, distances[i]
            to_nearer = 2 * (s * nearer - nearer_at)
            total += alpha * w * (to_nearer + step / 3 * w)
            gradient[i] = to_nearer + 2 * step / 3 * w
            nearer += w
            nearer_at += w * s
        farther, farther_at, mean = 0.0, 0.0, 0.0
        for i in range(last - 1, first - 1, -1):
            w, s = weights[i] / divisor, distances[i]
            gradient[i] += 2 * (farther_at - s * farther)
            mean += gradient[i] * w
            farther += w
            farther_at += w * s
        if alpha < LEAST_ALPHA:
            mean = 0.0  # the divisor is a constant
        for i in range(first, last):
            gradient[i] = (gradient[i] - mean) * alpha / divisor
        all_alpha += alpha
        first = last
    return total, all_alpha


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, density: Tensor, samples: RaySamples) -> tuple[Tensor, Tensor]:
        weights, passed, sums = torch.empty_like(density), torch.empty_like(density), torch.zeros(samples.n_rays, 2)
        arrays = _arrays(density, samples.distances, samples.ray_indices)
        _composite_kernel(*arrays, samples.step, *_arrays(weights, passed, sums))  # type: ignore[call-arg]
        ctx.samples = samples
        ctx.save_for_backward(weights, passed)
        return weights, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_weights: Tensor, grad_sums: Tensor) -> tuple[Tensor, None]:
        samples, (weights, passed) = ctx.samples, ctx.saved_tensors
        grad_density = torch.empty_like(weights)
        arrays = _arrays(weights, passed, grad_weights, grad_sums, grad_density)
        _composite_gradient(*_arrays(samples.distances, samples.ray_indices), samples.step, *arrays)  # type: ignore[call-arg]
        return grad_density, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, samples: RaySamples) -> Tensor:
        gradient = torch.empty(len(weights), dtype=torch.float64)
        arrays = _arrays(weights, samples.distances, samples.ray_indices)
        total, alpha = _spread_kernel(*arrays, samples.step, gradient.numpy())  # type: ignore[call-arg]
        scale = 1 / max(alpha, 1e-6)
        ctx.save_for_backward((gradient * scale).float())
        return torch.tensor(total * scale, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None
