"""Finding the object before a background of many colours: a matting model, or masks the user made.

u2netp is part of this package. The other models need the optional extra `matting` (rembg), which downloads them itself
to `~/.u2net` (`$U2NET_HOME`) when they are used for the first time. Models for non-commercial use only are not offered.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sv4d_ns.utils.errors import InputError, install_extra
from sv4d_ns.video.foreground import Matting
from sv4d_ns.video.reader import Film, Region, open_film

BUNDLED = "u2netp"
"""The model that needs nothing else."""

MATTING_MODELS = (
    BUNDLED,
    "isnet-general-use",
    "birefnet-general",
    "birefnet-general-lite",
    "birefnet-portrait",
    "u2net",
    "u2net_human_seg",
    "isnet-anime",
    "silueta",
)
"""The model of this package, then names rembg knows. `bria-rmbg` is left out: its licence forbids commercial use."""


def load_matting(model: str) -> Matting:
    """The model of this package, or one of rembg's with one session for the whole clip.

    Raises:
        InputError: an unknown name, rembg is not installed, or its model cannot be downloaded or opened.
    """
    if model not in MATTING_MODELS:
        raise InputError(f"There is no matting model '{model}': take one of {', '.join(MATTING_MODELS)}.")
    if model == BUNDLED:
        return _bundled
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # rembg ends the process where onnxruntime is missing
        raise InputError(f"The matting model '{model}' needs rembg: {install_extra('matting')}.") from error
    try:
        session = rembg.new_session(model)
    except Exception as error:  # downloads fail in as many ways as there are networks
        raise InputError(
            f"The matting model '{model}' cannot be loaded ({_first_line(error)}): check the network, or put its file "
            "into ~/.u2net (or $U2NET_HOME)."
        ) from error

    def matte(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        return np.asarray(rembg.remove(Image.fromarray(picture), session=session, only_mask=True).convert("L"))

    return matte


SURELY_OBJECT = 0.5
"""Coverage from which a pixel counts for the box that is looked at once more."""
SECOND_LOOK = 0.2
"""Margin around that box, of its longer side."""


def _bundled(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """u2netp on the whole picture, then on the part where it found something: it sees only 320 x 320 pixels.

    The second look is for the outline: over brick, grass, gravel, stars and tissue it raised the mean IoU of eight
    pictures each from 0.84 to 0.94, 0.90 to 0.95, 0.90 to 0.92, 0.94 to 0.95 and 0.91 to 0.96 (margins of 0.15 to 0.3).
    """
    found = _saliency(picture)
    rows, columns = np.nonzero(found >= SURELY_OBJECT)
    if not len(rows):
        return (255 * found).round().astype(np.uint8)
    margin = round(SECOND_LOOK * max(np.ptp(rows), np.ptp(columns)))
    box = (
        slice(max(rows.min() - margin, 0), rows.max() + margin + 1),
        slice(max(columns.min() - margin, 0), columns.max() + margin + 1),
    )
    closer = np.zeros_like(found)
    closer[box] = _saliency(picture[box])
    return (255 * closer).round().astype(np.uint8)


def _saliency(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """How salient each pixel is, 0 to 1."""
    import torch

    from sv4d_ns.video.u2netp import SIDE, load_u2netp, normalised

    small = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32)
    levels = torch.from_numpy(small / max(float(small.max()), 1.0)).permute(2, 0, 1)[None]
    salient = load_u2netp()(normalised(levels)).sigmoid()[0, 0].numpy()
    height, width = picture.shape[:2]
    large = Image.fromarray(salient).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large).clip(0, 1)


def read_masks(path: Path, film: Film, chosen: list[int], region: Region) -> UInt8[np.ndarray, "t h w"]:
    """The masks of the chosen frames of a film, for a region of its pictures.

    Args:
        path: a folder, pattern or video of masks; white (or opaque, where they have an alpha channel) is object.

    Raises:
        InputError: they cannot be read, or their number or size is not that of the film.
    """
    try:
        masks = open_film(path)
    except InputError as error:
        raise InputError(f"No masks (--pipeline.datamanager.masks): {error}") from error
    if len(masks.times) == len(film.times):
        wanted = chosen
    elif len(masks.times) == len(chosen):
        wanted = list(range(len(chosen)))
    else:
        raise InputError(
            f"{path} holds {len(masks.times)} masks but {film.path} has {len(film.times)} frames: give one mask for "
            "each frame."
        )
    result = np.empty((len(wanted), *region.shape), np.uint8)
    for index, picture in enumerate(masks.frames(set(wanted))):
        if picture.shape[:2] != (region.source_height, region.source_width):
            raise InputError(
                f"The masks of {path} are {picture.shape[1]}x{picture.shape[0]}, but the pictures of {film.path} are "
                f"{region.source_width}x{region.source_height}: give masks of the same size."
            )
        opaque = picture[..., 3].min() == 255
        grey = picture[..., :3].max(axis=-1) if opaque else picture[..., 3]
        layers = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
        result[index] = region.take(layers)[..., 0]
    return result


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
