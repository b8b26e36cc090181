"""Which views of a grid are fitted, how far each is trusted, and what the hull and the flow are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sv4d_ns.field.occupancy import HullView, OccupancyGrid
from sv4d_ns.field.visibility import angular_weight
from sv4d_ns.fitting.scene_flow import SceneFlow
from sv4d_ns.views.grid import ViewGrid

INPUT_VIEW = 0
FLOW_VIEWS = 3
"""Trusted views it takes to follow points of the surface in space."""


@dataclass(frozen=True)
class TrainView:
    """One camera's video as the optimisation reads it."""

    number: int
    """Its place in the grid; 0 is the input."""
    azimuth_deg: float
    c2w: Float[Tensor, "4 4"]
    focal: float
    rgb: Float[Tensor, "t h w 3"]
    """sRGB on white, [0, 1]."""
    alpha: Float[Tensor, "t h w"]
    confidence: Float[Tensor, "t h w"]
    """How far a pixel is believed, 0..1: 1 in the input view, else the grid's own confidence."""
    weight: Float[Tensor, "t h w"]
    """How much a pixel counts: confidence times visibility (by angle alone until the surface is known)."""
    normals: Float[Tensor, "t h w 3"] | None
    """Estimated unit normals in world space, zero where unknown."""
    trusted: bool
    """Believed like the input: in full weight, and its silhouette as it is."""
    vote: float
    """Share of the votes it takes to carve a point this view sees as empty (1 = its word alone suffices)."""


def largest_silhouette(grid: ViewGrid) -> int:
    """The frame in which the input view sees most of the object: the canonical frame.

    What is hidden in the canonical frame cannot appear in another one (motion moves matter, it makes none), so the
    frame with the object spread out is the better start than the first one. Our choice; SV4D starts at the first.
    """
    return int(grid.input_frames[..., 3].astype(np.int64).sum((1, 2)).argmax())


AGREEMENT = 0.98
"""Share of every silhouette that the hull of the others must be able to show for views to count as true pictures:
1.00 for rendered truth, 0.78 for the worst view of a small view-predicting model's samples."""


OUTLIERS = 4
"""One view in so many novel ones may be left out because it contradicts all others."""


