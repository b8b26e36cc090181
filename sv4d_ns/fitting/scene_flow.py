"""Where points of the surface go between neighbouring frames, from the views' optical flow alone.

A limb that moves farther than it is thick gives a renderer no gradient toward its next place, and the distance to a
visual hull draws it to whichever limb is nearest. Optical flow sees it move. Every pixel of the object in every view is
put on the visual hull of its frame; the flow of all views that see that point is one displacement in space, found by
robust least squares. Our own design; the ingredients are scene flow from several cameras (Vedula et al. 1999) and dense
inverse search (Kroeger et al. 2016, as OpenCV has it). Nothing here depends on the field, so a resumed run finds
the same displacements again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.geometry.rays import project, sample_picture
from sv4d_ns.utils.devices import upload

if TYPE_CHECKING:
    from sv4d_ns.fitting.train_views import TrainView

LARGEST_SIDE = 256
"""Pixels a side of the pictures flow is found in: pictures are brought to it."""
SURFACE_POINTS = 6000
"""Pixels of a frame, all views together, that are followed."""
BORDER = 16
"""Pixels around the object that optical flow is shown."""
DEPTH_STEPS = 160
"""Samples along a ray on its way to the hull."""
VISIBILITY_SIDE = 64
"""Cells a side of the pictures of depth that tell which view sees which point."""
MEETING = 0.04
"""A view sees a point if no other is more than so far in front of it, world units."""
PIXELS = 128.0
"""Flow is judged in pixels of pictures so wide, whatever their size."""
CYCLE_PIXELS = 1.0
"""Flow there and back again that misses by so many counts 1/e."""
RESIDUAL_PIXELS = 0.7
"""Views whose flow contradicts the displacement by more than this count little."""
ROUNDS = 8
"""Of the robust least squares."""


@dataclass(frozen=True)
class Matches:
    """Points of the surface of a frame and where they are in the next one."""

    before: Float[Tensor, "m 3"]
    after: Float[Tensor, "m 3"]
    weight: Float[Tensor, " m"]
    """In [0, 1]: how well the views agree."""

    @cached_property
    def _edges(self) -> Float[np.ndarray, " m"]:
        """Running sums of the weights; fetched once, because each fetch waits for the device."""
        return self.weight.cpu().double().cumsum(0).numpy()

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
        """Some of them, by their weight: where they are before and after; none if no view knows anything."""
        edges = self._edges
        if not len(edges) or not edges[-1] > 0:
            return self.before[:0], self.after[:0]
        places = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
        pick = upload(places, self.before.device)
        return self.before[pick], self.after[pick]


def grey(rgb: Float[Tensor, "h w 3"], alpha: Float[Tensor, "h w"]) -> np.ndarray:
    """A picture for optical flow, [256, ...] of 8 bits: the object's luminance from a quarter up, on black."""
    import cv2

    luminance = (rgb - (1 - alpha[..., None])).clamp(min=0) @ rgb.new_tensor([0.299, 0.587, 0.114])
    value = 0.25 * alpha + 0.75 * luminance
    height, width = value.shape
    size = (LARGEST_SIDE, max(8, round(LARGEST_SIDE * height / width)))
    area = width > LARGEST_SIDE
    picture = (value * 255).clamp(0, 255).byte().cpu().numpy()
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if area else cv2.INTER_CUBIC)


def optical_flow(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, "h w 2"]:
    """Dense inverse search, in shares of the picture's width; zero away from the object."""
    import cv2

    flow = np.zeros((*first.shape, 2), np.float32)
    rows, columns = np.nonzero(np.maximum(first, second))
    if not len(rows):
        return flow
    part = tuple(
        slice(max(places.min() - BORDER, 0), places.max() + 1 + BORDER) for places in (rows, columns)
    )  # its cost is that of its pixels
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)
    search.setVariationalRefinementIterations(10)
    crops = (np.ascontiguousarray(picture[part]) for picture in (first, second))
    flow[part] = search.calc(*crops, None) / first.shape[1]
    return flow


