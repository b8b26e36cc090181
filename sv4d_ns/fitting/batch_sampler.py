"""What each optimisation step looks at. Stateless: everything follows from (seed, step), so resuming needs no
generator state and a killed run continues with the batches it would have seen.

Progressive frame sampling and the names of the phases: SV4D section 4 and the abstract of SV4D 2.0. The schedule's
numbers, "orthogonal views" as base view plus those nearest +90, 180, 270 degrees, and the mask-aware pixel choice are
our own decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

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


def generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step; `stream` separates independent uses of the same step."""
    return np.random.default_rng([seed, step, stream])


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


@dataclass(frozen=True)
class Admission:
    """A frame that enters the window, and the neighbour it starts from."""

    new: int
    known: int


def admissions(before: Window, now: Window, canonical: int) -> list[Admission]:
    """Frames of `now` that `before` has not, nearest to the canonical frame first."""
    outward = [(f, -1) for f in range(before.first - 1, now.first - 1, -1)]
    outward += [(f, 1) for f in range(before.last + 1, now.last + 1)]
    outward.sort(key=lambda pair: abs(pair[0] - canonical))
    return [Admission(frame, frame - direction) for frame, direction in outward]


def sample_frames(
    rng: np.random.Generator, count: int, window: Window, canonical: int, config: ScheduleConfig
) -> Int[np.ndarray, " count"]:
    """Frames for one step: the window's newest, one canonical now and then, the others uniform (without repetition
    among them while the window is large enough)."""
    frames = np.arange(window.first, window.last + 1)
    chosen = rng.choice(frames, count, replace=len(frames) < count)
    draw = rng.random(2)
    if draw[0] < config.frontier_probability:
        chosen[: len(window.newest)] = window.newest[:count]
    if draw[1] < config.canonical_probability:
        chosen[-1] = canonical
    return chosen


def orthogonal_views(azimuths: Sequence[float], base: int) -> list[int]:
    """The base view and, for +90, +180 and +270 degrees from it, the nearest view not yet taken (fewer if there are
    fewer views). Azimuths in degrees."""
    taken = [base]
    for turn in (90, 180, 270):
        free = [v for v in range(len(azimuths)) if v not in taken]
        if not free:
            break
        target = azimuths[base] + turn
        taken.append(min(free, key=lambda v: (abs((azimuths[v] - target + 180) % 360 - 180), v)))
    return taken


class PixelSampler:
    """Draws pixels of a set of equally large images, mostly near the object.

    Per image the pixels within `margin` of the mask (relative to the image width) and the rest are listed once; a
    draw takes `outside_fraction` of its pixels from the rest. The weights that undo this choice are not applied: a
    background pixel far from the mask carries next to no gradient, because the hull is already carved there.
    """

    def __init__(self, alpha: Float[Tensor, "k h w"], margin: float = 0.04, outside_fraction: float = 0.08) -> None:
        if alpha.ndim != 3 or alpha.shape[0] == 0:
            raise InputError("a pixel sampler needs the masks of at least one image.")
        self.size = (alpha.shape[1], alpha.shape[2])
        self.outside_fraction = outside_fraction
        radius = max(1, round(margin * alpha.shape[2]))
        near = functional.max_pool2d((alpha.cpu() > 0.05).float()[:, None], 2 * radius + 1, 1, radius)[:, 0] > 0
        flat = near.flatten(1).numpy()
        # A stable sort puts each image's near pixels first.
        self._order = np.argsort(~flat, axis=1, kind="stable").astype(np.int32)
        self._near = flat.sum(1)

    def draw(
        self, rng: np.random.Generator, images: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """One pixel (row, column) for each given image index."""
        n_near, n_all = self._near[images], self._order.shape[1]
        outside = rng.random(len(images)) < np.where(
            n_near == 0, 1.0, np.where(n_near == n_all, 0.0, self.outside_fraction)
        )
        low, high = np.where(outside, n_near, 0), np.where(outside, n_all, n_near)
        pick = low + np.floor(rng.random(len(images)) * (high - low)).astype(np.int64)
        pixels = self._order[images, pick]
        return pixels // self.size[1], pixels % self.size[1]

    def draw_patches(
        self, rng: np.random.Generator, images: Int[np.ndarray, " n"], side: int
    ) -> tuple[Int[np.ndarray, "n side side"], Int[np.ndarray, "n side side"]]:
        """Rows and columns of one square patch per image, centred near the object and kept inside the image."""
        if side > min(self.size):
            raise InputError(f"patches of {side} pixels do not fit into images of {self.size[1]}x{self.size[0]}.")
        rows, columns = self.draw(rng, images)
        top = np.clip(rows - side // 2, 0, self.size[0] - side)
        left = np.clip(columns - side // 2, 0, self.size[1] - side)
        grid = np.arange(side)
        shape = (len(images), side, side)
        return (
            np.broadcast_to(top[:, None, None] + grid[:, None], shape),
            np.broadcast_to(left[:, None, None] + grid[None, :], shape),
        )


def uniform(seed: int, step: int, shape: Sequence[int], stream: int) -> Float[Tensor, ...]:
    """Uniform [0, 1) float32 tensor of one step."""
    return torch.from_numpy(generator(seed, step, stream).random(tuple(shape), dtype=np.float32))
