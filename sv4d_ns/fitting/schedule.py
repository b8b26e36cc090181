"""What the optimisation sees when, in fractions of the whole stage; it follows from the step alone.

Progressive frame sampling and the names of the phases: SV4D section 4 and the abstract of SV4D 2.0. The numbers are our
own decisions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.fitting.registration import Admission, init_frame_from_neighbour
from sv4d_ns.fitting.scene_flow import SceneFlow
from sv4d_ns.utils.errors import InputError


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
    """Inclusive range of frames."""

    first: int
    last: int
    newest: tuple[int, ...] = ()
    """Frames that came in last and are not fitted yet; none once the whole clip has had its time."""

    def __len__(self) -> int:
        return self.last - self.first + 1


def frame_window(fraction: float, n_frames: int, canonical: int, config: ScheduleConfig) -> Window:
    """Frames in use at `fraction` of the stage: only `canonical`, then growing evenly to both sides until the whole
    clip is in. A side that reaches its end waits for the other."""
    if not 0 <= canonical < n_frames:
        raise InputError(f"the canonical frame {canonical} is not among the clip's {n_frames} frames.")
    span = config.full_window_at - config.static_fraction
    grown = (fraction - config.static_fraction) / span if span > 0 else float(fraction >= config.static_fraction)
    reach = 0 if grown < 0 else 1 + math.floor(grown * max(canonical, n_frames - 1 - canonical))
    first, last = canonical - reach, canonical + reach
    newest = tuple(frame for frame in (first, last) if 0 <= frame < n_frames and reach)
    return Window(max(first, 0), min(last, n_frames - 1), newest)


def admissions(before: Window, now: Window, canonical: int) -> list[Admission]:
    """Frames of `now` that `before` has not, nearest to the canonical frame first."""
    outward = [(f, -1) for f in range(before.first - 1, now.first - 1, -1)]
    outward += [(f, 1) for f in range(before.last + 1, now.last + 1)]
    outward.sort(key=lambda pair: abs(pair[0] - canonical))
    return [Admission(frame, frame - direction) for frame, direction in outward]


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

    Frames new to the window start from their neighbour's motion, and every `occupancy_every` steps the occupancy grid
    looks at one of the window's moments. Follows from the step alone, so a resumed run
    continues as it would have.
    """
    frames = occupancy.bins
    canonical = occupancy.nearest_bin(field.config.canonical_time)
    fraction = min(step / total_steps, 1.0)
    window = frame_window(fraction, frames, canonical, schedule)
    if step > 0:
        before = frame_window(min((step - 1) / total_steps, 1.0), frames, canonical, schedule)
        for admitted in admissions(before, window, canonical):
            init_frame_from_neighbour(field, occupancy, flow, admitted, step)
    if fraction >= schedule.residual_from and field.density_residual is not None:
        field.open_residual()
    if step % occupancy_every == 0:
        frame = window.first + step // occupancy_every % len(window)
        occupancy.update(field, frame, torch.Generator().manual_seed(step))
    return window