class SceneFlow:
    """Displacements between neighbouring frames; each pair is worked out when it is first asked for."""

    def __init__(self, views: Sequence[TrainView], half_extent: float, seed: int = 0) -> None:
        self.views, self.half_extent, self.seed = list(views), half_extent, seed
        self._pairs: dict[tuple[int, int], Matches] = {}

    def matches(self, known: int, new: int) -> Matches:
        """Surface points of frame `known` and where they are in frame `new`."""
        if (known, new) not in self._pairs:
            self._pairs[known, new] = self._find(known, new)
        return self._pairs[known, new]

    def _uv(self, view: TrainView, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = view.alpha.shape[1:]
        uv, depth = project(x, view.c2w.to(x), view.focal, height, width)
        return uv / torch.tensor([width, height], device=x.device), depth

    def _inside(self, frame: int, x: Tensor) -> Tensor:
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for view in self.views:
            inside[inside.clone()] = (
                sample_picture(view.alpha[frame][..., None], self._uv(view, x[inside])[0])[:, 0] > 0.5
            )
        return inside

    def _surface(self, frame: int) -> tuple[Tensor, Tensor]:
        """Hull points of pixels drawn from all views, and the number of the view each is a pixel of."""
        rng = np.random.default_rng([self.seed, frame, 6])
        points, owners = [], []
        for number, view in enumerate(self.views):
            rows, columns = (view.alpha[frame] > 0.5).nonzero().cpu().numpy().T
            if not len(rows):
                continue
            pick = rng.integers(0, len(rows), SURFACE_POINTS // len(self.views))
            xy = np.stack([columns[pick], rows[pick]], -1) + rng.random((len(pick), 2))
            x = self._first_inside(frame, view, torch.from_numpy(xy).to(view.alpha))
            points.append(x)
            owners.append(torch.full((len(x),), number, device=x.device))
        if not points:
            empty = torch.zeros(0, 3, device=self.views[0].alpha.device)
            return empty, empty[:, 0].long()
        return torch.cat(points), torch.cat(owners)

    def _rays(self, view: TrainView, xy: Tensor) -> tuple[Tensor, Tensor]:
        height, width = view.alpha.shape[1:]
        local = torch.stack(
            [(xy[:, 0] - width / 2) / view.focal, (height / 2 - xy[:, 1]) / view.focal, -torch.ones_like(xy[:, 0])], -1
        )
        return view.c2w[:3, 3], local @ view.c2w[:3, :3].T

    def _first_inside(self, frame: int, view: TrainView, xy: Tensor) -> Tensor:
        """First points of the hull on the rays of pixels; rays that miss it are left out."""
        origin, directions = self._rays(view, xy)
        middle = float(origin.norm())
        reach = 1.74 * self.half_extent
        depths = torch.linspace(max(middle - reach, 0.05), middle + reach, DEPTH_STEPS, device=xy.device)
        x = origin + directions[:, None] * depths[:, None]
        inside = self._inside(frame, x.reshape(-1, 3)).view(x.shape[:2])
        hit = inside.any(1)
        return x[hit, inside[hit].int().argmax(1)]

    def _find(self, known: int, new: int) -> Matches:
        x, owner = self._surface(known)
        jacobians, flows, weights = [], [], []
        for number, view in enumerate(self.views):
            first, second = grey(view.rgb[known], view.alpha[known]), grey(view.rgb[new], view.alpha[new])
            there, back = (
                torch.from_numpy(flow).to(x) for flow in (optical_flow(first, second), optical_flow(second, first))
            )
            uv, depth = self._uv(view, x)
            flow = sample_picture(there, uv)
            aspect = flow.new_tensor([1.0, first.shape[1] / first.shape[0]])
            cycle = PIXELS * (flow + sample_picture(back, uv + flow * aspect)).norm(dim=-1)
            weights.append(torch.exp(-((cycle / CYCLE_PIXELS) ** 2)) * self._sees(view, number, owner, uv, depth))
            jacobians.append(PIXELS * self._jacobian(view, x))
            flows.append(PIXELS * flow)
        return _triangulate(x, *(torch.stack(parts, 1) for parts in (jacobians, flows, weights)))

    def _sees(self, view: TrainView, number: int, owner: Tensor, uv: Tensor, depth: Tensor) -> Tensor:
        """1 where a view sees a point, else 0: its own pixels', and those that no other point is in front of."""
        side = VISIBILITY_SIDE
        nearest = torch.full((side * side,), torch.inf, device=depth.device)
        cell = (uv * side).long().clamp(0, side - 1)
        index = cell[:, 1] * side + cell[:, 0]
        nearest.scatter_reduce_(0, index, depth, "amin")
        return ((owner == number) | (depth < nearest[index] + MEETING)).to(depth)

    def _jacobian(self, view: TrainView, x: Tensor) -> Float[Tensor, "n 2 3"]:
        """Of the projection (shares of the width) in the point."""
        rotation = view.c2w[:3, :3].to(x)
        local = (x - view.c2w[:3, 3].to(x)) @ rotation
        depth, focal = -local[:, 2], view.focal / view.alpha.shape[2]
        zero = torch.zeros_like(depth)
        right = torch.stack([focal / depth, zero, focal * local[:, 0] / depth**2], -1)
        down = torch.stack([zero, -focal / depth, -focal * local[:, 1] / depth**2], -1)
        return torch.stack([right, down], 1) @ rotation.T


def _triangulate(
    x: Float[Tensor, "n 3"],
    jacobian: Float[Tensor, "n v 2 3"],
    flow: Float[Tensor, "n v 2"],
    weight: Float[Tensor, "n v"],
) -> Matches:
    """The displacements that explain the flow of all views best: least squares, reweighted by Geman and McClure."""
    if not len(x):
        return Matches(x, x, x[:, 0])
    # so little that it only keeps a point which one view alone sees from moving along its ray
    prior = 1e-3 * torch.eye(3, device=x.device) * jacobian[:, :, 0].square().sum(-1).mean()
    current = weight
    for _ in range(ROUNDS):
        normal = torch.einsum("nv,nvki,nvkj->nij", current, jacobian, jacobian) + prior
        right = torch.einsum("nv,nvki,nvk->ni", current, jacobian, flow)
        moved = torch.linalg.solve(normal, right[..., None])[..., 0]
        missed = (torch.einsum("nvki,ni->nvk", jacobian, moved) - flow).norm(dim=-1)
        current = weight / (1 + (missed / RESIDUAL_PIXELS) ** 2) ** 2
    # 1 where two views or more see the point and all of them agree
    agreeing = current.sum(1)
    return Matches(x, x + moved, (agreeing / 2).clamp(max=1) * agreeing / weight.sum(1).clamp(min=1))
