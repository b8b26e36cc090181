"""Still pictures of every depth and colour model as upright 8-bit RGBA.

Levels of 8 bits are what they are. Deeper ones are brought to 8 bits by the range of their whole series, so that a
clip does not flicker: cameras store 10, 12 or 14 bits in files of 16, and floating point has no range of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageCms, ImageOps

DEPTHS = (8, 10, 12, 14, 16, 24, 32)
"""Bits of whole-number levels, from which the smallest is taken that holds the largest level of a series."""
FLOAT_WHITES = (1.0, 255.0, 65535.0)
"""What white is in floating-point pictures; the smallest is taken that holds their largest level ..."""
FLOAT_SLACK = 1.5
"""... but for so much, by which resampling and highlights overshoot."""

DeepPicture = Shaped[np.ndarray, "h w c"]
"""Levels as the file has them, 1 to 4 channels (grey, grey and alpha, RGB, RGBA)."""


@dataclass(frozen=True)
class LevelRange:
    """The levels of a series that become black and white."""

    low: float
    high: float

    def scaled(self, levels: DeepPicture) -> UInt8[np.ndarray, "h w c"]:
        """Levels in 8 bits; what is not a number becomes black."""
        share = (np.nan_to_num(levels.astype(np.float64), posinf=self.high) - self.low) / (self.high - self.low)
        return np.floor(256 * share).clip(0, 255).astype(np.uint8)


def level_range(pictures: Iterable[DeepPicture]) -> LevelRange:
    """What is black and white in a series of deep pictures."""
    low, high, whole = 0.0, 0.0, True
    for levels in pictures:
        colours = levels[..., :3] if levels.shape[-1] != 2 else levels[..., :1]
        finite = colours[np.isfinite(colours)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        whole &= levels.dtype.kind in "iu"
    if low < -0.02 * max(high, 1e-9):  # signed levels, or values that are no colours
        return LevelRange(low, high + (1 if whole else 0))
    if whole:
        return LevelRange(0, 2.0 ** next((bits for bits in DEPTHS if high < 2**bits), 64))
    slack = FLOAT_SLACK if high <= FLOAT_SLACK else 1.0
    return LevelRange(0, next((white for white in FLOAT_WHITES if high <= slack * white), high))


def is_deep(image: Image.Image) -> bool:
    """Whether Pillow keeps more than 8 bits of this picture (and would clip them in a conversion)."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def deep_levels(image: Image.Image) -> DeepPicture:
    """The levels of a deep picture as they are, upright."""
    levels = np.asarray(image)
    turned = _turns(image)
    return np.ascontiguousarray(turned(levels) if turned else levels)[..., None]


def read_tiff(path: Path) -> DeepPicture:
    """A TIFF of a kind Pillow cannot read: floating point or 32 bits in several channels.

    Raises:
        ValueError: it cannot be read, or is no picture of 1 to 4 channels.
    """
    import tifffile  # comes with scikit-image

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            levels, axes = series.asarray(), series.axes
    except Exception as error:  # a format of a thousand dialects, whose reader raises as many kinds of errors
        raise ValueError(str(error)[:160]) from error
    if levels.ndim == 3 and axes[0] in "SC" and levels.shape[0] <= 4:
        levels = np.moveaxis(levels, 0, -1)
    levels = levels[..., None] if levels.ndim == 2 else levels
    if levels.ndim != 3 or not 1 <= levels.shape[-1] <= 4 or levels.dtype.kind not in "iuf":
        raise ValueError(f"its data are {levels.dtype} of shape {levels.shape}")
    return levels


def rgba_of_deep(levels: DeepPicture, colours: LevelRange) -> UInt8[np.ndarray, "h w 4"]:
    """A deep picture in 8 bits. Alpha is opaque at 1 in floating point, else at the largest level of its type."""
    channels = levels.shape[-1]
    rgb = colours.scaled(levels[..., :3] if channels > 2 else np.repeat(levels[..., :1], 3, axis=-1))
    if channels in (1, 3):
        return np.dstack([rgb, np.full_like(rgb[..., :1], 255)])
    whole = levels.dtype.kind in "iu"
    opaque = LevelRange(0, float(np.iinfo(levels.dtype).max) + 1 if whole else 1.0)
    return np.dstack([rgb, opaque.scaled(levels[..., -1:])])


def rgba(image: Image.Image) -> UInt8[np.ndarray, "h w 4"]:
    """A picture of 8 bits, upright and in sRGB: palettes, grey with alpha, CMYK, CIELAB, profiles and the rest."""
    if image.mode == "LAB":
        image = _of_lab(image)
    elif image.mode == "1" and "transparency" in image.info:
        image = image.convert("L")
    image = ImageOps.exif_transpose(image)
    shown = image.convert("RGBA")
    picture = np.array(shown)
    profile = image.info.get("icc_profile")
    turned = _of_profile(image if image.mode == "CMYK" else shown, profile) if profile else None
    if turned is not None:
        picture[..., :3] = turned
    return picture


_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode of the pictures that a profile of a colour space belongs to."""


def _of_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The colours in sRGB by the profile of the file; None for one that is broken or of another kind of picture."""
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = _PROFILE_MODES.get(given.profile.xcolor_space)
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK"):
            return None
        return ImageCms.profileToProfile(image.convert(mode), given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _of_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    turned = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert turned is not None  # only None where it is done in place
    return turned


def _turns(image: Image.Image) -> Any:
    """What turns an array of a picture upright by its EXIF orientation; None where it is."""
    orientation = image.getexif().get(0x0112)
    return {
        2: np.fliplr,
        3: lambda array: np.rot90(array, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda array: np.rot90(array, -1),
        7: lambda array: np.rot90(array, 2).T,
        8: np.rot90,
    }.get(int(orientation or 1))
