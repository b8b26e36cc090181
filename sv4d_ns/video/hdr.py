"""High dynamic range and wide gamuts to ordinary sRGB pictures.

PQ and HLG are ITU-R BT.2100; reference white lies at 203 cd/m^2 (BT.2408), where it becomes sRGB white before the
shoulder. The shoulder itself is our own choice: everything an ordinary picture can show keeps its level up to 80 % of
white; what is brighter is bent into the rest instead of being cut off.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8, UInt16

Transfer = Literal["PQ", "HLG"]
Gamut = Literal["BT.2020", "Display P3"]

REFERENCE_WHITE = 203.0
"""cd/m^2 of diffuse white (BT.2408)."""
HLG_PEAK = 1000.0
"""cd/m^2 of the display an HLG picture is meant for, whose system gamma is 1.2 (BT.2100)."""
SHOULDER = 0.8
"""Linear level, of white at 1, from which highlights are compressed."""

_REC2020_TO_REC709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
"""Linear RGB with BT.2020 primaries to BT.709 primaries (BT.2087)."""
_P3_TO_REC709 = np.array(
    [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]], np.float32
)
"""Linear RGB with the primaries of Display P3 (SMPTE EG 432-1, white D65) to BT.709 primaries."""
_TO_REC709: dict[Gamut, Float[np.ndarray, "3 3"]] = {"BT.2020": _REC2020_TO_REC709, "Display P3": _P3_TO_REC709}
_LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


def tone_map(picture: UInt16[np.ndarray, "h w 3"], transfer: Transfer) -> UInt8[np.ndarray, "h w 3"]:
    """One frame as it comes from the file (16-bit R'G'B', BT.2020 primaries) as sRGB levels."""
    encoded = picture.astype(np.float32) / 65535
    linear = (pq_to_light(encoded) if transfer == "PQ" else hlg_to_light(encoded)) / REFERENCE_WHITE
    linear = np.maximum(linear @ _REC2020_TO_REC709.T, 0)
    return (255 * _srgb(_shoulder(linear))).round().astype(np.uint8)


def from_gamut(picture: UInt8[np.ndarray, "h w 3"], gamut: Gamut) -> UInt8[np.ndarray, "h w 3"]:
    """A frame of ordinary range with other primaries as sRGB levels; what sRGB cannot show is clipped.

    Its levels are taken to follow sRGB's curve, as those of BT.709 are everywhere in this package.
    """
    linear = _LINEAR[picture] @ _TO_REC709[gamut].T
    return (255 * _srgb(linear.clip(0, 1))).round().astype(np.uint8)


def pq_to_light(encoded: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The PQ curve of BT.2100: encoded 0 to 1 to light in cd/m^2."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.maximum(encoded, 0) ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_to_light(encoded: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """The HLG curve of BT.2100 on a 1000 cd/m^2 display: encoded 0 to 1 to light in cd/m^2."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(encoded <= 0.5, encoded**2 / 3, (np.exp((encoded - c) / a) + b) / 12)
    luminance = (scene * _LUMINANCE_2020).sum(axis=-1, keepdims=True)
    return HLG_PEAK * np.maximum(luminance, 1e-6) ** 0.2 * scene


def _shoulder(linear: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    room = 1 - SHOULDER
    return np.where(linear <= SHOULDER, linear, 1 - room * np.exp(-np.maximum(linear - SHOULDER, 0) / room))


def _srgb(linear: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def _linear(encoded: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


_LINEAR = _linear(np.linspace(0, 1, 256, dtype=np.float32))
"""Light of each sRGB level."""
