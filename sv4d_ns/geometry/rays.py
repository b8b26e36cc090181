"""From pixels to rays and back: the pinhole camera of this package in torch and in numpy.

Cameras are OpenGL camera-to-world matrices; pixel centres lie at i + 0.5, x to the right and y down; the principal
point is the middle of the picture.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def pixel_rays(
    xy: Float[Tensor, "n 2"],
    camera_to_world: Float[Tensor, "n 4 4"],
    focal: Float[Tensor, " n"],
    size: Int[Tensor, "n 2"],
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Origins and unit directions of rays through continuous pixel positions (pixel centres at i + 0.5, principal
    point in the middle of the (width, height) image, OpenGL cameras)."""
    offset = (xy - size / 2) / focal[:, None]
    local = torch.stack([offset[:, 0], -offset[:, 1], -torch.ones_like(focal)], -1)
    directions = functional.normalize((camera_to_world[:, :3, :3] @ local[..., None])[..., 0], dim=-1)
    return camera_to_world[:, :3, 3], directions


def picture_rays(
    camera_to_world: Float[Tensor, "4 4"], focal: float, size: int
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Origins and unit directions of the rays of all pixels of a square picture, row by row."""
    axis = torch.arange(size, device=camera_to_world.device) + 0.5
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    n = len(xy)
    return pixel_rays(xy, camera_to_world.expand(n, 4, 4), xy.new_full((n,), focal), xy.new_full((n, 2), float(size)))


def project(
    points: Float[Tensor, "n 3"], camera_to_world: Float[Tensor, "4 4"], focal: float, height: int, width: int
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, " n"]]:
    """Continuous pixel coordinates (x right, y down, pixel centres at i + 0.5) and depth along the optical axis."""
    local = (points - camera_to_world[:3, 3]) @ camera_to_world[:3, :3]
    depth = -local[:, 2]
    u = width / 2 + focal * local[:, 0] / depth
    v = height / 2 - focal * local[:, 1] / depth
    return torch.stack([u, v], -1), depth


def project_array(
    points: Float[np.ndarray, "n 3"], c2w: Float[np.ndarray, "4 4"], focal: float, size: int
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """Continuous pixel coordinates and depth along the optical axis of world points in a square OpenGL camera."""
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    depth = -local[:, 2]
    safe = np.where(depth > 1e-9, depth, 1e-9)
    return 0.5 * size + focal * np.stack([local[:, 0], -local[:, 1]], axis=-1) / safe[:, None], depth


def sample_picture(picture: Float[Tensor, "h w c"], uv: Float[Tensor, "m 2"]) -> Float[Tensor, "m c"]:
    """Bilinear samples at places in [0, 1] from the left and the top; the border goes on outside."""
    sampled = functional.grid_sample(
        picture.movedim(-1, 0)[None], (2 * uv - 1)[None, None], align_corners=False, padding_mode="border"
    )
    return sampled[0, :, 0].t()
