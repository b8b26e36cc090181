"""The rays of a step. Stateless: everything follows from (seed, step) and the weights of the views, so a killed run
continues with the batches it would have seen.

"Orthogonal views" as base view plus those nearest +90, 180, 270 degrees, and the mask-aware pixel choice are our own
decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.visibility import view_weights
from sv4d_ns.fitting.schedule import ScheduleConfig, Window
from sv4d_ns.fitting.train_views import INPUT_VIEW, TrainView
from sv4d_ns.geometry.rays import pixel_rays
from sv4d_ns.utils import randomness
from sv4d_ns.utils.devices import upload
from sv4d_ns.utils.errors import InputError


def sample_frames(
    rng: np.random.Generator, count: int, window: Window, canonical: int, config: ScheduleConfig
) -> Int[np.ndarray, " count"]:
    """Frames for one step: the window's newest, one canonical now and then, the others uniform (without repetition
    among them while the window is large enough)."""
    chosen = rng.choice(window.frames, count, replace=len(window) < count)
    draw = rng.random(2)
    if draw[0] < config.frontier_probability:
        few = len(window.newest) <= count
        newest = window.newest if few else rng.choice(window.newest, count, replace=False)
        chosen[: len(newest)] = newest
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


@dataclass(frozen=True)
class BatchConfig:
    """What a step draws."""

    rays: int = 1536
    """Single rays, in addition to the patches."""
    patches: int = 4
    """Square patches for the structural loss; the first is of the input view while that alone is trusted."""
    patch_side: int = 16
    input_share: float = 0.5
    """Share of the single rays that look through the input camera, while it is the only view to be trusted."""
    frames_per_step: int = 4
    """As many as SV4D draws, and views."""
    orthogonal: bool = True
    """Whether the views of a step are a base view and those nearest to quarter turns from it; else four by chance."""
    spread: bool = False
    """Whether single rays go through any point of their pixel, not its middle: for point clouds, which would hold each
    middle many times. Their targets are the pixel's all the same."""


@dataclass(frozen=True)
class Batch:
    """n rays and their targets: the single rays first, then the patches, row by row."""

    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    times: Float[Tensor, "n 1"]
    rgb: Float[Tensor, "n 3"]
    """On `background`."""
    alpha: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    background: Float[Tensor, " 3"]
    """A new colour in every step: on a fixed one, an object of that colour might as well be transparent."""
    jitter: Float[Tensor, " n"]
    normals: Float[Tensor, "n 3"] | None
    """Estimated unit normals in world space, zero where unknown; None where there is no estimator."""
    view: Int[Tensor, " n"]
    """Number of each ray's view in the grid; 0 is the input."""
    agreeing: bool
    """Whether all views are trusted: pictures of one object."""
    frames: tuple[int, ...]
    """The frames drawn, of `n_frames`."""
    n_frames: int
    rays: int
    patches: int
    patch_side: int

    @property
    def moments(self) -> tuple[float, ...]:
        """The times of the frames drawn."""
        return tuple(frame / max(self.n_frames - 1, 1) for frame in self.frames)


