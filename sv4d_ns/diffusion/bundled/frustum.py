"""The grid a volume lives in: cells along the rays of the input camera.

Coordinates of the input camera here are x right, y up, z forward (the depth along the optical axis). Row, column and
depth of a cell are those of the input picture's pixel and of a slice between `near` and `far`, so a picture's features
are lifted into the grid by a reshape and stay aligned with its pixels. Not in a paper; see docs/deviations.md.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sv4d_ns.geometry.cameras import CAMERA_RADIUS, FIELD_OF_VIEW_DEG, OBJECT_BOX
from sv4d_ns.utils.devices import upload

BALL_RADIUS = 0.58
"""Nothing is farther from the middle of the scene, world units: the object box is inscribed in the viewing cone."""


@dataclass(frozen=True)
class Frustum:
    """The part of the input camera's viewing cone that holds the object."""

    radius: float = CAMERA_RADIUS
    """Distance of the camera from the middle of the scene, world units."""
    fov_deg: float = FIELD_OF_VIEW_DEG
    """Field of view over the side of the square picture, degrees."""

    @property
    def near(self) -> float:
        """Depth of the first cell's front, world units."""
        return self.radius - OBJECT_BOX

    @property
    def far(self) -> float:
        """Depth of the last cell's back, world units."""
        return self.radius + OBJECT_BOX

    @property
    def tangent(self) -> float:
        """Half the picture's width at depth 1."""
        return float(np.tan(np.deg2rad(self.fov_deg) / 2))

    @lru_cache(maxsize=8)  # noqa: B019  (frozen, and few)
    def points(self, size: int) -> Float[np.ndarray, "d h w 3"]:
        """Cell centres of a grid with `size` cells along each axis, in coordinates of the input camera."""
        middle = (np.arange(size) + 0.5) / size
        depth = self.near + middle * (self.far - self.near)
        across = (2.0 * middle - 1.0) * self.tangent
        z, up, right = np.meshgrid(depth, -across, across, indexing="ij")
        return np.stack([right * z, up * z, z], axis=-1)

    def world_points(
        self, size: int, c2w: Float[np.ndarray, "4 4"], cells: Bool[np.ndarray, "d h w"]
    ) -> Float[np.ndarray, "n 3"]:
        """Centres of the chosen cells in the world of an OpenGL camera-to-world matrix."""
        opengl = self.points(size)[cells] * np.array([1.0, 1.0, -1.0])
        return opengl @ c2w[:3, :3].T + c2w[:3, 3]

    @lru_cache(maxsize=8)  # noqa: B019
    def in_ball(self, size: int) -> Bool[np.ndarray, "d h w"]:
        """Cells that can hold the object at all."""
        return np.linalg.norm(self.points(size) - [0.0, 0.0, self.radius], axis=-1) <= BALL_RADIUS


@lru_cache(maxsize=16)
def cell_points(frustum: Frustum, size: int, device: torch.device) -> Float[Tensor, "d h w 3"]:
    """`Frustum.points` as a float32 tensor that is made once."""
    return upload(frustum.points(size).astype(np.float32), device)


@lru_cache(maxsize=16)
def ball_mask(frustum: Frustum, size: int, device: torch.device) -> Bool[Tensor, "d h w"]:
    """`Frustum.in_ball` as a tensor that is made once."""
    return upload(frustum.in_ball(size), device)


_FORWARD = np.diag([1.0, 1.0, -1.0, 1.0])
"""OpenGL looks along -z, the coordinates of this module along +z."""


def relative_poses(c2w: Float[np.ndarray, "v 4 4"], input_c2w: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "v 4 4"]:
    """From each camera's own coordinates (x right, y up, z forward) to the input camera's."""
    return _FORWARD @ np.linalg.inv(input_c2w) @ c2w @ _FORWARD


def pixel_directions(size: int, fov_deg: float) -> Float[np.ndarray, "h w 3"]:
    """Directions through pixel centres at depth 1, in a camera's own coordinates."""
    across = (2.0 * (np.arange(size) + 0.5) / size - 1.0) * np.tan(np.deg2rad(fov_deg) / 2)
    up, right = np.meshgrid(-across, across, indexing="ij")
    return np.stack([right, up, np.ones_like(up)], axis=-1)


def project(
    points: Float[Tensor, "... 3"], to_camera: Float[Tensor, "b v 4 4"], tangent: float
) -> tuple[Float[Tensor, "b v ... 2"], Bool[Tensor, "b v ..."]]:
    """Places in [-1, 1] (x right, y down, as grid_sample reads them) where cameras see points, and whether they do."""
    flat = points.reshape(-1, 3)
    seen = flat @ to_camera[..., :3, :3].transpose(-1, -2) + to_camera[..., None, :3, 3]
    depth = seen[..., 2:].clamp(min=1e-3)
    place = torch.cat([seen[..., :1], -seen[..., 1:2]], dim=-1) / (depth * tangent)
    inside = (seen[..., 2] > 1e-3) & (place.abs() <= 1.0).all(-1)
    shape = (*to_camera.shape[:2], *points.shape[:-1])
    return place.reshape(*shape, 2), inside.reshape(shape)
