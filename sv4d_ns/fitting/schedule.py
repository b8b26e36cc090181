"""What the optimisation sees when, in fractions of the whole stage; it follows from the step alone.

Progressive frame sampling and the names of the phases: SV4D section 4 and the abstract of SV4D 2.0. The numbers are our
own decisions.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.fitting.frame_order import FrameOrder
from sv4d_ns.fitting.registration import Admission, init_frame_from_neighbour
from sv4d_ns.fitting.scene_flow import SceneFlow


@dataclass(frozen=True)
class ScheduleConfig:
    """When the optimisation sees what, in fractions of the whole stage."""

    static_fraction: float = 0.12
    """Only the canonical frame, deformation untouched (SV4D's phase A)."""
    full_window_at: float = 0.65
    """The frame window has grown to the whole clip (SV4D 2.0's progressive frame sampling)."""
    residual_from: float = 0.65
    """The density residual opens: once every frame has had its time to be explained by motion."""
    canonical_probability: float = 0.25
    """Chance that a step draws the canonical frame, so that the shape is not forgotten while the window grows."""
    frontier_probability: float = 0.9
    """Chance that a step draws the frames newest to the window, on both sides (the badly fitted ones): a frame is
    newest for a few dozen steps only, and its motion is found in these. Once the clip is whole, no frame is."""


@dataclass(frozen=True)
class Window:
    """Frames in use."""

    frames: tuple[int, ...]
    """In the order of their numbers."""
    newest: tuple[int, ...] = ()
    """Frames that came in last and are not fitted yet; none once the whole clip has had its time."""

    @classmethod
    def whole(cls, frames: int) -> Window:
        """All frames of a clip."""
        return cls(tuple(range(frames)))

    def __len__(self) -> int:
        return len(self.frames)

    def in_turn(self, number: int) -> int:
        """The frame whose turn it is when each has one after the other."""
        return self.frames[number % len(self.frames)]


def frame_order(flow: SceneFlow | None, frames: int, canonical: int) -> FrameOrder:
    """From which frame each one's motion is found: as the surface's flow says, else from its neighbour in time."""
    return FrameOrder.outward(frames, canonical) if flow is None else flow.order


def frame_window(fraction: float, order: FrameOrder, config: ScheduleConfig) -> Window:
    """Frames in use at `fraction` of the stage: only the canonical one, then those that are found from it, then those
    that are found from these, until the whole clip is in."""
    span = config.full_window_at - config.static_fraction
    grown = (fraction - config.static_fraction) / span if span > 0 else float(fraction >= config.static_fraction)
    reach = 0 if grown < 0 else 1 + math.floor(grown * max(order.depths))
    depths = list(enumerate(order.depths))
    return Window(
        frames=tuple(frame for frame, depth in depths if depth <= reach),
        newest=tuple(frame for frame, depth in depths if depth == reach and reach),
    )


def admissions(window: Window, admitted: Collection[int], order: FrameOrder) -> list[Admission]:
    """Frames of a window that are not among those `admitted` before, each after the one it starts from."""
    new = sorted(set(window.frames).difference(admitted), key=lambda frame: (order.depths[frame], frame))
    return [Admission(frame, order.parents[frame]) for frame in new]


def apply_schedule(
    field: DeformableField,
    occupancy: OccupancyGrid,
    flow: SceneFlow | None,
    schedule: ScheduleConfig,
    step: int,
    total_steps: int,
    occupancy_every: int,
) -> Window:
    """Bring field and occupancy grid to `step` of `total_steps` and return the frames in use there.

    Frames new to the field start from the motion of the one they are found from, and every `occupancy_every` steps the
    occupancy grid looks at one of the window's moments. Follows from the step alone, so a resumed run continues as it
    would have.
    """
    frames = occupancy.bins
    canonical = occupancy.nearest_bin(field.config.canonical_time)
    fraction = min(step / total_steps, 1.0)
    order = frame_order(flow, frames, canonical)
    window = frame_window(fraction, order, schedule)
    # by what the field knows, not by the window before: stage 2's views may bring another order
    for admission in admissions(window, field.admitted_frames, order):
        init_frame_from_neighbour(field, occupancy, flow, admission, step)
    if fraction >= schedule.residual_from and field.density_residual is not None:
        field.open_residual()
    if step % occupancy_every == 0:
        occupancy.update(field, window.in_turn(step // occupancy_every), torch.Generator().manual_seed(step))
    return window
