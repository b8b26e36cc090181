"""Colours for places that the film does not show, out of those that it does.

A model that paints sides it cannot see hedges: its colours there are means of what could be, greyer than any object.
But an object's far side is nearly always in the colours of its near one, so a guess only decides between those.
"""

import torch
from jaxtyping import Float
from torch import Tensor

REACH = 0.15
"""Distance, as a share of the object's size, over which a seen colour's weight falls to exp(-1/2)."""
LIKENESS = 0.2
"""Difference between a guess and a seen colour, sRGB in [0, 1], over which it falls as much."""
MOST_SEEN = 2000
"""Seen places that are looked at, evenly over those there are."""
AT_ONCE = 4096
"""Guesses that are compared with all of them together."""


def in_seen_colours(
    places: Float[Tensor, "n 3"],
    guesses: Float[Tensor, "n 3"],
    seen_places: Float[Tensor, "m 3"],
    seen_colours: Float[Tensor, "m 3"],
    size: float,
) -> Float[Tensor, "n 3"]:
    """Each guess replaced by a mean of the seen colours, in which those near by and like it count most: a joint
    bilateral filter (Petschnigg et al. 2004) from the seen places to the others.

    Args:
        places: of the guesses.
        guesses: sRGB in [0, 1], as the result.
        seen_places: at least one.
        size: diagonal of the object's box, in the places' units.
    """
    some = torch.linspace(0, len(seen_places) - 1, min(len(seen_places), MOST_SEEN), device=places.device).long()
    seen_places, seen_colours = seen_places[some], seen_colours[some]
    found = []
    for place, guess in zip(places.split(AT_ONCE), guesses.split(AT_ONCE), strict=True):
        apart = torch.cdist(place, seen_places) / (REACH * size)
        unlike = torch.cdist(guess, seen_colours) / LIKENESS
        found.append(torch.softmax(-(apart.square() + unlike.square()) / 2, dim=1) @ seen_colours)
    return torch.cat(found)
