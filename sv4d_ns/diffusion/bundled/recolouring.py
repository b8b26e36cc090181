"""Hidden parts of a volume in the colours that the input picture shows. Own design, see docs/deviations.md.

A model that paints sides it cannot see hedges: its colours there are means of what could be, greyer than any object.
But an object's far side is nearly always in the colours of its near one, so a guess only decides between those.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.frustum import Frustum, cell_points
from sv4d_ns.diffusion.bundled.rendering import Volume

REACH = 0.15
"""Distance, as a share of the object's size, over which a seen colour's weight falls to exp(-1/2)."""
LIKENESS = 0.2
"""Difference between a guess and a seen colour, sRGB in [0, 1], over which it falls as much."""
MOST_SEEN = 2000
"""Seen places that a CPU looks at, evenly over those there are."""
AT_ONCE = 4096
"""Guesses that are compared with all of them together."""
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


def _recoloured(
    density: Float[Tensor, "d h w"], colour: Float[Tensor, "3 i j k"], image: Float[Tensor, "3 s s"], frustum: Frustum
) -> Float[Tensor, "3 i j k"]:
    """The colour grid of one moment."""
    density, guesses, coarse = density.float(), colour.float().flatten(1).T, colour.shape[1]
    seen_places, seen_colours, solid = _seen(density, image, frustum)
    matter = (F.adaptive_max_pool3d(F.max_pool3d(density[None], 3, 1, 1), (coarse,) * 3)[0] > MATTER).flatten()
    cells = cell_points(frustum, coarse, density.device).reshape(-1, 3)
    span = [torch.where(matter[:, None], sign * cells, -1e3).amax(0) for sign in (1, -1)]
    size = (span[0] + span[1]).norm()
    enough = solid.sum() >= FEWEST_SEEN
    if density.device.type == "cpu":  # a GPU would be waited for to find those that count
        some = solid.nonzero()[:, 0]
        some = some[:: -(-len(some) // MOST_SEEN) or 1]
        wanted = matter.nonzero()[:, 0]
        found = guesses.clone()
        found[wanted] = in_seen_colours(
            cells[wanted], guesses[wanted], seen_places[some], seen_colours[some], solid[some], size
        )
    else:
        found = in_seen_colours(cells, guesses, seen_places, seen_colours, solid, size)
    return torch.where(enough & matter[:, None], found, guesses).T.reshape(colour.shape)


def _seen(
    density: Float[Tensor, "d h w"], image: Float[Tensor, "3 s s"], frustum: Frustum
) -> tuple[Float[Tensor, "m 3"], Float[Tensor, "m 3"], Bool[Tensor, " m"]]:
    """For each pixel the place that the input camera sees (at the mean depth of a column's light), the picture's colour
    there, and whether it is the object's."""
    points = cell_points(frustum, len(density), density.device)
    before = torch.cumsum(density, 0) - density
    weight = torch.exp(-before) * (1.0 - torch.exp(-density))
    opacity = weight.sum(0)
    depth = (weight * points[..., 2]).sum(0) / opacity.clamp(min=1e-6)
    places = points[0] / points[0, ..., 2:] * depth[..., None]
    pixels = F.interpolate(image[None].float(), opacity.shape, mode="bilinear", antialias=True, align_corners=False)
    return places.reshape(-1, 3), pixels[0].flatten(1).T, (opacity > SOLID).flatten()


def in_seen_colours(
    places: Float[Tensor, "n 3"],
    guesses: Float[Tensor, "n 3"],
    seen_places: Float[Tensor, "m 3"],
    seen_colours: Float[Tensor, "m 3"],
    counts: Bool[Tensor, " m"],
    size: Float[Tensor, ""],
) -> Float[Tensor, "n 3"]:
    """Each guess replaced by a mean of the seen colours, in which those near by and like it count most: a joint
    bilateral filter (Petschnigg et al. 2004) from the seen places to the others.

    Args:
        places: of the guesses.
        guesses: sRGB in [0, 1], as the result.
        counts: which of the seen ones are looked at.
        size: diagonal of the object's box, in the places' units.
    """
    found = []
    for place, guess in zip(places.split(AT_ONCE), guesses.split(AT_ONCE), strict=True):
        apart = torch.cdist(place, seen_places) / (REACH * size)
        unlike = torch.cdist(guess, seen_colours) / LIKENESS
        nearness = torch.where(counts, -(apart.square() + unlike.square()) / 2, -1e30)
        found.append(torch.softmax(nearness, dim=1) @ seen_colours)
    return torch.cat(found)
