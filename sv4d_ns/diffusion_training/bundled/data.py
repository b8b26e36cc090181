"""Training samples of the bundled model: pictures of a moving object together with its true volume.

A sample is a function of (seed, step, its number in the batch) alone, whichever process makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage
from torch import Tensor

from sv4d_ns.diffusion.bundled.frustum import Frustum, pixel_directions, relative_poses
from sv4d_ns.diffusion.bundled.pictures import continued, premultiplied
from sv4d_ns.diffusion_training.data import draw_times
from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.training_data.procedural import TRAINING_SEEDS, creature, render
from sv4d_ns.training_data.procedural.volume import inside, surface_colours

RAY_SHARE_AT_EDGES = 0.75
"""Share of a view's rays drawn from within two pixels of its silhouette's edge."""
PATCH_SIZE = 32
"""Pixels along the side of the patches that are compared as pictures."""
SHELL_REACH = 0.08
"""Colours are asked for within this distance of the surface, world units."""


@dataclass(frozen=True)
class Sample:
    """One object at T moments seen by the input camera (first) and V others.

    Attributes:
        pictures: straight-alpha RGBA.
        c2w: OpenGL camera-to-world matrices.
        elevation_deg: of the input camera.
        occupancy: cells of the input camera's frustum that are inside the object.
        colours: sRGB of the nearest surface, on a grid of half the resolution.
        shell: cells of that grid near the surface, where `colours` is meant.
    """

    pictures: UInt8[np.ndarray, "t v+1 s s 4"]
    c2w: Float[np.ndarray, "v+1 4 4"]
    elevation_deg: float
    occupancy: Bool[np.ndarray, "t d h w"]
    colours: Float[np.ndarray, "t i j k 3"]
    shell: Bool[np.ndarray, "t i j k"]


@dataclass(frozen=True)
class Batch:
    """Samples side by side, as tensors; n = b t moments, one after the other.

    Attributes:
        frames: the input video, premultiplied RGBA in [0, 1].
        image: its straight colour, continued beyond the silhouette.
        views: RGB on white and alpha in [-1, 1].
        to_camera: from the input camera's coordinates to each view's.
        origins, directions: of the rays whose pixels are compared, in the input camera's coordinates.
        pixels: their true premultiplied RGBA.
        patch_origins, patch_directions, patch_pixels: the same of a square patch of one novel view, row by row; p is 0
            where none is compared.
    """

    frames: Float[Tensor, "b t 4 s s"]
    image: Float[Tensor, "n 3 s s"]
    elevation_deg: Float[Tensor, " b"]
    views: Float[Tensor, "b t v 4 s s"]
    to_camera: Float[Tensor, "b v 4 4"]
    origins: Float[Tensor, "n r 3"]
    directions: Float[Tensor, "n r 3"]
    pixels: Float[Tensor, "n r 4"]
    patch_origins: Float[Tensor, "n p 3"]
    patch_directions: Float[Tensor, "n p 3"]
    patch_pixels: Float[Tensor, "n p 4"]
    occupancy: Bool[Tensor, "n d h w"]
    colours: Float[Tensor, "n 3 i j k"]
    shell: Bool[Tensor, "n i j k"]

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def mirrored(batch: Batch) -> Batch:
    """The batch as a mirror beside the input camera shows it: left is right in all pictures, volumes and cameras."""
    across = torch.tensor([-1.0, 1.0, 1.0], device=batch.frames.device)
    both_ways = torch.diag(torch.cat([across, across.new_ones(1)]))
    flipped = {
        name: getattr(batch, name).flip(-1) for name in ("frames", "image", "views", "occupancy", "colours", "shell")
    }
    return replace(
        batch, to_camera=both_ways @ batch.to_camera @ both_ways, origins=batch.origins * across,
        directions=batch.directions * across, patch_origins=batch.patch_origins * across,
        patch_directions=batch.patch_directions * across, **flipped,
    )  # fmt: skip


@dataclass(frozen=True)
class BatchShape:
    """How many objects, frames and novel views a batch has, rays a picture, and whether patches are compared."""

    objects: int
    frames: int
    views: int
    rays: int
    patches: bool = False


class Source(Protocol):
    """Something that samples are drawn from."""

    def sample(self, rng: np.random.Generator, frames: int, views: int, size: int) -> Sample:
        """A random object at `frames` moments."""


def draw_cameras(rng: np.random.Generator, views: int) -> tuple[float, Float[np.ndarray, "v+1 4 4"]]:
    """Elevation of the input camera in degrees, and matrices: the input camera at azimuth 0, then the novel views.

    Most are spread around the object at the input's own elevation, as a plan asks for them; some stand anywhere.
    """
    elevation = 0.0 if rng.random() < 0.5 else rng.uniform(-10.0, 30.0)
    spread = 360.0 / (views + 1)
    azimuths = spread * (1 + np.arange(views)) + rng.uniform(-0.5, 0.5, views) * spread
    if rng.random() < 0.6:
        elevations = np.full(views, elevation)
    else:
        elevations = np.clip(elevation + rng.uniform(-30.0, 35.0, views), -30.0, 60.0)
    return elevation, look_at_cameras(np.append(0.0, azimuths), np.append(elevation, elevations))


class CreatureSource:
    """Creatures made while training; every sample is a new one."""

    def __init__(self, seeds: range = TRAINING_SEEDS):
        self.seeds = seeds

    def sample(self, rng: np.random.Generator, frames: int, views: int, size: int) -> Sample:
        elevation, c2w = draw_cameras(rng, views)
        subject = creature(int(rng.integers(self.seeds.start, self.seeds.stop)))
        times = draw_times(rng, frames)
        pictures = render(subject, times, c2w, size)
        rotations, positions = subject.poses(times)
        frustum = Frustum()
        occupancy = np.zeros((frames, size, size, size), dtype=bool)
        shells = np.zeros((frames, *(size // 2,) * 3), dtype=bool)
        colours = np.ones((*shells.shape, 3), dtype=np.float32)
        possible = frustum.in_ball(size)
        for frame in range(frames):
            pose = rotations[frame], positions[frame], subject.surface
            asked = possible & (pictures[frame, 0, ..., 3] > 0)
            occupancy[frame][asked] = inside(frustum.world_points(size, c2w[0], asked), *pose)
            shells[frame] = near = shell(occupancy[frame])
            points = frustum.world_points(size // 2, c2w[0], near)
            colours[frame][near] = surface_colours(points, SHELL_REACH, *pose, subject.lights)
        return Sample(pictures, c2w, elevation, occupancy, colours, shells)


def shell(occupancy: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "i j k"]:
    """Cells of half the resolution at the surface, and their neighbours."""
    halves = occupancy.reshape(*(n for side in occupancy.shape for n in (side // 2, 2)))
    any_inside, all_inside = halves.any((1, 3, 5)), halves.all((1, 3, 5))
    return ndimage.binary_dilation(any_inside) & ~ndimage.binary_erosion(all_inside)


def draw_pixels(rng: np.random.Generator, alpha: UInt8[np.ndarray, "v s s"], rays: int) -> Int[np.ndarray, "v r"]:
    """Numbers of the pixels that are compared in each picture: most near silhouettes, the rest anywhere."""
    at_edges = int(RAY_SHARE_AT_EDGES * rays)
    chosen = rng.integers(alpha.shape[1] * alpha.shape[2], size=(len(alpha), rays))
    for view, picture in enumerate(alpha):
        solid = picture >= 128
        edge = ndimage.binary_dilation(solid, iterations=2) & ~ndimage.binary_erosion(solid, iterations=2)
        near = np.flatnonzero(edge)
        if len(near):
            chosen[view, :at_edges] = near[rng.integers(len(near), size=at_edges)]
    return chosen


def draw_patch(rng: np.random.Generator, alpha: UInt8[np.ndarray, "v s s"]) -> tuple[int, Int[np.ndarray, " p"]]:
    """A novel view's number, and those of the pixels of a patch of it, row by row, around a pixel of the object."""
    view = int(rng.integers(1, len(alpha)))
    size = alpha.shape[1]
    solid = np.argwhere(alpha[view] >= 128)
    centre = solid[rng.integers(len(solid))] if len(solid) else np.full(2, size // 2)
    side = min(PATCH_SIZE, size)
    top, left = np.clip(centre - side // 2, 0, size - side)
    return view, (np.arange(top, top + side)[:, None] * size + np.arange(left, left + side)).reshape(-1)


def collate(rng: np.random.Generator, samples: Sequence[Sample], rays: int, patches: bool = False) -> Batch:
    """A batch of samples of equal shape, with `rays` pixels of each picture to be compared, and a patch of one."""
    pictures = np.stack([sample.pictures for sample in samples])
    b, t, v, size = pictures.shape[:4]
    values = premultiplied(pictures)
    poses = np.stack([relative_poses(sample.c2w, sample.c2w[0]) for sample in samples])
    alphas = pictures.reshape(-1, v, size, size, 4)[..., 3]
    of_moment = np.repeat(poses, t, axis=0)
    every_pixel = values.reshape(b * t, v, -1, 4)
    origins, directions, pixels = _rays(of_moment, every_pixel, np.stack([draw_pixels(rng, a, rays) for a in alphas]))
    if patches:
        view, chosen = (np.stack(drawn) for drawn in zip(*(draw_patch(rng, a) for a in alphas), strict=True))
    else:
        view, chosen = np.zeros(len(alphas), np.int64), np.zeros((len(alphas), 0), np.int64)
    moment = np.arange(len(alphas))
    patch = _rays(of_moment[moment, view][:, None], every_pixel[moment, view][:, None], chosen[:, None])
    on_white = values[:, :, 1:].copy()
    on_white[..., :3] += 1.0 - on_white[..., 3:]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    return Batch(
        frames=tensor(np.moveaxis(values[:, :, 0], -1, 2)),
        image=tensor(np.moveaxis(continued(pictures[:, :, 0]).reshape(b * t, size, size, 3), -1, 1)),
        elevation_deg=tensor(np.array([sample.elevation_deg for sample in samples])),
        views=tensor(np.moveaxis(on_white, -1, 3)) * 2.0 - 1.0,
        to_camera=tensor(np.linalg.inv(poses[:, 1:])),
        origins=tensor(origins.reshape(b * t, -1, 3)),
        directions=tensor(directions.reshape(b * t, -1, 3)),
        pixels=tensor(pixels.reshape(b * t, -1, 4)),
        patch_origins=tensor(patch[0][:, 0]),
        patch_directions=tensor(patch[1][:, 0]),
        patch_pixels=tensor(patch[2][:, 0]),
        occupancy=torch.from_numpy(np.concatenate([sample.occupancy for sample in samples])),
        colours=tensor(np.moveaxis(np.concatenate([sample.colours for sample in samples]), -1, 1)),
        shell=torch.from_numpy(np.concatenate([sample.shell for sample in samples])),
    )


def _rays(
    poses: Float[np.ndarray, "n v 4 4"], pixels: Float[np.ndarray, "n v ss 4"], chosen: Int[np.ndarray, "n v r"]
) -> tuple[Float[np.ndarray, "n v r 3"], Float[np.ndarray, "n v r 3"], Float[np.ndarray, "n v r 4"]]:
    """Origins and directions of the chosen pixels' rays in the input camera's coordinates, and what they show."""
    size = round(pixels.shape[2] ** 0.5)
    own = pixel_directions(size, FIELD_OF_VIEW_DEG).reshape(-1, 3)[chosen]
    directions = np.einsum("nvij,nvrj->nvri", poses[..., :3, :3], own)
    origins = np.broadcast_to(poses[:, :, None, :3, 3], directions.shape)
    return origins, directions, np.take_along_axis(pixels, chosen[..., None], axis=2)


def make_batch(
    seed: int, step: int, shape: BatchShape, size: int, sources: Sequence[Source], shares: Sequence[float]
) -> Batch:
    """The training batch of a step; `shares` are the probabilities of the sources and add up to 1."""
    samples = []
    for number in range(shape.objects):
        rng = np.random.default_rng([seed, step, number])
        source = sources[int(rng.choice(len(sources), p=shares))]
        samples.append(source.sample(rng, shape.frames, shape.views, size))
    return collate(np.random.default_rng([seed, step, shape.objects]), samples, shape.rays, shape.patches)
