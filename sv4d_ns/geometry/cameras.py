"""Where the cameras stand: the one page of conventions.

World right-handed, z up, the object inside [-0.57, 0.57]^3, cameras on a sphere around the origin looking at it.
Azimuth 0 is +x and grows counter-clockwise seen from above; a camera at azimuth a and elevation e stands at
R (cos e cos a, cos e sin a, sin e). Camera-to-world matrices are OpenGL: columns +x right, +y up, +z backward,
then the position. The input view is at azimuth 0; all other azimuths and elevations are relative to it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from sv4d_ns.utils.errors import InputError

OBJECT_BOX = 0.57
"""Half the side of the axis-aligned box around the origin that holds the object, in world units (metres)."""

CAMERA_RADIUS = 2.0
"""Distance of every camera from the origin, in world units. Our normalisation, shared with the 4D benchmark."""

FIELD_OF_VIEW_DEG = 33.9
"""Horizontal and vertical field of view of the square pictures (SV3D, arXiv 2403.12008, reports 33.8)."""


def look_at_cameras(
    azimuths_deg: Float[np.ndarray, " v"],
    elevations_deg: Float[np.ndarray, " v"],
    radius: float = CAMERA_RADIUS,
) -> Float[np.ndarray, "v 4 4"]:
    """OpenGL camera-to-world matrices of cameras on a sphere that look at the origin with +z up.

    Args:
        azimuths_deg: degrees, any value; 0 is +x, counter-clockwise seen from above.
        elevations_deg: degrees above the horizon, strictly between -90 and 90 (at a pole "up" is undefined).
        radius: distance from the origin, world units, positive.

    Returns:
        float64 matrices, last row (0, 0, 0, 1).
    """
    azimuth, elevation = np.broadcast_arrays(np.deg2rad(azimuths_deg), np.deg2rad(elevations_deg))
    cos_a, sin_a, cos_e, sin_e = np.cos(azimuth), np.sin(azimuth), np.cos(elevation), np.sin(elevation)
    backward = np.stack([cos_e * cos_a, cos_e * sin_a, sin_e], axis=-1)
    right = np.stack([-sin_a, cos_a, np.zeros_like(cos_a)], axis=-1)
    up = np.stack([-sin_e * cos_a, -sin_e * sin_a, cos_e], axis=-1)
    matrices = np.zeros((*backward.shape[:-1], 4, 4))
    matrices[..., :3, :] = np.stack([right, up, backward, radius * backward], axis=-1)
    matrices[..., 3, 3] = 1.0
    return matrices


def framing_camera(
    points: Float[np.ndarray, "n 3"],
    centred: Float[np.ndarray, "m 3"],
    azimuth_deg: float,
    elevation_deg: float,
    fov_deg: float,
    aspect: float,
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Where a camera of a given direction stands closest with all points in its picture.

    Args:
        centred: those of the points that are in the middle of the picture, as far as the others leave room.
        azimuth_deg: and `elevation_deg`: of the camera seen from the points.
        fov_deg: over the height of the picture.
        aspect: width of the picture over its height.

    Returns:
        Its position and a point amid the points that it looks at straight.
    """
    right, up, back = look_at_cameras(np.array([azimuth_deg]), np.array([elevation_deg]))[0, :3, :3].T
    slope = math.tan(math.radians(fov_deg) / 2)
    axes = ((right, slope * aspect), (up, slope))

    # the planes through the camera that bound the picture, moved until they touch the outermost points
    def touching(some: Float[np.ndarray, "k 3"]) -> list[tuple[float, float]]:
        return [
            (float((some @ axis - rise * (some @ back)).min()), float((some @ axis + rise * (some @ back)).max()))
            for axis, rise in axes
        ]

    around, middles = touching(points), touching(centred)
    distance = max((high - low) / (2 * rise) for (low, high), (_, rise) in zip(around, axes, strict=True))
    across = np.zeros(3)
    for (axis, rise), (low, high), ends in zip(axes, around, middles, strict=True):
        across += np.clip(sum(ends) / 2, high - rise * distance, low + rise * distance) * axis
    depth = points @ back
    return across + distance * back, across + (depth.max() + depth.min()) / 2 * back


