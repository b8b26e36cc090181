"""The world of a run and the world its video was filmed in differ by a similarity that the run's framing tells.

A run crops its video to a square around the object, gives the crop the camera of its view plan, and fits a field in
front of that camera. So what the source camera saw at one size and place, the field has at another. Undoing the crop
needs only stored numbers (the framing, the plan, the source camera); nothing is fitted to ground truth.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.crop import Framing


@dataclass(frozen=True, eq=False)
class Similarity:
    """x -> scale * rotation @ x + translation."""

    scale: float
    rotation: Float[np.ndarray, "3 3"]
    translation: Float[np.ndarray, " 3"]

    def points(self, x: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        """Moved points."""
        return self.scale * np.asarray(x, float) @ self.rotation.T + self.translation

    def directions(self, x: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        """Turned directions; lengths stay."""
        return np.asarray(x, float) @ self.rotation.T

    def camera(self, c2w: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
        """The camera that sees the moved world as the given one sees the world (a similarity keeps all pictures)."""
        moved = np.eye(4)
        moved[:3, :3] = self.rotation @ c2w[:3, :3]
        moved[:3, 3] = self.points(c2w[:3, 3])
        return moved

    def inverse(self) -> "Similarity":
        """The way back."""
        rotation = self.rotation.T
        return Similarity(1 / self.scale, rotation, -(rotation @ self.translation) / self.scale)

    def after(self, first: "Similarity") -> "Similarity":
        """`first`, then this one."""
        return Similarity(
            self.scale * first.scale, self.rotation @ first.rotation, self.points(first.translation[None])[0]
        )


@dataclass(frozen=True, eq=False)
class Alignment:
    """The similarity of each moment: one for each frame where the crop followed the object, else one for all."""

    frames: tuple[Similarity, ...]

    def at(self, time: float) -> Similarity:
        """That of a time in [0, 1]; between two frames what lies between theirs (a shift and a scale apart)."""
        place = time * (len(self.frames) - 1)
        first = self.frames[int(place)]
        second, share = self.frames[min(int(place) + 1, len(self.frames) - 1)], place - int(place)
        return Similarity(
            (1 - share) * first.scale + share * second.scale,
            first.rotation,
            (1 - share) * first.translation + share * second.translation,
        )


def whole_picture(size: int) -> Framing:
    """The framing of a run whose input frames are the source pictures themselves."""
    return Framing(size / 2, size / 2, float(size), size, size, size)


def run_to_source(
    framing: Framing, plan: ViewPlan, c2w: Float[np.ndarray, "4 4"], focal_px: float, distance: float
) -> Similarity:
    """From the world of a run to the world of the camera that filmed its video.

    A point of the run's world on the plane through the origin that faces the input camera goes to the point of the
    source plane at `distance` that the uncropped picture shows at the same pixel. Depth is scaled like the plane. (No
    similarity reproduces the crop's picture before and behind that plane, because cropping changes the perspective;
    the difference is of second order: depth over distance times offset or zoom.)

    Args:
        framing: the crop of the run's input view.
        plan: the run's cameras; its input camera is the one the crop was given.
        c2w: the source camera, OpenGL.
        focal_px: of the source picture; its principal point is the centre.
        distance: of the source camera from the object's origin along its axis, source world units.
    """
    crop_focal = plan.focal_px(framing.size) / framing.scale  # in source pixels
    scale = crop_focal * distance / (plan.radius * focal_px)
    offset_px = np.array([framing.center_x - framing.source_width / 2, framing.center_y - framing.source_height / 2])
    shift = offset_px * np.array([1.0, -1.0]) * distance / focal_px
    # camera coordinates: the run's plane is at z = -radius, the source's at z = -distance
    between = Similarity(scale, np.eye(3), np.array([*shift, scale * plan.radius - distance]))
    return _from_matrix(c2w).after(between).after(_from_matrix(plan.c2w()[0]).inverse())


def _from_matrix(c2w: Float[np.ndarray, "4 4"]) -> Similarity:
    return Similarity(1.0, np.asarray(c2w[:3, :3], float), np.asarray(c2w[:3, 3], float))


def check_source_size(framing: Framing, size: int, what: str) -> None:
    """Raises `InputError` if a framing does not belong to pictures of `size`."""
    if (framing.source_width, framing.source_height) != (size, size):
        raise InputError(
            f"The run was framed from a {framing.source_width}x{framing.source_height} video, but {what} is "
            f"{size}x{size}: evaluate the run against its own case."
        )
