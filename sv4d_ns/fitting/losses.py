"""Each loss of the 4D optimisation, a small pure function, with its source. All return a scalar.
`distortion` is `field.compositing.spread`, beside the sums that it is made of.

Where the papers use LPIPS, `perceptual` does so too if the network's weights are on this machine; `dssim`, the
structural loss on patches, needs none. The printout of a run says which it has.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.metrics.lpips import Perceptual
from sv4d_ns.utils.devices import upload

SOBEL = np.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def photometric(rendered: Float[Tensor, "n 3"], target: Float[Tensor, "n 3"], weight: Float[Tensor, " n"]) -> Tensor:
    """Weighted mean squared error (SV4D L_mse)."""
    error = (rendered - target).square().mean(-1)
    return (weight * error).sum() / weight.sum().clamp(min=1e-8)


def mask(alpha: Float[Tensor, " n"], target: Float[Tensor, " n"], weight: Float[Tensor, " n"]) -> Tensor:
    """Weighted mean squared difference of opacity and mask (SV4D L_mask)."""
    return (weight * (alpha - target).square()).sum() / weight.sum().clamp(min=1e-8)


def dssim(
    rendered: Float[Tensor, "p s s 3"], target: Float[Tensor, "p s s 3"], weight: Float[Tensor, " p"], window: int = 5
) -> Tensor:
    """(1 - SSIM) / 2 over patches, weighted per patch (Wang et al. 2004, box window, C1 = 0.01^2, C2 = 0.03^2)."""
    x, y = rendered.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2)

    def mean(v: Tensor) -> Tensor:
        return functional.avg_pool2d(v, window, 1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    per_patch = ((1 - ssim) / 2).mean((1, 2, 3))
    return (weight * per_patch).sum() / weight.sum().clamp(min=1e-8)


def perceptual(
    network: Perceptual,
    rendered: Float[Tensor, "p s s 3"],
    target: Float[Tensor, "p s s 3"],
    weight: Float[Tensor, " p"],
) -> Tensor:
    """Distance of patches in the eyes of a network (SV4D L_lpips), weighted per patch."""
    distance = network(rendered.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2))
    return (weight * distance).sum() / weight.sum().clamp(min=1e-8)


def normal(rendered: Float[Tensor, "n 3"], estimated: Float[Tensor, "n 3"], weight: Float[Tensor, " n"]) -> Tensor:
    """Weighted mean 1 - n . n_estimated (SV4D L_normal) of unit vectors; estimates of length zero do not count."""
    weight = weight * (estimated.square().sum(-1) > 0.5)
    return (weight * (1 - (rendered * estimated).sum(-1))).sum() / weight.sum().clamp(min=1e-8)


def bilateral_normal(
    normals: Float[Tensor, "p s s 3"], image: Float[Tensor, "p s s 3"], seen: Bool[Tensor, "p s s"]
) -> Tensor:
    """Mean exp(-3 |grad I|) sqrt(1 + |grad n|) - 1 of patches (SV4D L_bilateral, after Boss et al. 2022): normals may
    turn where the picture has an edge. Gradients are Sobel's, divided by 8 (per pixel); the -1 only lets a plane cost
    nothing. Where the 3x3 neighbourhood is not all surface, nothing is asked."""
    inside = -functional.max_pool2d(-seen[:, None].float(), 3, 1)[:, 0] > 0
    edge = torch.exp(-3 * _sobel(image))
    turning = (1 + _sobel(normals)).sqrt() - 1
    return (edge * turning * inside).sum() / inside.sum().clamp(min=1)


def _sobel(values: Float[Tensor, "p s s c"]) -> Float[Tensor, "p t t"]:
    """Length of Sobel's gradient over both directions and all channels, [p, s - 2, s - 2]."""
    row = upload(SOBEL, values.device).to(values.dtype) / 8
    kernels = torch.stack([row, row.t()])[:, None]
    channels = values.permute(0, 3, 1, 2)
    gradient = functional.conv2d(channels.reshape(-1, 1, *channels.shape[2:]), kernels)
    # a root's slope at zero is infinite
    squares = gradient.reshape(len(values), -1, *gradient.shape[2:]).square().sum(1)
    return (squares + 1e-8).sqrt() - 1e-4


