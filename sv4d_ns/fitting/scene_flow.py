"""Where points of the surface go between neighbouring frames, from the views' optical flow alone.

A limb that moves farther than it is thick gives a renderer no gradient toward its next place, and the distance to a
visual hull draws it to whichever limb is nearest. Optical flow sees it move. Every pixel of the object in every view is
put on the visual hull of its frame; the flow of all views that see that point is one displacement in space, found by
robust least squares. Our own design; the ingredients are scene flow from several cameras (Vedula et al. 1999) and dense
inverse search (Kroeger et al. 2016, as OpenCV has it). Nothing here depends on the field, so a resumed run finds
the same displacements again.

Flow loses what moves or turns far between two pictures. Where views disagree for that reason, the flow is looked for
again from a guess: as the surface moved from the frame before, or as what could be followed around a place says
(`local_motion.py`). The next picture is drawn back along the guess, so that flow has only what is left to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sv4d_ns.fitting.frame_order import FrameOrder, order_by_likeness
from sv4d_ns.fitting.local_motion import locally_rigid
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
SURE = 0.6
"""Mean weight of matches from which on nothing better is looked for."""
GUESSES, GAIN = 3, 0.01
"""How often matches may become the next guess, each time better by so much mean weight than without."""
GUESS_SIDE = 128
"""Pixels a side of the picture a guess is spread in from the points that it is known at."""
GUESS_SPREAD = (1.25, 4.0, 16.0)
"""Standard deviations of the Gaussians that spread it, in those pixels; a wider one only speaks where none does yet."""


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

    @cached_property
    def confidence(self) -> float:
        """Mean weight."""
        return float(self.weight.mean()) if len(self.weight) else 0.0

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


def spread_guess(
    uv: Float[Tensor, "m 2"], guess: Float[Tensor, "m 2"], weight: Float[Tensor, " m"], height: int, width: int
) -> Float[np.ndarray, "h w 2"]:
    """A picture's flow from what it is at some places (shares of width and height): normalised convolution (Knutsson
    and Westin 1993) at several widths."""
    import cv2

    sums = np.zeros((GUESS_SIDE, GUESS_SIDE, 3), np.float32)
    column, row = (uv * GUESS_SIDE).long().clamp(0, GUESS_SIDE - 1).cpu().numpy().T
    np.add.at(sums, (row, column), torch.cat([guess * weight[:, None], weight[:, None]], 1).cpu().numpy())
    spread = sums.mean((0, 1)) * 1e-6 + 1e-12 * np.array([0, 0, 1], np.float32)
    for number, width_of in enumerate(GUESS_SPREAD):
        spread = spread + 1e-2**number * cv2.GaussianBlur(sums, (0, 0), width_of)
    return cv2.resize(spread[..., :2] / spread[..., 2:], (width, height), interpolation=cv2.INTER_LINEAR)


def guided_flow(
    first: np.ndarray, second: np.ndarray, guess: Float[np.ndarray, "h w 2"]
) -> tuple[Float[np.ndarray, "h w 2"], Float[np.ndarray, " h w"]]:
    """Optical flow near a guess, and by how much the way there and back misses; all in shares of the width."""
    import cv2

    width = first.shape[1]
    column, row = np.meshgrid(*(np.arange(side, dtype=np.float32) for side in first.shape[::-1]))

    def moved(picture: np.ndarray, flow: np.ndarray, border: int) -> np.ndarray:
        return cv2.remap(
            picture, column + width * flow[..., 0], row + width * flow[..., 1], cv2.INTER_LINEAR, borderMode=border
        )

    drawn_back = moved(second, guess, cv2.BORDER_CONSTANT)
    there, back = optical_flow(first, drawn_back), optical_flow(drawn_back, first)
    missed = there + moved(back, there, cv2.BORDER_REPLICATE)
    return there + moved(guess, there, cv2.BORDER_REPLICATE), np.linalg.norm(missed, axis=-1)


@dataclass(frozen=True)
class _Surface:
    """Points of a frame's hull, and how the views see them."""

    x: Float[Tensor, "n 3"]
    uv: list[Float[Tensor, "n 2"]]
    """In every view, shares of its width and height."""
    sees: list[Float[Tensor, " n"]]


