"""Short movies of a fitted field or its mesh: around it, through its time, beside and over the input video.

Each is a list of shots (a camera and a moment), rendered one after the other and written as H.264. A run makes all of
them when it is finished; `sv4d render` makes one of any size. A strip above the pictures says what they show.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import content_hash
from sv4d_ns.utils.images import captioned, over_white
from sv4d_ns.video.writer import write_h264
from sv4d_ns.views.grid import ViewGrid

if TYPE_CHECKING:
    from sv4d_ns.video import Clip, Framing

Preset = Literal["orbit", "time", "orbit-time", "side-by-side", "overlay"]

ELEVATION_DEG = 15.0
"""Above the input camera's height, so that an orbit shows the top."""
THREE_QUARTER_DEG = 45.0
"""Azimuth of the frozen view: a side the input video does not show."""
ORBIT_SECONDS = 3.0
ORBIT_FPS = 12.0
"""Rate of a movie in which time stands still; movies in which it passes have the clip's own."""
KEPT_COST = 0.05
"""Of a picture that need not be rendered any more, as a share of one that must."""
LONGEST_SIDE = 640
"""Pixels along the longer side of the overlay of a run: larger sources are scaled down."""


@dataclass(frozen=True)
class MovieOptions:
    """What the shots of a movie are taken with; None takes what suits the run."""

    size: int = 512
    """Pixels along the side of a rendered picture (a multiple of 2)."""
    fps: float | None = None
    """Pictures per second; None takes `ORBIT_FPS` where time stands still, else the clip's own."""
    time: float | None = None
    """Frozen moment of `orbit` in [0, 1]; None takes the canonical one."""
    azimuth_deg: float = THREE_QUARTER_DEG
    """Frozen view of `time`, relative to the input view."""
    elevation_deg: float = ELEVATION_DEG
    """Above the input view, for the presets whose camera is free."""
    seconds: float = ORBIT_SECONDS
    """Once around, where time stands still."""
    loops: int = 2
    """Times the clip passes while `orbit-time` goes once around."""


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture to be taken."""

    c2w: Float[np.ndarray, "4 4"]
    time: float
    """In [0, 1]."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A fitted field and what it was fitted to."""

    field: Any
    occupancy: Any
    grid: ViewGrid
    canonical_time: float

    @property
    def name(self) -> str:
        """Of what the pictures show."""
        return "4D field"

    def identity(self) -> str:
        """Hash of the field's numbers and of the grid: movies of the same subject are the same."""
        numbers = [p.detach().cpu().float().numpy() for p in self.field.parameters()]
        return content_hash(self.grid.content_id, *numbers)

    def render(self, shot: Shot, size: int) -> UInt8[np.ndarray, "size size 4"]:
        """One square picture, straight alpha."""
        from sv4d_ns.field.images import render_rgba

        return render_rgba(self.field, self.occupancy, shot.c2w, self.grid.plan.focal_px(size), size, shot.time)

    def render_input_view(self, frame: int, size: int) -> UInt8[np.ndarray, "size size 4"]:
        """The field at the input camera and a frame; kept, because two movies show it."""
        key = (frame, size)
        if key not in self._input_views:
            shot = Shot(self.grid.plan.c2w()[0], float(self.grid.times[frame]))
            self._input_views[key] = self.render(shot, size)
        return self._input_views[key]

    @cached_property
    def _input_views(self) -> dict[tuple[int, int], np.ndarray]:
        return {}


@dataclass(frozen=True, eq=False)
class Movie:
    """Pictures to be made one by one."""

    pictures: Callable[[], Iterator[UInt8[np.ndarray, "h w 3"]]]
    count: int
    fps: float
    input_views: tuple[tuple[int, int], ...] | None = None
    """Frame and size of each picture that is a render from the input camera, and kept; None where none is."""

    def cost(self, size: int, kept: set[tuple[int, int]]) -> list[float]:
        """What each picture takes, in renders of this size, where some renders from the input camera are kept."""
        if self.input_views is None:
            return [1.0] * self.count
        known, costs = set(kept), []
        for view in self.input_views:
            costs.append(KEPT_COST if view in known else (view[1] / size) ** 2)
            known.add(view)
        return costs


def orbit_cameras(grid: ViewGrid, count: int, elevation_deg: float) -> Float[np.ndarray, "n 4 4"]:
    """Once around at an elevation above the input view's, starting at its azimuth; the end joins the beginning."""
    azimuths = np.arange(count) * 360.0 / count
    elevation = _clear_of_poles(grid.plan.input_elevation_deg + elevation_deg)
    return look_at_cameras(azimuths, np.full(count, elevation), grid.plan.radius)


def _clear_of_poles(elevation_deg: float) -> float:
    return min(max(elevation_deg, -89.0), 89.0)