def normal_smoothness(field: DeformableField, surface: Float[Tensor, "n 3"], offset: Float[Tensor, "n 3"]) -> Tensor:
    """Mean |n(x) - n(x + offset)|^2 of canonical normals at canonical surface points (Oechsle et al. 2021, UNISURF
    eq. 13); offsets are a few millimetres (about 0.01)."""
    n = field.canonical_normals(torch.cat([surface, surface + offset]))
    return (n[: len(surface)] - n[len(surface) :]).square().sum(-1).mean()


def deformation_magnitude(deformation: Float[Tensor, "m 3"], weights: Float[Tensor, " m"]) -> Tensor:
    """Visible mean |dx|^2: of two explanations of the images, prefer the smaller motion."""
    return (weights.detach() * deformation.square().sum(-1)).sum() / weights.detach().sum().clamp(min=1e-8)


def deformation_rigidity(
    deformation: Float[Tensor, "n 3"], neighbour: Float[Tensor, "n 3"], offset: Float[Tensor, "n 3"]
) -> Tensor:
    """Mean squared relative change of length of a short offset under x -> x + dx (isometry; the idea of Nerfies'
    elastic loss, Park et al. 2021 section 3.3, without its singular values): limbs move, material does not stretch."""
    moved = offset + neighbour - deformation
    stretch = moved.norm(dim=-1) / offset.norm(dim=-1).clamp(min=1e-8) - 1
    # Geman-McClure: joints and self-contacts stretch by nature and must not dominate.
    return (stretch.square() / (1 + stretch.square())).mean()


def registration(
    canonical_distance: Float[Tensor, " n"], distance: Float[Tensor, " n"], tolerance: float, reach: float
) -> Tensor:
    """Squared difference of signed distances to the canonical and to this moment's visual hull, of points and of where
    the deformation says they came from (unitless: in tolerances).

    A rendered limb that does not overlap its picture gives no gradient toward it, distances do from anywhere within
    `reach` (they are cut off there). Within `tolerance`, about the hull's own cells, nothing is asked: pixels decide.
    Our own design.
    """
    gap = canonical_distance.clamp(-reach, reach) - distance.clamp(-reach, reach)
    return (functional.relu(gap.abs() / tolerance - 1)).square().mean()


def sparsity(
    density: Float[Tensor, " m"],
    transmittance: Float[Tensor, " m"],
    step: float,
    n_rays: int | Int[Tensor, ""],
    max_density: float,
) -> Tensor:
    """Mean length of matter that lies open to a ray, world units (at the largest density): matter no view asks for goes
    from its surface inward. Sparsity of the papers' loss lists; its form is our own.

    What lies behind matter is spared (the transmittance is taken as constant): the mean density of the whole hull as
    the loss hollows bodies out, and their surfaces become shells.
    """
    return (transmittance.detach() * density).sum() * step / (n_rays * max_density)


def scene_flow(origin: Float[Tensor, "n 3"], expected: Float[Tensor, "n 3"], tolerance: float) -> Tensor:
    """Distance of where points of this moment come from to where the same points of a neighbouring moment do (in
    tolerances), quadratic within one and linear beyond it (pseudo-Huber). Our own design."""
    squared = ((origin - expected) / tolerance).square().sum(-1)
    return (torch.sqrt(1 + squared) - 1).mean()


def density_residual(residual: Float[Tensor, " m"]) -> Tensor:
    """Mean square of what moments add to the density's logit, over all samples: the canonical shape and its motion come
    first."""
    return residual.square().mean()
