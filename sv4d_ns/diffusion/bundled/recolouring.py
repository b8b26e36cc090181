"""Hidden parts of a volume in the colours that the input picture shows. Own design, see docs/deviations.md."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.frustum import Frustum, cell_points
from sv4d_ns.diffusion.bundled.rendering import Volume
from sv4d_ns.views.recolouring import in_seen_colours

SOLID = 0.6
"""Opacity of the ray through a cell's column from which its pixel's colour is the object's."""
MATTER = 0.02
"""Optical depth of a cell, or of one beside it, from which the cell's colour may show."""
FEWEST_SEEN = 10
"""Solid pixels below which a moment stays as it is."""


def in_colours_of_the_input(volumes: Volume, frustum: Frustum) -> Volume:
    """Volumes whose own colours (not the share of the input picture's) are means of those that the input shows."""
    moments = zip(volumes.density, volumes.colour, volumes.image, strict=True)
    return replace(volumes, colour=torch.stack([_recoloured(*moment, frustum) for moment in moments]))


def _recoloured(density: torch.Tensor, colour: torch.Tensor, image: torch.Tensor, frustum: Frustum) -> torch.Tensor:
    """The colour grid of one moment."""
    fine, coarse = len(density), colour.shape[1]
    density, colour = density.float(), colour.float()
    points = cell_points(frustum, fine, density.device)
    before = torch.cumsum(density, 0) - density
    weight = torch.exp(-before) * (1.0 - torch.exp(-density))
    opacity = weight.sum(0)
    solid = opacity > SOLID
    if int(solid.sum()) < FEWEST_SEEN:
        return colour
    depth = (weight * points[..., 2]).sum(0) / opacity.clamp(min=1e-6)
    surface = (points[0] / points[0, ..., 2:] * depth[..., None])[solid]
    pixels = F.interpolate(image[None].float(), (fine, fine), mode="bilinear", antialias=True, align_corners=False)
    near_matter = F.adaptive_max_pool3d(F.max_pool3d(density[None], 3, 1, 1), (coarse,) * 3)[0] > MATTER
    places = cell_points(frustum, coarse, density.device)[near_matter]
    size = float((places.amax(0) - places.amin(0)).norm())
    seen = pixels[0].movedim(0, -1)[solid]
    result = colour.clone()
    result[:, near_matter] = in_seen_colours(places, colour[:, near_matter].T, surface, seen, size).T
    return result