def shots(preset: Preset, subject: Subject, options: MovieOptions) -> tuple[list[Shot], float]:
    """The shots of a preset that needs nothing but the field, and their rate in pictures per second."""
    grid = subject.grid
    if preset == "orbit":
        fps = options.fps or ORBIT_FPS
        cameras = orbit_cameras(grid, max(round(options.seconds * fps), 2), options.elevation_deg)
        time = subject.canonical_time if options.time is None else options.time
        return [Shot(camera, time) for camera in cameras], fps
    moments, fps = passing(grid, options)
    if preset == "time":
        elevation = _clear_of_poles(grid.plan.input_elevation_deg + options.elevation_deg)
        camera = look_at_cameras(np.array([options.azimuth_deg]), np.array([elevation]), grid.plan.radius)[0]
        return [Shot(camera, time) for time in moments], fps
    moments = moments * options.loops
    return [
        Shot(camera, time)
        for camera, time in zip(orbit_cameras(grid, len(moments), options.elevation_deg), moments, strict=True)
    ], fps


def passing(grid: ViewGrid, options: MovieOptions) -> tuple[list[float], float]:
    """Moments in [0, 1] at which the clip passes once, at its own speed whatever the rate, and the rate."""
    if options.fps is None or grid.num_frames == 1:
        return [float(time) for time in grid.times], options.fps or grid.fps
    steps = max(round((grid.num_frames - 1) / grid.fps * options.fps), 1)
    return list(np.linspace(0, 1, steps + 1)), options.fps


def passing_frames(grid: ViewGrid, options: MovieOptions) -> tuple[list[int], float]:
    """As `passing`, with the clip's frames nearest to the moments: they repeat or are left out at another rate."""
    moments, fps = passing(grid, options)
    return [round(moment * (grid.num_frames - 1)) for moment in moments], fps


def movie(preset: Preset, subject: Subject, options: MovieOptions) -> Movie:
    """The movie of a preset.

    Raises:
        InputError: an overlay of a run whose source video cannot be had.
    """
    if preset == "side-by-side":
        return _side_by_side(subject, options)
    if preset == "overlay":
        return _overlay(subject, options)
    chosen, fps = shots(preset, subject, options)

    def pictures() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        strip = captioned([subject.name], options.size, caption_height(options.size))
        for shot in chosen:
            yield np.concatenate([strip, over_white(subject.render(shot, options.size))])

    return Movie(pictures, len(chosen), fps)


def caption_height(size: int) -> int:
    """Pixels of the strip above pictures of a size, even as H.264 needs it."""
    return 2 * max(round(size / 32), 1)


def _side_by_side(subject: Subject, options: MovieOptions) -> Movie:
    """The input video beside the field at the input camera."""
    from sv4d_ns.utils.images import resize_rgba

    grid = subject.grid
    frames, fps = passing_frames(grid, options)

    def pictures() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        names = ["input video", f"{subject.name}, same camera"]
        strip = captioned(names, 2 * options.size, caption_height(options.size))
        for frame in frames:
            given = over_white(resize_rgba(grid.input_frames[frame][None], options.size)[0])
            made = over_white(subject.render_input_view(frame, options.size))
            yield np.concatenate([strip, np.concatenate([given, made], axis=1)])

    return Movie(pictures, len(frames), fps, tuple((frame, options.size) for frame in frames))


def _overlay(subject: Subject, options: MovieOptions) -> Movie:
    """The field at the input camera, put back over the source video where the crop was taken from."""
    grid = subject.grid
    squares = source_squares(grid)
    clip = source_clip(grid, squares[0])
    scale = clip.region.scale

    # no finer than it is shown
    sizes = [min(options.size, max(math.ceil(square.side * scale), 16)) for square in squares]
    frames, fps = passing_frames(grid, options)

    def pictures() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for frame in frames:
            picture = subject.render_input_view(frame, sizes[frame])
            yield paste_in_source(over_white(clip.frames[frame]), picture, squares[frame], scale)

    return Movie(pictures, len(frames), fps, tuple((frame, sizes[frame]) for frame in frames))


def source_squares(grid: ViewGrid) -> "list[Framing]":
    """The square of the source video that each input frame shows.

    Raises:
        InputError: the grid does not say.
    """
    from sv4d_ns.video import Framing, StabilisedFraming

    if grid.framing is None:
        raise InputError("No overlay: the views were given as files, without the video they were cut from.")
    if isinstance(grid.framing.get("side"), list):
        squares = list(StabilisedFraming.from_dict(grid.framing).squares)
    else:
        squares = [Framing.from_dict(grid.framing)] * grid.num_frames
    if len(squares) != grid.num_frames:
        raise InputError(f"No overlay: the run's framing is not of its {grid.num_frames} frames.")
    return squares


