"""Pictures as an H.264 file that any player opens."""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path


def write_h264(
    path: Path,
    pictures: Iterable[UInt8[np.ndarray, "h w 3"]],
    fps: float,
    crf: int = 18,
    comment: str | None = None,
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Write sRGB pictures of one size as H.264 (yuv420p, BT.709, index first), as a whole or not at all.

    Args:
        pictures: taken one by one; where a side is odd, the last row or column is repeated, as 4:2:0 needs.
        crf: x264's constant rate factor; 18 is visually lossless.
        comment: kept in the file's metadata.
        on_written: called with the number of pictures written.

    Raises:
        InputError: the file cannot be written, no picture comes, or the rate is none.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"{path} cannot have {fps} pictures a second: give a rate above 0.")
    try:
        with (
            atomic_path(path) as temporary,
            av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container,
        ):
            if comment is not None:
                container.metadata["comment"] = comment
            stream: Any = None
            for number, picture in enumerate(pictures, start=1):
                picture = _even(picture)
                if stream is None:
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.height, stream.width = picture.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.options = {"crf": str(crf)}
                    # without these a player has to guess the matrix
                    context = stream.codec_context
                    context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(frame))
                if on_written is not None:
                    on_written(number)
            if stream is None:
                raise InputError(f"{path} would have no pictures: give one or more.")
            container.mux(stream.encode())
    except (OSError, av.error.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({reason}): choose a writable folder with free space.") from error


def _even(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    height, width = picture.shape[:2]
    return np.ascontiguousarray(np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
