"""Training samples: each is a function of (seed, step, its number in the batch) alone, whichever process makes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.dataset import ObjectRecord, RenderedDataset, composited
from sv4d_ns.training_data.orbits import Orbit
from sv4d_ns.training_data.procedural import TRAINING_SEEDS, creature, render
from sv4d_ns.utils.errors import InputError

VIDEO_FRAMES = 21
"""Frames of a whole motion; consecutive frames of a clip are about 1/20 of it apart."""

PROCEDURAL = "procedural"
WHITE = [255, 255, 255]


@dataclass(frozen=True)
class BatchShape:
    """How many objects, frames and novel views a batch has."""

    objects: int
    frames: int
    views: int = 4


@dataclass(frozen=True)
class Place:
    """Where a rendered sample's pictures are: of which object, which frames, and which views (the input view first)."""

    source: int
    record: ObjectRecord
    orbit: Orbit
    frames: list[int]
    views: list[int]


@dataclass(frozen=True)
class Sample:
    """One object: pictures (RGBA, straight alpha) and cameras relative to the input view, degrees."""

    inputs: UInt8[np.ndarray, "t h w 4"]
    views: UInt8[np.ndarray, "t v h w 4"]
    azimuths: Float[np.ndarray, " v"]
    elevations: Float[np.ndarray, " v"]
    background: list[int]
    place: Place | None = None


@dataclass(frozen=True)
class Batch:
    """Samples side by side."""

    inputs: UInt8[np.ndarray, "b t h w 4"]
    views: UInt8[np.ndarray, "b t v h w 4"]
    azimuths: Float[np.ndarray, "b v"]
    elevations: Float[np.ndarray, "b v"]
    backgrounds: UInt8[np.ndarray, "b 3"]
    places: Sequence[Place | None]


class Source(Protocol):
    """Something that samples are drawn from."""

    def sample(self, rng: np.random.Generator, frames: int, views: int, size: int, dynamic: bool) -> Sample:
        """A random object; `dynamic` asks for a dynamic orbit where there is one."""

    @property
    def longest(self) -> int:
        """Frames of the longest clip it can give."""


def draw_cameras(
    rng: np.random.Generator, views: int
) -> tuple[float, Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """(input elevation, relative azimuths ascending in [0, 360), relative elevations), degrees.

    Our design: novel views go around the object 60 to 90 degrees apart (for 4 views) from a random start, so that both
    interleaved calls of the default eight views and the released 4-view orbit are inside the distribution. Most rings
    are at the input's own elevation, which is 0 in a good part of the samples.
    """
    elevation = 0.0 if rng.random() < 0.4 else rng.uniform(-10.0, 30.0)
    spacing = rng.uniform(60.0, 90.0) * 4 / views
    azimuths = rng.uniform(10.0, 100.0) + spacing * np.arange(views) + rng.uniform(-6.0, 6.0, views)
    relative = np.zeros(views) if rng.random() < 0.7 else rng.uniform(-20.0, 20.0, views)
    return elevation, np.sort(azimuths % 360.0), relative


def draw_times(rng: np.random.Generator, frames: int) -> Float[np.ndarray, " t"]:
    """Evenly spaced moments in [0, 1], about as far apart as the frames of a 21-frame video."""
    step = rng.uniform(0.7, 1.5) / (VIDEO_FRAMES - 1)
    step = min(step, 1.0 / max(frames - 1, 1))
    start = rng.uniform(0.0, 1.0 - step * (frames - 1))
    return start + step * np.arange(frames)


class ProceduralSource:
    """Creatures made while training; every sample is a new one."""

    longest = VIDEO_FRAMES

    def sample(self, rng: np.random.Generator, frames: int, views: int, size: int, dynamic: bool) -> Sample:
        subject = creature(int(rng.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop)))
        elevation, azimuths, relative = draw_cameras(rng, views)
        cameras = look_at_cameras(np.append(0.0, azimuths), elevation + np.append(0.0, relative))
        pictures = render(subject, draw_times(rng, frames), cameras, size)
        return Sample(pictures[:, 0], pictures[:, 1:], azimuths, relative, WHITE)


class RenderedSource:
    """Objects of a folder made by `sv4d data render` (and sorted out by `sv4d data curate`, where that was run).

    Any view can be the input; the novel views are the nearest ones to an even ring from a random start.

    Raises:
        InputError: on construction, when the folder holds no rendered data.
    """

    def __init__(self, path: Path, number: int, read_pictures: bool = True):
        self.dataset = RenderedDataset(path)
        self.number = number
        self.read_pictures = read_pictures

    @property
    def longest(self) -> int:
        return max(record.frames for record in self.dataset.records)

    def sample(self, rng: np.random.Generator, frames: int, views: int, size: int, dynamic: bool) -> Sample:
        records = [record for record in self.dataset.records if record.frames >= frames and record.views > views]
        if not records:
            raise InputError(
                f"{self.dataset.path} has no object with {frames} frames and more than {views} views: render it with "
                "more, or train with fewer."
            )
        record = records[int(rng.integers(len(records)))]
        wanted = Orbit.DYNAMIC if dynamic else Orbit.STATIC
        orbit = wanted if wanted.value in record.orbits else Orbit(next(iter(record.orbits)))
        azimuths, elevations = record.cameras(orbit)
        first = int(rng.integers(record.views))
        chosen = even_ring(rng, (azimuths - azimuths[first]) % 360.0, first, views)
        start = int(rng.integers(record.frames - frames + 1))
        place = Place(self.number, record, orbit, list(range(start, start + frames)), [first, *chosen])
        if self.read_pictures:
            pictures = resized(self.dataset.pictures(record, orbit, place.frames, place.views), size)
        else:
            pictures = np.zeros((frames, views + 1, 1, 1, 4), dtype=np.uint8)
        return Sample(
            pictures[:, 0], pictures[:, 1:], (azimuths[chosen] - azimuths[first]) % 360.0,
            elevations[chosen] - elevations[first], record.background, place,
        )  # fmt: skip