class SceneFlow:
    """Displacements between neighbouring frames; each pair is worked out when it is first asked for.

    Args:
        views: pictures of one object.
        half_extent: of the box it lives in.
        canonical: the frame that all others are followed from.
    """

    def __init__(self, views: Sequence[TrainView], half_extent: float, canonical: int, seed: int = 0) -> None:
        self.views, self.half_extent, self.canonical, self.seed = list(views), half_extent, canonical, seed
        self._plain: dict[tuple[int, int], Matches] = {}
        self._pairs: dict[tuple[int, int], Matches] = {}

    def matches(self, known: int, new: int) -> Matches:
        """Surface points of frame `known` and where they are in frame `new`."""
        wanted: list[tuple[int, int]] = []
        pair: tuple[int, int] | None = (known, new)
        while pair is not None and pair not in self._pairs:  # no recursion: a clip may have a thousand frames
            wanted.append(pair)
            pair = self._earlier(*pair)
        for pair in reversed(wanted):
            self._pairs[pair] = self._find(*pair)
            self._plain.pop(pair, None)
        return self._pairs[known, new]

    def _earlier(self, known: int, new: int) -> tuple[int, int] | None:
        """The pair whose motion goes on in this one, if that is needed and there is one."""
        before = self.order.parents[known]
        goes_on = known - before == new - known and self._seen(known, new).confidence < SURE
        return (before, known) if goes_on else None

    @cached_property
    def order(self) -> FrameOrder:
        """From which frame each is followed."""
        return order_by_likeness(
            self.views, self.canonical, lambda known, new: self._seen(known, new).confidence >= SURE
        )

    def _seen(self, known: int, new: int) -> Matches:
        """Matches by flow alone, without a guess."""
        if (known, new) not in self._plain:
            surface = self._surface(known)
            self._plain[known, new] = self._follow(surface, known, new, torch.zeros_like(surface.x))
        return self._plain[known, new]

    def _find(self, known: int, new: int) -> Matches:
        found = self._seen(known, new)
        if found.confidence >= SURE or not len(found.before):
            return found
        surface = self._surface(known)
        guesses = [locally_rigid(surface.x, found.before, found.before, found.after, found.weight)]
        earlier_pair = self._earlier(known, new)
        if earlier_pair is not None:
            earlier = self._pairs[earlier_pair]
            guesses.append(locally_rigid(surface.x, earlier.after, earlier.before, earlier.after, earlier.weight))
        tries = [self._follow(surface, known, new, guess) for guess in guesses]
        found = max([found, *tries], key=lambda matches: matches.confidence)
        for _ in range(GUESSES):
            guess = locally_rigid(surface.x, found.before, found.before, found.after, found.weight)
            again = self._follow(surface, known, new, guess)
            if again.confidence < found.confidence + GAIN:
                break
            found = again
        return found

    def _follow(self, surface: _Surface, known: int, new: int, guess: Float[Tensor, "n 3"]) -> Matches:
        """Matches by the flow of all views, looked for around a guess of each point's displacement."""
        x = surface.x
        jacobians, flows, weights = [], [], []
        for view, uv, sees in zip(self.views, surface.uv, surface.sees, strict=True):
            first, second = (grey(view.rgb[frame], view.alpha[frame]) for frame in (known, new))
            height, width = first.shape
            expected = (self._uv(view, x + guess)[0] - uv) * uv.new_tensor([1.0, height / width])
            flow, missed = guided_flow(first, second, spread_guess(uv, expected, sees + 1e-3, height, width))
            found = sample_picture(torch.from_numpy(np.dstack([flow, missed])).to(x), uv)
            weights.append(sees * torch.exp(-((PIXELS / CYCLE_PIXELS * found[:, 2]) ** 2)))
            jacobians.append(PIXELS * self._jacobian(view, x + guess))
            flows.append(PIXELS * (found[:, :2] - expected))
        moved, weight = _triangulate(*(torch.stack(parts, 1) for parts in (jacobians, flows, weights)))
        return Matches(x, x + guess + moved, weight)

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

    def _surface(self, frame: int) -> _Surface:
        """Hull points of pixels drawn from all views; a view sees its own, and those that no other point is in front
        of."""
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
        x = torch.cat([*points, torch.zeros(0, 3, device=self.views[0].alpha.device)])
        owner = torch.cat([*owners, torch.zeros(0, dtype=torch.long, device=x.device)])
        places = [self._uv(view, x) for view in self.views]
        sees = [_sees(uv, depth, owner == number) for number, (uv, depth) in enumerate(places)]
        return _Surface(x, [uv for uv, _ in places], sees)

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

    def _jacobian(self, view: TrainView, x: Tensor) -> Float[Tensor, "n 2 3"]:
        """Of the projection (shares of the width) in the point."""
        rotation = view.c2w[:3, :3].to(x)
        local = (x - view.c2w[:3, 3].to(x)) @ rotation
        depth, focal = -local[:, 2], view.focal / view.alpha.shape[2]
        zero = torch.zeros_like(depth)
        right = torch.stack([focal / depth, zero, focal * local[:, 0] / depth**2], -1)
        down = torch.stack([zero, -focal / depth, -focal * local[:, 1] / depth**2], -1)
        return torch.stack([right, down], 1) @ rotation.T


def _sees(uv: Float[Tensor, "n 2"], depth: Float[Tensor, " n"], own: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 where a view sees a point, else 0."""
    side = VISIBILITY_SIDE
    nearest = torch.full((side * side,), torch.inf, device=depth.device)
    cell = (uv * side).long().clamp(0, side - 1)
    index = cell[:, 1] * side + cell[:, 0]
    nearest.scatter_reduce_(0, index, depth, "amin")
    return (own | (depth < nearest[index] + MEETING)).to(depth)


def _triangulate(
    jacobian: Float[Tensor, "n v 2 3"], flow: Float[Tensor, "n v 2"], weight: Float[Tensor, "n v"]
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
    """The displacements that explain the flow of all views best, and how well the views agree: least squares,
    reweighted by Geman and McClure."""
    if not len(flow):
        return flow.new_zeros(0, 3), flow.new_zeros(0)
    # so little that it only keeps a point which one view alone sees from moving along its ray
    prior = 1e-3 * torch.eye(3, device=flow.device) * jacobian[:, :, 0].square().sum(-1).mean()
    current = weight
    for _ in range(ROUNDS):
        normal = torch.einsum("nv,nvki,nvkj->nij", current, jacobian, jacobian) + prior
        right = torch.einsum("nv,nvki,nvk->ni", current, jacobian, flow)
        moved = torch.linalg.solve(normal, right[..., None])[..., 0]
        missed = (torch.einsum("nvki,ni->nvk", jacobian, moved) - flow).norm(dim=-1)
        current = weight / (1 + (missed / RESIDUAL_PIXELS) ** 2) ** 2
    # 1 where two views or more see the point and all of them agree
    agreeing = current.sum(1)
    return moved, (agreeing / 2).clamp(max=1) * agreeing / weight.sum(1).clamp(min=1)