@dataclass(frozen=True)
class ViewPlan:
    """The novel views asked for, relative to the input view, and the camera they share.

    Raises `InputError` on construction for anything no camera can be built from: no view at all, lists of
    different length, values that are not finite, a camera at or beyond a pole, inside the object's box, or with a
    field of view outside (0, 180) degrees.
    """

    azimuths_deg: tuple[float, ...]
    """Azimuth of each of the V novel views minus that of the input view, degrees."""
    elevations_deg: tuple[float, ...]
    """Elevation of each novel view minus that of the input view, degrees."""
    input_elevation_deg: float = 0.0
    """Elevation of the input view above the horizon, degrees."""
    radius: float = CAMERA_RADIUS
    """Distance of all cameras from the origin, world units."""
    fov_deg: float = FIELD_OF_VIEW_DEG
    """Field of view over the width (and height) of the square pictures, degrees."""

    OFFICIAL_8: ClassVar["ViewPlan"]
    """The eight views of the released 8-view model: 30, 75, 120, 165, 210, 255, 300, 330 degrees."""
    BUNDLED: ClassVar["ViewPlan"]
    """The default of the bundled model: eight views every 40 degrees, which with the input view close the ring."""

    def __post_init__(self) -> None:
        for name in ("azimuths_deg", "elevations_deg"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not self.azimuths_deg:
            raise InputError("The view plan has no novel view: give at least one azimuth.")
        if len(self.azimuths_deg) != len(self.elevations_deg):
            raise InputError(
                f"The view plan has {len(self.azimuths_deg)} azimuths but {len(self.elevations_deg)} elevations: "
                "give one elevation for each azimuth."
            )
        numbers = (*self.azimuths_deg, *self.elevations_deg, self.input_elevation_deg, self.radius, self.fov_deg)
        if not all(math.isfinite(number) for number in numbers):
            raise InputError("The view plan holds a number that is not finite: give plain degrees and lengths.")
        highest = max(self.absolute_elevations_deg, key=abs)
        if abs(highest) >= 90:
            raise InputError(
                f"A camera of the view plan is at elevation {highest:g} degrees (its own plus the input view's): "
                "keep every camera strictly between -90 and 90."
            )
        if self.radius <= math.sqrt(3) * OBJECT_BOX:
            raise InputError(
                f"The view plan's radius {self.radius:g} puts cameras inside the object's box: "
                f"use more than {math.sqrt(3) * OBJECT_BOX:.3f} (the default is {CAMERA_RADIUS:g})."
            )
        if not 0 < self.fov_deg < 180:
            raise InputError(f"The view plan's field of view {self.fov_deg:g} is not between 0 and 180 degrees.")

    @classmethod
    def ring(cls, azimuths_deg: tuple[float, ...], input_elevation_deg: float = 0.0) -> "ViewPlan":
        """Views at the input view's own elevation."""
        return cls(azimuths_deg, (0.0,) * len(azimuths_deg), input_elevation_deg)

    @property
    def num_views(self) -> int:
        """V, the number of novel views; the input view is not counted."""
        return len(self.azimuths_deg)

    @property
    def absolute_elevations_deg(self) -> tuple[float, ...]:
        """Elevation above the horizon of all V + 1 cameras, the input view first, degrees."""
        return tuple(self.input_elevation_deg + relative for relative in (0.0, *self.elevations_deg))

    def c2w(self) -> Float[np.ndarray, "v+1 4 4"]:
        """Camera-to-world matrices (OpenGL), row 0 the input view."""
        return look_at_cameras(
            np.asarray((0.0, *self.azimuths_deg)), np.asarray(self.absolute_elevations_deg), self.radius
        )

    def focal_px(self, size: int) -> float:
        """Focal length in pixels of a square picture `size` pixels wide; the principal point is its centre."""
        return 0.5 * size / math.tan(math.radians(self.fov_deg) / 2)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_dict` is its inverse."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ViewPlan":
        """Read back `to_dict`; raises `InputError` for missing, unknown or unusable entries."""
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"The view plan cannot be read ({error}): write it with ViewPlan.to_dict.") from error
        except (ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"The view plan holds something that is not a number ({error}).") from error


ViewPlan.OFFICIAL_8 = ViewPlan.ring((30.0, 75.0, 120.0, 165.0, 210.0, 255.0, 300.0, 330.0))
ViewPlan.BUNDLED = ViewPlan.ring((40.0, 80.0, 120.0, 160.0, 200.0, 240.0, 280.0, 320.0))