def even_ring(rng: np.random.Generator, relative: Float[np.ndarray, " v"], first: int, views: int) -> list[int]:
    """Indices of `views` cameras about evenly spaced from a random start, none of them `first`, azimuths ascending."""
    free = [index for index in range(len(relative)) if index != first]
    chosen: list[int] = []
    for target in (rng.uniform(0.0, 360.0) + 360.0 * np.arange(views) / views) % 360.0:
        gap = [abs((relative[index] - target + 180.0) % 360.0 - 180.0) for index in free]
        chosen.append(free.pop(int(np.argmin(gap))))
    return sorted(chosen, key=lambda index: relative[index])


def resized(pictures: UInt8[np.ndarray, "t v h w 4"], size: int) -> UInt8[np.ndarray, "t v s s 4"]:
    """Square RGBA pictures at another size; colours are averaged with their alpha as weight."""
    if pictures.shape[2] == size:
        return pictures
    out = np.empty((*pictures.shape[:2], size, size, 4), dtype=np.uint8)
    for index in np.ndindex(pictures.shape[:2]):
        # "RGBa" is PIL's premultiplied form
        picture = Image.fromarray(pictures[index], "RGBA").convert("RGBa")
        out[index] = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3).convert("RGBA"))
    return out


def open_sources(data: Sequence[str], read_pictures: bool = True) -> list[Source]:
    """What the names stand for: `procedural`, or folders of rendered data.

    Raises:
        InputError: when one cannot be read.
    """
    if not data:
        raise InputError("--data names nothing to train on: give 'procedural' or folders of rendered data.")
    return [
        ProceduralSource() if name == PROCEDURAL else RenderedSource(Path(name), number, read_pictures)
        for number, name in enumerate(data)
    ]


def make_batch(
    seed: int,
    step: int,
    shape: BatchShape,
    size: int,
    sources: Sequence[Source] | None = None,
    dynamic_share: float = 0.0,
    part: slice = slice(None),
) -> Batch:
    """The training batch of a step, or a part of it.

    Args:
        seed, step: what all random choices depend on, beside a sample's number in the batch.
        shape: of the whole batch.
        size: pixels per side.
        sources: drawn from with equal probability; creatures by default.
        dynamic_share: probability of a dynamic orbit.
        part: which samples of the batch to make.
    """
    sources = sources or [ProceduralSource()]
    samples = []
    for number in range(*part.indices(shape.objects)):
        rng = np.random.default_rng([seed, step, number])
        source = sources[int(rng.integers(len(sources)))]
        samples.append(source.sample(rng, shape.frames, shape.views, size, bool(rng.random() < dynamic_share)))
    return Batch(
        np.stack([sample.inputs for sample in samples]),
        np.stack([sample.views for sample in samples]),
        np.stack([sample.azimuths for sample in samples]),
        np.stack([sample.elevations for sample in samples]),
        np.array([sample.background for sample in samples], dtype=np.uint8),
        [sample.place for sample in samples],
    )


def to_model_images(
    pictures: UInt8[np.ndarray, "... h w 4"], channels: int = 4, background: Sequence[int] = WHITE
) -> Float[Tensor, "... c h w"]:
    """What an autoencoder of 4 channels sees: RGB on white and alpha; one of 3 channels: RGB on the background.

    Values in [-1, 1].
    """
    if channels == 3:
        values = torch.from_numpy(composited(pictures, list(background))).float() / 255.0
        return values.movedim(-1, -3) * 2.0 - 1.0
    values = torch.from_numpy(pictures).float() / 255.0
    colour, alpha = values[..., :3], values[..., 3:]
    images = torch.cat([colour * alpha + (1.0 - alpha), alpha], dim=-1) * 2.0 - 1.0
    return images.movedim(-1, -3)


def batch_images(batch: Batch, channels: int) -> tuple[Float[Tensor, "b t c h w"], Float[Tensor, "b t v c h w"]]:
    """Input frames and novel views of a batch as an autoencoder takes them."""
    made = [
        (to_model_images(inputs, channels, background), to_model_images(views, channels, background))
        for inputs, views, background in zip(batch.inputs, batch.views, batch.backgrounds.tolist(), strict=True)
    ]
    return torch.stack([inputs for inputs, _ in made]), torch.stack([views for _, views in made])
