"""Videos longer (or shorter) than the network's window, and more views than one call makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.diffusion.sv4d.conditioning import camera_angles
from sv4d_ns.utils.errors import InputError


class WindowStride(str, Enum):
    """How far apart the windows of a long video start (T frames each).

    FIXED: T-1, so that each window is anchored in the last frame of the one before; the last one is moved back to end
        with the video. No window twice, no frame dropped, videos shorter than T padded.
    RELEASED_T: T, as the first release of the 4-view script; its second window has no anchor from 2T frames on.
    RELEASED_T_MINUS_1: T-1, as the corrected 4-view script; repeats the last window where it already ends with the
        video.
    RELEASED_FULL_WINDOWS: T-1, as the 8-view script; frames after the last full window are not generated.
    """

    FIXED = "fixed"
    RELEASED_T = "released_t"
    RELEASED_T_MINUS_1 = "released_t_minus_1"
    RELEASED_FULL_WINDOWS = "released_full_windows"


@dataclass(frozen=True)
class Window:
    """One run of the network.

    Attributes:
        frames: the video frame of each of its T positions (the last frame repeats where the video is too short).
        anchor: index of the earlier window whose views of `frames[0]` this one is given, or None.
    """

    frames: tuple[int, ...]
    anchor: int | None

    @property
    def start(self) -> int:
        """Its first frame."""
        return self.frames[0]


def plan_windows(n_frames: int, window: int, stride_rule: WindowStride = WindowStride.FIXED) -> list[Window]:
    """The windows that cover a video, in the order in which they run; later ones overwrite earlier ones.

    Args:
        n_frames: of the video, at least 1.
        window: T, at least 2.
        stride_rule: see `WindowStride`.

    Raises:
        InputError: for lengths out of range, and where a released rule cannot process the video.
    """
    if n_frames < 1 or window < 2:
        raise InputError(f"A video of {n_frames} frames cannot be cut into windows of {window}; give 1+ and 2+ frames.")
    windows: list[Window] = []
    for start in _starts_of(n_frames, window, stride_rule):
        frames = tuple(min(frame, n_frames - 1) for frame in range(start, start + window))
        anchor = next((i for i in reversed(range(len(windows))) if start in windows[i].frames), None)
        if start > 0 and anchor is None:
            raise InputError(
                f"The window stride '{stride_rule.value}' leaves frame {start} of {n_frames} without an earlier view; "
                f"use '{WindowStride.FIXED.value}'."
            )
        # the first window is never anchored, not even where a released script runs it twice
        windows.append(Window(frames, anchor if start > 0 else None))
    return windows


def _starts_of(n: int, window: int, rule: WindowStride) -> list[int]:
    if rule is WindowStride.FIXED:
        return [0] if n <= window else [*range(0, n - window, window - 1), n - window]
    if rule is WindowStride.RELEASED_FULL_WINDOWS:
        return list(range(0, n - window + 1, window - 1))
    if n < window:
        raise InputError(
            f"The window stride '{rule.value}' needs at least {window} frames, the video has {n}; "
            f"use '{WindowStride.FIXED.value}'."
        )
    stride = window if rule is WindowStride.RELEASED_T else window - 1
    return [min(start, n - window) for start in range(0, n, stride)]


class ViewReferences(str, Enum):
    """What the calls of the first window know of each other, where a plan has more views than one call makes.

    In later windows every view is given its own picture of the window's first frame, so there is nothing to choose.

    INDEPENDENT: nothing. The views of a call lie all around the object, those of the next call between them.
    ANCHORED: the first call lies all around the object; each later one makes V - V/2 new views, neighbours of each
        other, beside V/2 finished views nearest to them, whose pictures of the first frame it is given as references.
        More calls for as many views.
    """

    INDEPENDENT = "independent"
    ANCHORED = "anchored"


@dataclass(frozen=True)
class Call:
    """One call of the network in a window.

    Attributes:
        views: the view of each of its V columns; a short call repeats its own.
        given: those among them that an earlier call of the window has made; they come as references.
    """

    views: tuple[int, ...]
    given: frozenset[int] = frozenset()

    @property
    def made(self) -> dict[int, int]:
        """The column of each view this call makes; of repeated views the first."""
        return {view: self.views.index(view) for view in self.views if view not in self.given}


def plan_calls(
    azimuths_deg: Sequence[float],
    elevations_deg: Sequence[float],
    views_per_call: int,
    references: ViewReferences = ViewReferences.INDEPENDENT,
) -> list[Call]:
    """Which views each call of the network makes, in the order in which the calls run.

    Inside a call views are in the order of their azimuths, as the models were trained.

    Args:
        azimuths_deg: of all views of the plan, any values.
        elevations_deg: of all views, strictly between -90 and 90.
        views_per_call: V.
        references: see `ViewReferences`; one view a call leaves no room for references.

    Raises:
        InputError: for fewer than one view, or lists of different length.
    """
    n = len(azimuths_deg)
    if n < 1 or n != len(elevations_deg):
        raise InputError("A view plan needs at least one view, and one elevation for each azimuth.")
    ring = sorted(range(n), key=lambda view: (azimuths_deg[view] % 360, elevations_deg[view]))
    count = -(-n // views_per_call)
    if count == 1 or views_per_call == 1 or references is ViewReferences.INDEPENDENT:
        around = [ring[first::count] for first in range(count)]
        return [Call(tuple(views[i % len(views)] for i in range(views_per_call))) for views in around]

    first = [ring[i * n // views_per_call] for i in range(views_per_call)]
    calls, known = [Call(tuple(first))], set(first)
    left = [view for view in ring if view not in known]
    angles = _angles_between(azimuths_deg, elevations_deg)
    new_per_call = views_per_call - views_per_call // 2
    for begin in range(0, len(left), new_per_call):
        new = left[begin : begin + new_per_call]
        anchors = _nearest(angles, new, known, views_per_call - len(new))
        calls.append(Call(tuple(sorted([*new, *anchors], key=ring.index)), frozenset(anchors)))
        known |= set(new)
    return calls


def _nearest(angles: Float[Tensor, "n n"], views: Sequence[int], known: set[int], count: int) -> list[int]:
    """Of the known views, first the nearest of each view in turn, then those nearest to any."""
    free = sorted(known)
    found: list[int] = []
    for wanted in [[view] for view in views] + [list(views)] * count:
        if len(found) < count:
            found.append(min(free, key=lambda other: min(angles[view, other].item() for view in wanted)))
            free.remove(found[-1])
    return found


def _angles_between(azimuths_deg: Sequence[float], elevations_deg: Sequence[float]) -> Float[Tensor, "n n"]:
    """Angle at the object between every two views, radians."""
    polar, azimuth = camera_angles(azimuths_deg, elevations_deg)
    level = polar.sin()
    directions = torch.stack([level * azimuth.cos(), level * azimuth.sin(), polar.cos()], dim=-1)
    # rounded, so that of equally near views the first in the plan is taken
    return (directions @ directions.T).clamp(-1, 1).arccos().round(decimals=6)
