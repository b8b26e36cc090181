"""In which order frames enter the fit, and from which frame each one's motion is found.

Motion is found from frame to frame, and its errors add up on the way. Most clips come back to where they were (loops,
a pose that is held, the way back of a gesture), and a frame is then nearer to one far away in time than to its
neighbour. Our own design; progressive frames themselves are SV4D 2.0's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional

from sv4d_ns.utils.errors import InputError

if TYPE_CHECKING:
    from sv4d_ns.fitting.train_views import TrainView

LIKENESS_SIDE = 32
"""Pixels a side of the pictures whose likeness is measured."""
PER_FRAME = 0.1
"""What a step costs beside the difference of its pictures, in the clip's median difference of neighbours."""


@dataclass(frozen=True)
class FrameOrder:
    """For each frame the one it starts from, nearer to the canonical frame, which is its own."""

    parents: tuple[int, ...]

    @classmethod
    def outward(cls, frames: int, canonical: int) -> FrameOrder:
        """Each from its neighbour in time.

        Raises:
            InputError: the canonical frame is not in the clip.
        """
        if not 0 <= canonical < frames:
            raise InputError(f"the canonical frame {canonical} is not among the clip's {frames} frames.")
        return cls(tuple(int(frame + np.sign(canonical - frame)) for frame in range(frames)))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many frames lie between each and the canonical one, itself counted: 0 for the canonical one."""
        depths = []
        for frame in range(len(self.parents)):
            depth = 0
            while self.parents[frame] != frame:
                frame, depth = self.parents[frame], depth + 1
            depths.append(depth)
        return tuple(depths)


USUAL_STEP = 75
"""Percentile of the differences of neighbours up to which any two frames are alike."""


def order_by_likeness(
    views: Sequence[TrainView], canonical: int, is_followed: Callable[[int, int], bool]
) -> FrameOrder:
    """Each frame from where the way to the canonical one is shortest: over neighbours in time, and over frames that
    look no less alike than neighbours do.

    Args:
        is_followed: whether motion can be found from a frame to one that is not its neighbour; asked of as many pairs
            as there are frames, because it costs as much as following them.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import dijkstra

    difference = _differences(views)
    frames = np.arange(len(difference))
    if len(frames) < 3:
        return FrameOrder.outward(len(frames), canonical)
    steps = difference[frames[1:], frames[:-1]]
    largest = np.maximum(np.append(steps, 0), np.append(0, steps))  # of each frame to a neighbour
    alike = np.maximum(np.minimum(largest[:, None], largest), np.percentile(steps, USUAL_STEP))
    apart = np.abs(frames[:, None] - frames)
    usable = (apart == 1) | ((apart > 1) & (difference <= alike))
    cost = difference + PER_FRAME * np.median(steps)
    tried: dict[tuple[int, int], bool] = {}
    while True:
        # a sparse matrix has edges of cost zero too: those of a pose that is held
        edges = csr_matrix((cost[usable], usable.nonzero()), cost.shape)
        parents = dijkstra(edges, indices=canonical, return_predecessors=True)[1]
        parents[canonical] = canonical
        far = [(a, b) for b, a in enumerate(parents.tolist()) if abs(a - b) > 1 and not tried.get((a, b))]
        if not far:
            return FrameOrder(tuple(parents.tolist()))
        for a, b in far:
            tried[a, b] = len(tried) < len(frames) and is_followed(a, b)
            usable[a, b] = usable[b, a] = tried[a, b]


def _differences(views: Sequence[TrainView]) -> Float[np.ndarray, "t t"]:
    """Mean absolute difference of the pictures of two frames, all views together."""
    pictures = [torch.cat([view.rgb, view.alpha[..., None]], -1).movedim(-1, 1) for view in views]
    small = torch.cat([functional.adaptive_avg_pool2d(picture, LIKENESS_SIDE).flatten(1) for picture in pictures], 1)
    return torch.cdist(small, small, p=1.0).div(small.shape[1]).double().cpu().numpy()
