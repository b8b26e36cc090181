"""Any moving picture becomes a `Clip`: RGBA frames as they are meant to be seen, and their rate."""

import itertools
import math
import shlex
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError, features

from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.damage import is_cut_short
from sv4d_ns.video.hdr import Gamut, Transfer, from_gamut, tone_map
from sv4d_ns.video.pictures import (
    DeepPicture,
    LevelRange,
    deep_levels,
    is_deep,
    level_range,
    read_tiff,
    rgba,
    rgba_of_deep,
)
from sv4d_ns.video.sources import (
    FILM_SUFFIXES,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    check_no_run,
    check_one_series,
    is_pattern,
    local_path,
    source_files,
    what_it_is,
)
from sv4d_ns.video.timing import in_order

ANIMATION_FORMATS = ("GIF", "PNG", "WEBP", "JPEG", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
"""What Pillow is asked to open. The video-like formats it also knows are left to FFmpeg."""

_PICTURE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on damaged pictures (found by feeding it some thousand of them)."""

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,ogg,asf,h264,hevc,m4v,ivf,nut,gif,apng"
"""FFmpeg demuxers allowed to open a file. Play lists and scripts, which name other files, are not among them."""

FOLDER_FPS = 10.0
"""Frame rate of image folders, which carry none: the rate the released SV4D 2.0 scripts write."""
ASSUMED = (
    f"Pictures carry no frame rate; {FOLDER_FPS:g} frames per second are assumed (another one: "
    "--pipeline.datamanager.fps)."
)

EVEN_FPS = 30
"""Frames a second, at most, to which a user is told to bring a film of uneven rate."""
SPARSE_FPS = 4.0
"""A step takes a third to half a second: with fewer frames a second than this, legs change places unseen."""

SHORTEST_DELAY_MS = 10
DEFAULT_DELAY_MS = 100
"""Animations whose delay is missing or at most 10 ms play at 100 ms a frame, as in every browser."""

CONVERSION = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
"""How FFmpeg makes RGB of YUV. Its default is fast but shifts colours: against the exact pictures of four benchmark
clips its mean absolute error on the object is 3.27 of 255 levels, green 1.3 to 2.0 levels too dark; with these flags
2.68, green within 0.4 (what remains is H.264's own loss)."""

_BT709_FROM_HEIGHT = 577
_BT709_FROM_WIDTH = 1280
"""Untagged video at least this large is taken as BT.709, smaller as BT.601, as common players do."""

_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
"""FFmpeg's numbers for the matrix of a YUV frame (ISO/IEC 23091-2) as its scale filter names them."""

DISPLAY_MATRIX = SideDataType.DISPLAYMATRIX

_FULL_RANGE = 2
_MOST_OBLONG = 4
"""Pixels said to be wider or taller than this are a damaged header: real video stays below 2.5."""

_HDR_TRANSFERS: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
_WIDE_GAMUTS: dict[int, Gamut] = {9: "BT.2020", 12: "Display P3"}
"""FFmpeg's numbers for transfer curves and primaries (ISO/IEC 23091-2)."""

CLIP_PIXELS = 64_000_000
"""Pixels a clip holds at most over all its frames (256 MB): larger footage is scaled down as it is read. Full HD stays
as it is up to 30 frames. The crop around the object is smaller still, and is read again where that shows more."""


@dataclass(frozen=True)
class Region:
    """The part of the source pictures a clip shows, and its scale.

    Coordinates are continuous, as in `Framing`: clip pixel x shows the source at left + x / scale.
    """

    left: int
    top: int
    width: int
    height: int
    """Source pixels."""
    source_width: int
    source_height: int
    scale: float = 1.0
    """Clip pixels for each source pixel, at most 1."""

    @classmethod
    def whole(cls, width: int, height: int) -> "Region":
        """All of a picture, unscaled."""
        return cls(0, 0, width, height, width, height)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the clip's frames."""
        return max(int(self.height * self.scale), 1), max(int(self.width * self.scale), 1)

    def take(self, picture: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "h w 4"]:
        """This part of a source picture, scaled down by averaging (colours weighted by alpha)."""
        part = picture[self.top : self.top + self.height, self.left : self.left + self.width]
        if self.scale == 1:
            return part
        height, width = self.shape
        image = Image.fromarray(part)
        opaque = part[..., 3].min() == 255
        image = image if opaque else image.convert("RGBa")
        box = (0, 0, min(width / self.scale, self.width), min(height / self.scale, self.height))
        image = image.resize((width, height), Image.Resampling.BOX, box=box)
        return np.asarray(image if opaque else image.convert("RGBA"))


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one size, at a constant rate.

    `frames` are sRGB with straight alpha (255 everywhere if the file has none), upright (rotation flags applied)
    and with square pixels. `messages` say in a sentence each what the reader decided about the file.
    """

    frames: UInt8[np.ndarray, "t h w 4"]
    fps: float
    source: str
    """The path the frames were read from."""
    has_alpha: bool
    """True if some pixel is not opaque."""
    messages: tuple[str, ...] = ()
    shown: Region | None = None
    """What part of the source pictures the frames show; None for all of it, unscaled."""

    @property
    def region(self) -> Region:
        """What part of the source pictures the frames show."""
        return self.shown or Region.whole(self.frames.shape[2], self.frames.shape[1])


@dataclass(frozen=True)
class Film:
    """An opened source: the time of every frame, and a way to walk through the frames once more."""

    path: Path
    times: list[float]
    """Seconds, one for each frame, in order of appearance."""
    nominal_fps: float | None
    """The rate the file states, if it does."""
    frames: Callable[[set[int]], Iterator[np.ndarray]]
    """Yields the RGBA pictures of the given frame indices, in order; nothing else is converted or kept."""
    messages: tuple[str, ...] = ()
    is_rated: bool = True
    """Whether the source says when its frames are shown; for pictures a rate is assumed."""

    def at_rate(self, fps: float | None) -> "Film":
        """Pictures at the rate the user gives; any other film, and no rate, change nothing."""
        if self.is_rated or fps is None or not (math.isfinite(fps) and fps > 0):
            return self
        times = [index / fps for index in range(len(self.times))]
        messages = tuple(message for message in self.messages if message != ASSUMED)
        return replace(self, times=times, nominal_fps=fps, messages=messages, is_rated=True)


def read_clip(path: Path, max_frames: int | None = None, fps: float | None = None) -> Clip:
    """Read a video, an animated picture, a folder of pictures or a pattern such as `shots/*.png`.

    Args:
        path: mp4, mov, webm, avi, mkv and whatever else FFmpeg plays; gif, apng, webp (with alpha); a folder or a
            pattern inside one folder, in natural order (2 before 10) and at 10 frames per second.
        max_frames: keep at most so many frames, evenly spaced in time; the rate adapts and a message says so. 1 is
            allowed: the first frame, for a model that does not move.
        fps: keep so many frames a second instead. Frames that are not kept are never held in memory. Pictures, which
            carry no rate, are all kept and have this one.

    Raises:
        InputError: the path is missing, unreadable, not a moving picture, damaged, has one frame where more than one
            was asked for, holds pictures of different sizes, or both or senseless numbers of frames were given.
    """
    film = open_film(path).at_rate(fps)
    return take(film, choose_frames(film, max_frames, fps))


def choose_frames(film: Film, max_frames: int | None = None, fps: float | None = None) -> list[int]:
    """The indices `read_clip` keeps; raises `InputError` as it does."""
    if max_frames is not None and fps is not None:
        raise InputError("Both a number of frames and a frame rate are given: give one of them.")
    if max_frames is not None and max_frames < 1:
        raise InputError(f"At most {max_frames} frames were asked of {film.path}: ask for 1 or more.")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise InputError(f"{fps:g} frames per second were asked of {film.path}: ask for a rate above 0.")
    if not film.times:
        raise InputError(f"{film.path} has no frame: give a video of at least 2 frames, in which the object moves.")
    if max_frames == 1:
        return [0]
    if len(film.times) < 2:
        raise InputError(
            f"{film.path} has only one frame: give a video of at least 2 frames, in which the object moves, or ask for "
            "1 frame (--pipeline.datamanager.max-frames 1) to make a model that stands still."
        )
    if fps is None:
        return _evenly_spaced(film.times, max_frames)
    chosen = _at_rate(film.times, fps)
    if len(chosen) < 2:
        raise InputError(
            f"{film.path} lasts {film.times[-1] - film.times[0]:.2g} s, which gives one frame at {fps:g} frames per "
            "second: ask for a higher rate."
        )
    return chosen


def take(film: Film, chosen: list[int], region: Region | None = None) -> Clip:
    """The chosen frames of a film: its whole pictures, or a region of them; scaled down to fit `CLIP_PIXELS`.

    Raises:
        InputError: a frame is damaged, or the pictures have different sizes.
    """
    messages = list(film.messages)
    name = film.path.name
    times = [film.times[index] for index in chosen]
    fps = _rate(times, film.nominal_fps)
    # of a film at one rate the frames that are kept lie a frame beside even times at most
    uneven = len(chosen) > 2 and _irregular(film.times) and _irregular(times)
    if len(chosen) < len(film.times):
        kept = f"Kept {len(chosen)} of {len(film.times)} frames of {name}{'' if uneven else ', evenly spaced in time'}"
        sparse = (
            f": only {fps:.2g} a second, too few for quick motion; cut the film shorter or keep more of it "
            "(--pipeline.datamanager.max-frames or --pipeline.datamanager.fps)."
        )
        messages.append(kept + (sparse if len(chosen) > 1 and fps < SPARSE_FPS else "."))
    if uneven:
        fastest = min(round(1 / float(np.diff(film.times).min())), EVEN_FPS)
        messages.append(
            f"{name} has a variable frame rate, and its frames are treated as evenly spaced in time: where they are "
            "close together it plays slower than it was, elsewhere faster. "
            f"'ffmpeg -i {name} -vf fps={max(fastest, 1)} even.mp4' makes the rate even."
        )
    frames, region = _stack(film.frames(set(chosen)), len(chosen), film.path, region)
    transparent = any(bool((frame[..., 3] < 255).any()) for frame in frames)
    return Clip(frames, fps, str(film.path), transparent, tuple(messages), region)


def open_film(path: Path) -> Film:
    """Open a source and walk through it once, to know that it is whole and when its frames are shown.

    Raises:
        InputError: it is missing, unreadable, not a moving picture, or damaged.
    """
    path = Path(path)
    try:
        return _open(local_path(path))
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long, links in a circle
        place = error.filename if isinstance(error.filename, str) and len(error.filename) < 200 else path.name[:100]
        raise InputError(f"{place} cannot be read ({error.strerror}): check the path and its permissions.") from error


def _open(path: Path) -> Film:
    if path.is_dir():
        pictures = source_files(path)
        check_no_run(path)
        if not pictures:
            raise InputError(_no_pictures(path))
        return _open_pictures(path, pictures)
    if is_pattern(path):
        pictures = source_files(path)
        if not pictures:
            raise InputError(f"No file matches {path}: check the pattern.")
        films = [found for found in pictures if found.suffix.lower() in FILM_SUFFIXES - IMAGE_SUFFIXES]
        if films:
            raise InputError(f"{path} stands for pictures and matches {_give_the_film(films, 'pattern')}")
        return _open_pictures(path, pictures)
    if not path.exists():
        link = f" (it is a link to {path.readlink()})" if path.is_symlink() else ""
        raise InputError(f"{path} does not exist{link}: check the path of the video.")
    if not path.is_file():
        raise InputError(f"{path} is not a file or folder of pictures (but a device or pipe): save the video first.")
    try:
        head = _head(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if not head:
        raise InputError(f"{path} is an empty file: download or export it again.")
    try:
        with Image.open(path, formats=ANIMATION_FORMATS):
            pass
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large a picture ({error}): scale it down.") from error
    except (OSError, SyntaxError):
        return _open_video(path, head)
    return _open_animation(path)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _no_pictures(folder: Path) -> str:
    films = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in FILM_SUFFIXES and entry.is_file())
    if films:
        return f"The folder {folder} has no pictures but {_give_the_film(films, 'folder')}"
    others = sorted({entry.suffix.lower() for entry in folder.iterdir() if entry.is_file() and entry.suffix})
    found = f" (it has {', '.join(others[:5])})" if others else ""
    return f"The folder {folder} has no pictures{found}: put numbered png, jpg, tif or webp files in it."


def _give_the_film(films: list[Path], given: str) -> str:
    if len(films) == 1:
        return f"a film: give the film itself, {films[0]}."
    which = f"give one of them, {films[0]} for one, or the {given} to 'sv4d batch', which makes an asset of each."
    return f"{len(films)} films: {which}"


# --- choosing frames -------------------------------------------------------------------------------------------------


def _evenly_spaced(times: list[float], max_frames: int | None) -> list[int]:
    """Indices of the frames nearest to `max_frames` evenly spaced times, all different, first and last included."""
    count = len(times)
    if max_frames is None or count <= max_frames:
        return list(range(count))
    starts = np.asarray(times)
    nearest = np.array([np.abs(starts - wanted).argmin() for wanted in np.linspace(times[0], times[-1], max_frames)])
    # where the rate varies two times may want one frame: move the later ones on, leaving room for those to come
    for k in range(max_frames):
        lowest = nearest[k - 1] + 1 if k else 0
        nearest[k] = min(max(nearest[k], lowest), count - max_frames + k)
    return nearest.tolist()


def _at_rate(times: list[float], fps: float) -> list[int]:
    """Indices of the frames shown at 0, 1/fps, 2/fps ... seconds, each once."""
    starts = np.asarray(times)
    end = times[-1] + float(np.median(np.diff(starts))) - 1e-3  # the last frame stays on the screen too
    # a frame is kept if such a moment falls between its start and the next one's, with half a millisecond for rounded
    # time stamps; counting the moments before each start needs no list of them, however many a rate makes
    before = np.ceil((np.append(starts, end + 5e-4) - 5e-4 - times[0]) * fps).clip(0)
    return np.flatnonzero(np.diff(before) > 0).tolist()


def _rate(times: list[float], nominal_fps: float | None) -> float:
    """Frames per second over the whole span; the stated rate where the time stamps only round it."""
    span = times[-1] - times[0]
    if not span > 0:
        return nominal_fps or FOLDER_FPS
    measured = (len(times) - 1) / span
    return nominal_fps if nominal_fps and abs(measured / nominal_fps - 1) < 0.01 else measured


def _irregular(times: list[float]) -> bool:
    intervals = np.diff(times)
    return bool(np.abs(intervals - intervals.mean()).max() > 0.25 * intervals.mean())


def _stack(
    pictures: Iterator[np.ndarray], count: int, path: Path, region: Region | None
) -> tuple[UInt8[np.ndarray, "t h w 4"], Region]:
    frames: np.ndarray | None = None
    size: tuple[int, ...] = ()
    for index, picture in enumerate(pictures):
        if frames is None:
            size = picture.shape
            region = _within_budget(region or Region.whole(size[1], size[0]), count)
            frames = np.empty((count, *region.shape, 4), np.uint8)
        if picture.shape != size:
            raise InputError(
                f"{path} changes size from {size[1]}x{size[0]} to {_size(picture)} on the way: "
                "export it with one size for all frames."
            )
        assert region is not None
        frames[index] = region.take(picture)
    assert frames is not None and region is not None  # a frame or more is asked for; readers raise when they run out
    return frames, region


def _within_budget(region: Region, count: int) -> Region:
    most = math.sqrt(CLIP_PIXELS / (count * region.width * region.height))
    return replace(region, scale=min(region.scale, most, 1.0))


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


# --- pictures and animated pictures ----------------------------------------------------------------------------------


def _open_pictures(source: Path, paths: list[Path]) -> Film:
    check_one_series(source, paths)
    levels, messages = _levels_of_files(paths)

    def frames(chosen: set[int]) -> Iterator[np.ndarray]:
        first: np.ndarray | None = None
        for index in sorted(chosen):
            picture = _read_picture(paths[index], levels)
            first = picture if first is None else first
            if picture.shape != first.shape:
                raise InputError(
                    f"{paths[index]} is {_size(picture)} but {paths[0].name} is {_size(first)}: "
                    "give pictures of one size."
                )
            yield picture

    times = [index / FOLDER_FPS for index in range(len(paths))]
    return Film(source, times, FOLDER_FPS, frames, (ASSUMED, *messages), is_rated=False)


def _levels_of_files(paths: list[Path]) -> tuple[LevelRange, tuple[str, ...]]:
    """What is black and white in the deep ones among pictures, and what to say of it."""
    deep = (levels for path in paths if (levels := _deep_picture(path)) is not None)
    return _levels(deep, paths[0].name)


def _levels(deep: Iterator[DeepPicture], name: str) -> tuple[LevelRange, tuple[str, ...]]:
    first = next(deep, None)
    if first is None:
        return LevelRange(0, 256), ()
    levels = level_range(itertools.chain([first], deep))
    return levels, (
        f"{name} and its like have more than 8 bits: {levels.low:g} is shown as black, {levels.high:g} as white.",
    )


def _deep_picture(path: Path) -> DeepPicture | None:
    """The levels of a picture of more than 8 bits; None for any other."""
    with _named_in_errors(path), _opened(path) as image:
        if image is None:
            return read_tiff(path)
        return deep_levels(image) if is_deep(image) else None


def _read_picture(path: Path, levels: LevelRange) -> UInt8[np.ndarray, "h w 4"]:
    with _named_in_errors(path), _opened(path) as image:
        if image is None:
            return rgba_of_deep(read_tiff(path), levels)
        return rgba_of_deep(deep_levels(image), levels) if is_deep(image) else rgba(image)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image | None]:
    """A picture as Pillow opens it; None for a TIFF that it cannot."""
    try:
        image = Image.open(path, formats=ANIMATION_FORMATS)
    except UnidentifiedImageError:
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise
        yield None
        return
    with image:
        yield image


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _PICTURE_ERRORS as error:
        reason = what_it_is(_head(path))
        if reason is not None:
            raise InputError(f"{path} is not a picture but {reason}.") from error
        raise InputError(f"{path} cannot be read as a picture ({error}): export it again.") from error


def _open_animation(path: Path) -> Film:
    times: list[float] = []

    def deep_frames() -> Iterator[DeepPicture]:
        time = 0.0
        for image in _walk_animation(path):
            times.append(time)
            delay = float(image.info.get("duration", 0))
            time += (delay if delay > SHORTEST_DELAY_MS else DEFAULT_DELAY_MS) / 1000
            if is_deep(image):
                yield deep_levels(image)

    levels, messages = _levels(deep_frames(), path.name)

    def frames(chosen: set[int]) -> Iterator[np.ndarray]:
        for index, image in enumerate(_walk_animation(path)):
            if index in chosen:
                yield rgba_of_deep(deep_levels(image), levels) if is_deep(image) else rgba(image)

    return Film(path, times, None, frames, messages)


def _walk_animation(path: Path) -> Iterator[Image.Image]:
    """Every frame of an animated picture, decoded; the same image object each time."""
    index = 0
    try:
        with Image.open(path, formats=ANIMATION_FORMATS) as image:
            # an APNG may open with a still for old viewers that is no part of the animation
            first = 1 if getattr(image, "default_image", False) else 0
            for index in range(first, getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()
                yield image
    except _PICTURE_ERRORS as error:
        raise InputError(f"{path} is damaged after frame {index} ({error}): export it again.") from error


# --- video -----------------------------------------------------------------------------------------------------------


def _open_video(path: Path, head: bytes) -> Film:
    stamps: list[float | None] = []
    contents, predicted, interlaced = 0, 0, 0
    with _container(path, head) as container:
        stream = _film_stream(container)
        rate = float(stream.average_rate or stream.guessed_rate or 0) or None
        promised, end = stream.frames, _promised_end(container, stream)
        start = _Start()
        for packet, decoded in _decode(path, container, stream, start):
            contents += packet.size > 0 and not packet.is_discard
            predicted += packet.size > 0 and not packet.is_keyframe
            for frame in decoded:
                stamps.append(None if frame.pts is None else float(frame.pts * _time_base(stream)))
                interlaced += frame.interlaced_frame
        hdr, gamut = _colours(stream)
        one_each = "mp4" in container.format.name  # one sample, one picture
    times, order = in_order(stamps, rate or FOLDER_FPS, any_order=not predicted)
    last = max((stamp for stamp in stamps if stamp is not None), default=0.0)
    # two frames of slack for rounding
    short = bool(end and rate and times and last < end - 3 / rate - 0.05 * (end - times[0]))
    missing = contents - len(times)
    lost = one_each and missing > start.unreadable
    if lost or ((len(times) < promised or short) and is_cut_short(path, head) is not False):
        raise _damaged(path, len(times))
    messages = []
    if hdr:
        messages.append(f"{path.name} is HDR ({hdr}); it was brought to ordinary sRGB colours.")
    elif gamut:
        messages.append(f"{path.name} has the wide colours of {gamut}; they were brought to those of sRGB.")
    if start.unreadable and missing > 0:
        messages.append(
            f"{path.name} begins between two key frames (it was cut out of a longer video): {missing} pictures at its "
            "beginning cannot be shown."
        )
    if interlaced:
        messages.append(
            f"{path.name} is interlaced: its pictures are two moments in alternate lines, of which one is kept and its "
            "gaps are filled; film progressive pictures (25p, 30p) where there is a choice."
        )
    return Film(path, times, rate, lambda chosen: _video_frames(path, head, chosen, order), tuple(messages))


def _video_frames(path: Path, head: bytes, chosen: set[int], order: list[int]) -> Iterator[np.ndarray]:
    wanted = {order[index] for index in chosen}
    to_come = [order[index] for index in sorted(chosen)]
    waiting: dict[int, np.ndarray] = {}  # frames that were stored before one that is shown earlier
    with _container(path, head) as container:
        stream = _film_stream(container)
        index = 0
        for _, decoded in _decode(path, container, stream, _Start()):
            for frame in decoded:
                if index in wanted:
                    try:
                        waiting[index] = _upright_rgba(frame, stream)
                    except av.error.FFmpegError as error:
                        raise _damaged(path, index) from error
                index += 1
                while to_come and to_come[0] in waiting:
                    yield waiting.pop(to_come.pop(0))


_STILLS = (
    av.stream.Disposition.attached_pic
    | av.stream.Disposition.timed_thumbnails
    | av.stream.Disposition.still_image
    | av.stream.Disposition.dependent
)


def _film_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The picture track that is the film: not a cover or a preview, the largest, the file's own choice."""

    def rank(stream: av.VideoStream) -> tuple[bool, bool, int, bool]:
        context = cast(av.VideoCodecContext | None, stream.codec_context)
        return (
            context is not None and not stream.disposition & _STILLS,
            stream.frames != 1,
            context.width * context.height if context else 0,
            bool(stream.disposition & av.stream.Disposition.default),
        )

    return max(container.streams.video, key=rank)


@dataclass
class _Start:
    """How a stream begins."""

    unreadable: int = 0
    """Pictures that were predicted from ones before the beginning: at most so many are not shown."""


def _decode(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, start: _Start
) -> Iterator[tuple[av.Packet, list[av.VideoFrame]]]:
    """Every packet of the stream with the frames it completes; the first flaw ends it with an `InputError`.

    What comes before the first key frame, and cannot be decoded therefore, is no flaw.
    """
    readable = 0
    key_time: int | None = None
    begun = False
    try:
        decoder = _decoder(path, stream)
        for packet in container.demux(stream):
            ends = packet.pts is None and packet.dts is None and not packet.size
            if not packet.size and not ends:
                continue  # an empty chunk means: go on showing the last picture
            if packet.is_keyframe and not begun:
                begun, key_time = True, packet.pts
            elif not ends and (not begun or (key_time is not None and (packet.pts or key_time) < key_time)):
                start.unreadable += 1
            try:
                frames = decoder.decode(None if ends else packet)
            except av.error.InvalidDataError:
                if begun:
                    raise
                frames = []
            kept = []
            for frame in frames:
                if not frame.is_corrupt:
                    kept.append(frame)
                elif readable + len(kept) or not start.unreadable:
                    raise _damaged(path, readable + len(kept))
            readable += len(kept)
            yield packet, kept
    except (av.error.FFmpegError, EOFError) as error:
        raise _damaged(path, readable) from error


def _container(path: Path, head: bytes) -> av.container.InputContainer:
    try:
        container = av.open(
            str(path.resolve()),
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except av.error.FFmpegError as error:
        raise _not_a_video(path, head) from error
    if not container.streams.video:
        sound = bool(container.streams)
        container.close()
        raise (
            InputError(f"{path} has no picture track, only sound or data: give a video.")
            if sound
            else _not_a_video(path, head)
        )
    return container


def _not_a_video(path: Path, head: bytes) -> InputError:
    reason = what_it_is(head)
    if reason is not None:
        return InputError(f"{path} is not a video but {reason}.")
    if head[4:8] in (b"ftyp", b"mdat", b"wide", b"free", b"moov"):
        return InputError(
            f"{path} is an incomplete MP4 (its index, the 'moov' part, is missing or cut off): "
            "copy or export it again, and let the recording finish."
        )
    return InputError(
        f"{path} is not a video, or damaged beyond reading: give an mp4, mov, webm, gif or a folder of pictures."
    )


def _decoder(path: Path, stream: av.VideoStream) -> av.VideoCodecContext:
    """The stream's own decoder, or for VP8 and VP9 with alpha the library that reads it (FFmpeg's default drops it)."""
    # a stream of an unknown codec has no context, whatever the type annotations say
    if cast(av.VideoCodecContext | None, stream.codec_context) is None:
        raise InputError(f"{path} uses a video codec that FFmpeg does not know: export it again as H.264.")
    library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if library is None or {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") != "1":
        return stream.codec_context
    decoder = cast(av.VideoCodecContext, av.CodecContext.create(library, "r"))
    decoder.extradata = stream.codec_context.extradata
    return decoder


def _time_base(stream: av.VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, av.time_base)


def _promised_end(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """The time at which the picture track ends by the container's own word, seconds; None if it does not say."""
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * _time_base(stream))
    if container.duration and len(container.streams) == 1:
        return ((container.start_time or 0) + container.duration) / av.time_base
    return None


def _upright_rgba(frame: av.VideoFrame, stream: av.VideoStream) -> UInt8[np.ndarray, "h w 4"]:
    hdr, gamut = _colours(stream)
    if hdr is None:
        picture = _converted(frame, stream, "rgba").to_ndarray()
        if gamut:
            picture = np.dstack([from_gamut(picture[..., :3], gamut), picture[..., 3]])
    else:
        levels = tone_map(_converted(frame, stream, "rgb48le").to_ndarray(), hdr)
        picture = np.dstack([levels, np.full_like(levels[..., :1], 255)])
    return _upright(picture, frame)


def _colours(stream: av.VideoStream) -> tuple[Transfer | None, Gamut | None]:
    """The curve of high dynamic range and the primaries wider than sRGB's that a stream states."""
    context = stream.codec_context  # frames do not tell in every PyAV
    return _HDR_TRANSFERS.get(int(context.color_trc)), _WIDE_GAMUTS.get(int(context.color_primaries))


def _upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """A picture as its display matrix says: turned by quarters, mirrored, or both.

    The matrix maps x (right) and y (down) of the stored picture to a x + c y and b x + d y of the shown one, in 16.16
    (ISO 14496-12, 6.2.2). Angles between the quarters and scales are left alone, as players do.
    """
    data = cast(Any, frame.side_data).get(DISPLAY_MATRIX)
    if data is None:
        return picture
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data)[:20], np.int32))
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture = picture.swapaxes(0, 1)
        a, d = c, b
    if d < 0:
        picture = picture[::-1]
    if a < 0:
        picture = picture[:, ::-1]
    return picture


def _converted(frame: av.VideoFrame, stream: av.VideoStream, pixel_format: str) -> av.VideoFrame:
    """The frame with square pixels in an RGB format."""
    shape = stream.sample_aspect_ratio
    oblong = shape is not None and 1 / _MOST_OBLONG <= shape <= _MOST_OBLONG
    width = round(frame.width * shape) if shape and oblong else frame.width
    full = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
    # A filter graph, because not every PyAV lets `reformat` ask for accurate conversion
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=_time_base(stream))
    scale = graph.add(
        "scale",
        f"{width}:{frame.height}:{CONVERSION}:in_color_matrix={_matrix(frame)}:in_range={'full' if full else 'limited'}"
        if len(frame.format.components) >= 3 and not frame.format.is_rgb
        else f"{width}:{frame.height}:{CONVERSION}",
    )
    chain = [source, scale, graph.add("format", pixel_format), graph.add("buffersink")]
    if frame.interlaced_frame:  # before anything mixes the lines of the two fields
        chain.insert(1, graph.add("estdif", "mode=frame:deint=interlaced"))
    for one, next_one in itertools.pairwise(chain):
        one.link_to(next_one)
    graph.configure()
    graph.vpush(frame)
    graph.vpush(None)
    return graph.vpull()


def _matrix(frame: av.VideoFrame) -> str:
    large = frame.height >= _BT709_FROM_HEIGHT or frame.width >= _BT709_FROM_WIDTH
    return _MATRICES.get(int(frame.colorspace), "bt709" if large else "bt601")


def _damaged(path: Path, readable: int) -> InputError:
    remedy = "download or export it again"
    if readable >= 2:
        remedy += f", or keep its beginning with `ffmpeg -i {shlex.quote(path.name)} -frames:v {readable} repaired.mp4`"
    return InputError(f"{path} is damaged or cut off after frame {readable}: {remedy}.")
