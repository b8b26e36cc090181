"""Lighting of rendered assets: a small set of our own skies and lamps, or the user's environment pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from sv4d_ns.utils.errors import InputError

PICTURE_SUFFIXES = (".hdr", ".exr", ".png", ".jpg")


def _sky(ground: float, horizon: tuple, zenith: tuple, *lamps: tuple[float, float, float, tuple]) -> dict[str, Any]:
    """A sky in linear RGB, and suns as (azimuth, elevation, strength, colour)."""
    return {
        "ground": [ground] * 3,
        "horizon": list(horizon),
        "zenith": list(zenith),
        "lamps": [
            {"azimuth_deg": azimuth, "elevation_deg": elevation, "strength": strength, "colour": list(colour),
             "softness_deg": 10.0}
            for azimuth, elevation, strength, colour in lamps
        ],
    }  # fmt: skip


_WHITE, _WARM, _COOL = (1.0, 1.0, 1.0), (1.0, 0.82, 0.6), (0.75, 0.87, 1.0)

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "even": _sky(0.9, (1.0,) * 3, (1.0,) * 3),
    "overcast": _sky(0.35, (0.8, 0.83, 0.87), (1.0, 1.03, 1.08)),
    "noon": _sky(0.4, (0.6, 0.68, 0.8), (0.35, 0.5, 0.85), (20.0, 65.0, 2.6, _WHITE)),
    "evening": _sky(0.25, (0.9, 0.62, 0.42), (0.3, 0.33, 0.5), (-60.0, 18.0, 2.2, _WARM)),
    "studio": _sky(0.45, (0.5,) * 3, (0.55,) * 3, (40.0, 40.0, 1.8, _WHITE), (-50.0, 25.0, 0.8, _COOL)),
    "side": _sky(0.35, (0.45,) * 3, (0.5,) * 3, (90.0, 20.0, 2.5, _WHITE)),
    "top": _sky(0.3, (0.45,) * 3, (0.6,) * 3, (0.0, 85.0, 2.4, _WHITE)),
    "cool": _sky(0.4, (0.55, 0.68, 0.85), (0.55, 0.68, 0.9), (130.0, 45.0, 1.4, _COOL), (-30.0, 30.0, 0.8, _WARM)),
}
"""Name: colours of ground, horizon and zenith in linear light, and suns. Our own; no published set is free to ship."""


def choose_environment(rng: np.random.Generator, folder: Path | None) -> tuple[str, dict[str, Any], float, Path | None]:
    """(name, description, rotation about the vertical in degrees, picture) of an object's lighting.

    Raises:
        InputError: when the folder has no environment picture.
    """
    turn = float(rng.uniform(0.0, 360.0))
    if folder is None:
        name = str(rng.choice(sorted(ENVIRONMENTS)))
        return name, ENVIRONMENTS[name], turn, None
    pictures = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise InputError(
            f"--environments {folder} holds no environment picture ({', '.join(PICTURE_SUFFIXES)}): give a folder "
            "with some, or leave the flag out for the built-in lighting."
        )
    picture = pictures[int(rng.integers(len(pictures)))]
    return picture.name, {"picture": str(picture.resolve())}, turn, picture