@lru_cache(maxsize=2)
def agreeing_views(grid: ViewGrid, leave_out: bool = True) -> frozenset[int]:
    """Numbers of the views (0 is the input) that are pictures of one object, judged by their silhouettes alone; empty
    if there is no telling.

    All of them as a rule, or (with `leave_out`) all but one in `OUTLIERS`: those that contradict the others most are
    left out, if the rest then agrees. Views whose generator itself doubts them (a grid with confidence) do not count as
    such. Our own decision: imported true views deserve the trust of the input view, and nobody should have to say so.
    """
    if grid.confidence is not None:
        return frozenset()
    c2w = torch.from_numpy(grid.plan.c2w()).float()
    pictures = [grid.input_frames, *grid.novel_views.swapaxes(0, 1)]
    silhouettes = [
        HullView(torch.from_numpy(rgba[..., 3] / np.float32(255)), camera, grid.plan.focal_px(rgba.shape[2]))
        for rgba, camera in zip(pictures, c2w, strict=True)
    ]
    occupancy, rest = OccupancyGrid(grid.num_frames), _showing_views(grid)
    for _ in range(1 + (grid.num_views // OUTLIERS if leave_out else 0)):
        shares = occupancy.agreement([silhouettes[number] for number in rest]).tolist()
        if min(shares) >= AGREEMENT:
            return frozenset(rest)
        worst = min(range(len(rest)), key=lambda place: shares[place] if rest[place] != INPUT_VIEW else math.inf)
        del rest[worst]
    return frozenset()


def _showing_views(grid: ViewGrid) -> list[int]:
    """The input view and those in which the object is to be seen in at least one frame."""
    return [INPUT_VIEW, *(1 + view for view in range(grid.num_views) if grid.novel_views[:, view, ..., 3].any())]


def views_to_fit(grid: ViewGrid, leave_out: bool = True) -> list[int]:
    """Numbers of the views the field is fitted to: those that show the object and, if there are such, agree."""
    return sorted(agreeing_views(grid, leave_out)) or _showing_views(grid)


def train_views(grid: ViewGrid, device: torch.device | str, leave_out: bool = True) -> list[TrainView]:
    """The views a grid is fitted to, the input first and in full weight, with confidence (if known) in the weights.

    Views that agree with each other (`agreeing_views`) are trusted like the input, and with `leave_out` those that
    contradict them are not among the result.
    """
    c2w = torch.from_numpy(grid.plan.c2w()).float().to(device)
    azimuths = (0.0, *grid.plan.azimuths_deg)
    agreeing = agreeing_views(grid, leave_out)
    views = []
    for number in views_to_fit(grid, leave_out):
        is_input = number == INPUT_VIEW
        trusted = is_input or number in agreeing
        rgba = grid.input_frames if is_input else np.ascontiguousarray(grid.novel_views[:, number - 1])
        values = torch.from_numpy(rgba).to(device).float() / 255.0
        alpha = values[..., 3]
        confidence = torch.ones_like(alpha)
        if grid.confidence is not None and not is_input:
            confidence = torch.from_numpy(grid.confidence[:, number - 1]).to(device).float() / 255.0
        trust = 1.0 if trusted else angular_weight(c2w[number, :3, 3], c2w[INPUT_VIEW, :3, 3])
        views.append(
            TrainView(
                number=number,
                azimuth_deg=azimuths[number],
                c2w=c2w[number],
                focal=grid.plan.focal_px(rgba.shape[2]),
                rgb=values[..., :3] * alpha[..., None] + 1.0 - alpha[..., None],
                alpha=alpha,
                confidence=confidence,
                weight=confidence * trust,
                normals=None,
                trusted=trusted,
                # generated silhouettes wander: it takes two of them to carve, a trusted one alone may
                vote=1.0 if trusted else 0.5,
            )
        )
    return views


def with_normals(views: list[TrainView], normals: Sequence[Float[np.ndarray, "t h w 3"]]) -> list[TrainView]:
    """Views with estimated normals in world space (`views.normals.estimated_normals`), given for every view of their
    grid, the input first."""
    return [replace(view, normals=torch.from_numpy(normals[view.number]).to(view.rgb.device)) for view in views]


def hull_views(views: list[TrainView]) -> list[HullView]:
    """What the occupancy grid carves its visual hull from: the silhouettes, generated ones with their gaps closed.

    Views on one ring see a slice of the object in the same row of pixels, so a seam the generator leaves in that row
    would be carved by all of them together.
    """
    return [
        HullView(view.alpha if view.vote >= 1 else closed(view.alpha), view.c2w, view.focal, view.vote)
        for view in views
    ]


def surface_flow(views: list[TrainView], half_extent: float, canonical: int) -> SceneFlow | None:
    """How the surface moves from frame to frame, outward from the canonical one, by the optical flow of the trusted
    views; None if they are too few.

    Generated views that contradict each other have no surface in common that could be followed.
    """
    trusted = [view for view in views if view.trusted]
    return SceneFlow(trusted, half_extent, canonical) if len(trusted) >= FLOW_VIEWS else None


def closed(alpha: Float[Tensor, "t h w"], radius: int = 3) -> Float[Tensor, "t h w"]:
    """Morphological closing: gaps up to 2 * `radius` pixels wide are filled, the outline stays."""
    # a border wide enough that dilation does not end at the picture's edge
    padded = functional.pad(alpha[:, None], [2 * radius] * 4)
    grown = functional.max_pool2d(padded, 2 * radius + 1, stride=1)
    return -functional.max_pool2d(-grown, 2 * radius + 1, stride=1)[:, 0]