def source_clip(grid: ViewGrid, square: "Framing") -> "Clip":
    """The frames of the source video that the run was made from, at most `LONGEST_SIDE` wide and high.

    Raises:
        InputError: the video is gone, or is not the one the run was made from.
    """
    from sv4d_ns.video.reader import Region, choose_frames, open_film, take

    source = Path(str(grid.provenance.get("source")))
    try:
        film = open_film(source)
        # by number, else by rate, also of pictures that were given one: whichever gives as many frames in the same time
        candidates = [(film, choose_frames(film, max_frames=grid.num_frames))]
        if grid.num_frames > 1:
            rated = film.at_rate(grid.fps)
            candidates += [(one, choose_frames(one, fps=grid.fps)) for one in (film, rated)]
        width, height = square.source_width, square.source_height
        scale = min(1.0, LONGEST_SIDE / max(width, height))
        same_size = next(film.frames({0})).shape[:2] == (height, width)
        for played, chosen in candidates:
            if same_size and len(chosen) == grid.num_frames:
                clip = take(played, chosen, Region(0, 0, width, height, width, height, scale))
                if grid.num_frames == 1 or math.isclose(clip.fps, grid.fps, rel_tol=0.02):
                    return clip
    except InputError as error:
        raise InputError(f"No overlay: {error}") from error
    raise InputError(
        f"No overlay: {source} is not the video this run was made from (another size, rate or number of frames)."
    )


def paste_in_source(
    background: UInt8[np.ndarray, "h w 3"], picture: UInt8[np.ndarray, "s s 4"], square: "Framing", scale: float
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of the crop's square over a frame of the source, where `Framing.to_source` puts it.

    Args:
        background: the frame, `scale` of its pixels for each of the source's.
        picture: straight alpha, of the whole square, of any size.
    """
    height, width = background.shape[:2]
    # from the frame's pixels to the picture's, both continuous (as Pillow's: pixel i has its centre at i + 0.5)
    ratio = len(picture) / square.size
    left, top = square.to_crop(np.zeros(2)) * ratio
    step = square.scale * ratio / scale
    # premultiplied, so that edges take no colour from empty pixels
    layer = Image.fromarray(picture).convert("RGBa")
    layer = layer.transform(
        (width, height), Image.Transform.AFFINE, (step, 0, left, 0, step, top), Image.Resampling.BILINEAR
    )
    over = np.asarray(layer.convert("RGBA"), np.float32)
    alpha = over[..., 3:] / 255
    return (over[..., :3] * alpha + background * (1 - alpha)).round().astype(np.uint8)


def write_movie(path: Path, movie: Movie, key: str, progress: Callable[[int], None]) -> None:
    """Write H.264 as a whole or not at all.

    Args:
        key: kept in the file's comment, so that a later run knows what it shows.
        progress: called with the number of pictures written.

    Raises:
        InputError: the file cannot be written.
    """
    write_h264(path, movie.pictures(), movie.fps, comment=key, on_written=progress)


def movie_key(path: Path) -> str | None:
    """What a movie written here shows; None where there is none, or it is of other origin."""
    import av

    if not path.is_file():
        return None
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment")
    except av.error.FFmpegError:
        return None


@dataclass(frozen=True, eq=False)
class PlannedMovies:
    """What is to be made for a run."""

    files: list[Path]
    """All that there will be, those that are there included."""
    wanted: list[tuple[Path, Movie, str]]
    """To be made: where, what, and its key."""
    sentences: list[str]
    """About each that cannot be made."""


def planned_movies(folder: Path, subject: Subject, presets: Iterable[Preset], options: MovieOptions) -> PlannedMovies:
    """All movies of a run; those of this subject that are there are not made again."""
    identity = subject.identity()
    plan = PlannedMovies([], [], [])
    for preset in presets:
        path, key = folder / f"{preset}.mp4", content_hash(identity, preset, options.__dict__)
        if movie_key(path) != key:
            try:
                plan.wanted.append((path, movie(preset, subject, options), key))
            except InputError as error:
                plan.sentences.append(str(error))
                continue
        plan.files.append(path)
    return plan


def write_movies(plan: PlannedMovies, size: int, progress: Progress) -> None:
    """Make what is wanted.

    Args:
        size: of the pictures that the subject is rendered at.

    Raises:
        InputError: a file cannot be written.
    """
    kept: set[tuple[int, int]] = set()
    costs = []
    for _, one, _ in plan.wanted:
        costs.append(np.cumsum([0.0, *one.cost(size, kept)]))
        kept.update(one.input_views or ())
    total, done = math.ceil(sum(cost[-1] for cost in costs)), 0.0
    for (path, one, key), cost in zip(plan.wanted, costs, strict=True):

        def show(number: int, before: float = done, cost: Float[np.ndarray, " n"] = cost) -> None:
            progress(int(before + cost[number]), total)

        write_movie(path, one, key, show)
        done += cost[-1]
    if plan.wanted:
        progress(total, total)