class BatchSampler:
    """Draws the rays of a step: its batch follows from (seed, step) and the weights of the views."""

    def __init__(self, views: list[TrainView], config: BatchConfig, schedule: ScheduleConfig, seed: int) -> None:
        self.views, self.config, self.schedule, self.seed = views, config, schedule, seed
        self.agreeing = all(view.trusted for view in views)
        self.azimuths = [view.azimuth_deg for view in views]
        self.pixels = [PixelSampler(view.alpha) for view in views]
        self.visibility: dict[int, Tensor] = {}
        """What `update_visibility` found last for each frame, [v, s, s]; what a resumed run has to be given."""

    def with_seed(self, seed: int) -> BatchSampler:
        """The same views and weights, of which other rays are drawn."""
        other = copy(self)
        other.seed = seed
        return other

    def draw(self, step: int, window: Window, canonical: int) -> Batch:
        """The batch of a step whose frames lie in `window`; orthogonal views, most pixels near the object."""
        config = self.config
        rng = randomness.generator(self.seed, step)
        frames = sample_frames(rng, config.frames_per_step, window, canonical, self.schedule)
        turn = self._draw_views(rng)
        from_input = 0 if self.agreeing else int(config.rays * config.input_share)
        view = np.concatenate([np.full(from_input, INPUT_VIEW), np.resize(turn, config.rays - from_input)])
        frame = rng.choice(frames, config.rays)
        row, column = np.empty(config.rays, np.int64), np.empty(config.rays, np.int64)
        for number in np.unique(view):
            at = view == number
            row[at], column[at] = self.pixels[number].draw(rng, frame[at])
        patches = self._draw_patches(rng, frames, turn)
        view, frame, row, column = (
            np.concatenate([single, patch]) for single, patch in zip((view, frame, row, column), patches, strict=True)
        )
        return self._gather(step, view, frame, row, column, tuple(sorted(set(frames.tolist()))))

    def update_visibility(self, field: DeformableField, occupancy: OccupancyGrid, frame: int) -> None:
        """Weight the generated pixels of a frame by what the field's surface says of their visibility.

        Done for one frame now and then, not for every ray: the surface moves slowly.
        """
        generated = [view for view in self.views if not view.trusted]
        if not generated:
            return
        size, time = generated[0].rgb.shape[2], frame / max(generated[0].rgb.shape[0] - 1, 1)
        cameras = torch.stack([view.c2w for view in generated])
        half_width = size / 2 / generated[0].focal
        maps = view_weights(field, occupancy, self.views[INPUT_VIEW].c2w, cameras, half_width, size, time)
        self.use_visibility(frame, maps)

    def use_visibility(self, frame: int, maps: Float[Tensor, "v s s"]) -> None:
        """Weight the generated pixels of a frame by maps of their visibility, in [0, 1]."""
        generated = [view for view in self.views if not view.trusted]
        self.visibility[frame] = maps
        size = generated[0].rgb.shape[2]
        full = functional.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        for view, visibility in zip(generated, full, strict=True):
            view.weight[frame] = view.confidence[frame] * visibility

    def _draw_views(self, rng: np.random.Generator) -> list[int]:
        base = int(rng.integers(len(self.views)))
        if self.config.orthogonal:
            return orthogonal_views(self.azimuths, base)
        return rng.choice(len(self.views), min(4, len(self.views)), replace=False).tolist()

    def _draw_patches(
        self, rng: np.random.Generator, frames: Int[np.ndarray, " f"], turn: list[int]
    ) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        count, side = self.config.patches, self.config.patch_side
        first = rng.choice(turn, 1) if self.views[-1].trusted else [INPUT_VIEW]
        views = np.concatenate([first, rng.choice(turn, max(count - 1, 0))])[:count].astype(np.int64)
        chosen = rng.choice(frames, count)
        pairs = zip(views, chosen, strict=True)
        drawn = [self.pixels[view].draw_patches(rng, np.array([frame]), side) for view, frame in pairs]
        rows = np.concatenate([rows.reshape(-1) for rows, _ in drawn] or [np.empty(0, np.int64)])
        columns = np.concatenate([columns.reshape(-1) for _, columns in drawn] or [np.empty(0, np.int64)])
        return np.repeat(views, side * side), np.repeat(chosen, side * side), rows, columns

    def _gather(
        self,
        step: int,
        view: Int[np.ndarray, " n"],
        frame: Int[np.ndarray, " n"],
        row: Int[np.ndarray, " n"],
        column: Int[np.ndarray, " n"],
        frames: tuple[int, ...],
    ) -> Batch:
        count, first = len(view), self.views[0]
        device = first.rgb.device
        rgb = torch.empty(count, 3, device=device)
        alpha, weight, focal = (torch.empty(count, device=device) for _ in range(3))
        c2w, size = torch.empty(count, 4, 4, device=device), torch.empty(count, 2, device=device)
        normals = None if all(view.normals is None for view in self.views) else torch.zeros_like(rgb)
        for number in np.unique(view):
            source = self.views[number]
            at = upload(np.flatnonzero(view == number), device)
            index = tuple(upload(values[view == number], device) for values in (frame, row, column))
            rgb[at], alpha[at], weight[at] = source.rgb[index], source.alpha[index], source.weight[index]
            c2w[at], focal[at] = source.c2w, source.focal
            if normals is not None and source.normals is not None:
                normals[at] = source.normals[index]
            size[at] = upload(np.array([source.rgb.shape[2], source.rgb.shape[1]], np.float32), device)

        def uniform(stream: int, *shape: int) -> Tensor:
            return upload(randomness.uniform(self.seed, step, shape, stream), device)

        xy = upload(np.stack([column, row], -1), device).float()
        xy = xy + (uniform(5, count, 2) if self.config.spread else 0.5)
        origins, directions = pixel_rays(xy, c2w, focal, size)
        background = uniform(4, 3)
        times = upload(frame / max(first.rgb.shape[0] - 1, 1), device).float()
        return Batch(
            origins=origins,
            directions=directions,
            times=times[:, None],
            # the views are on white: exchange it behind the object
            rgb=rgb + (1.0 - alpha[:, None]) * (background - 1.0),
            alpha=alpha,
            weight=weight,
            background=background,
            jitter=uniform(1, count),
            normals=normals,
            view=upload(np.array([source.number for source in self.views])[view], device),
            agreeing=self.agreeing,
            frames=frames,
            n_frames=first.rgb.shape[0],
            rays=self.config.rays,
            patches=self.config.patches,
            patch_side=self.config.patch_side,
        )
