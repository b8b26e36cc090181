"""Which images of a T x V matrix form which video: the four video metrics of SV4D, and frame similarity of 4Diffusion.

SV4D (Xie et al. 2024, section 5) calls the images of V views and F frames an image matrix and measures FVD over videos
read from it in four ways. The paper gives the idea of each; what it leaves open is decided here and said.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int


def along_time(frames: int, views: int) -> Int[np.ndarray, "n l 2"]:
    """FVD-F: each view's frames as a video; V videos of F images, entries (frame, view)."""
    return np.stack([_pairs(np.arange(frames), np.full(frames, view)) for view in range(views)])


def along_views(frames: int, views: int) -> Int[np.ndarray, "n l 2"]:
    """FVD-V: each frame's views as a video, in the order of azimuth; F videos of V images."""
    return np.stack([_pairs(np.full(views, frame), np.arange(views)) for frame in range(frames)])


def diagonals(frames: int, views: int) -> Int[np.ndarray, "n l 2"]:
    """FVD-Diag: from each view on, one view further with every frame, around the ring; V videos of F images.

    The paper says "diagonals of the image matrix"; that they go on at the first view after the last follows the public
    re-implementation, and makes all of them equally long.
    """
    frame = np.arange(frames)
    return np.stack([_pairs(frame, (view + frame) % views) for view in range(views)])


def zig_zag(frames: int, views: int) -> Int[np.ndarray, "n l 2"]:
    """FV4D: all images as one video in bidirectional raster order; 1 video of F * V images.

    View by view, forward in time through the first, backward through the second: neighbours in the video are neighbours
    in the matrix. (The paper does not say whether rows are views or frames.)
    """
    rows = [np.arange(frames) if view % 2 == 0 else np.arange(frames)[::-1] for view in range(views)]
    return np.concatenate([_pairs(row, np.full(frames, view)) for view, row in enumerate(rows)])[None]


ORDERS: dict[str, Callable[[int, int], Int[np.ndarray, "n l 2"]]] = {
    "f": along_time,
    "v": along_views,
    "diag": diagonals,
    "4d": zig_zag,
}
"""Suffix of the metric: the videos it reads."""


def videos(matrix: Float[np.ndarray, "t v *image"], order: str) -> Float[np.ndarray, "n l *image"]:
    """The videos of an image matrix in one of `ORDERS`."""
    index = ORDERS[order](matrix.shape[0], matrix.shape[1])
    return matrix[index[..., 0], index[..., 1]]


def _pairs(frame: Int[np.ndarray, " l"], view: Int[np.ndarray, " l"]) -> Int[np.ndarray, "l 2"]:
    return np.stack([frame, view], axis=-1)


def paired_similarity(made: Float[np.ndarray, "*n d"], truth: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n"]:
    """Cosine of each embedding with its truth's: CLIP-S of SV4D, and CLIP-I of 4Diffusion averaged the same way."""
    return (unit(made) * unit(truth)).sum(-1)


def frame_similarity(embeddings: Float[np.ndarray, "t v d"]) -> Float[np.ndarray, " v"]:
    """CLIP-C of 4Diffusion: mean cosine of consecutive frames of each view's video; 1 for a video of one frame.

    The paper says "between frames of one synthetic video"; that pairs are consecutive is our reading.
    """
    if len(embeddings) < 2:
        return np.ones(embeddings.shape[1])
    return (unit(embeddings[1:]) * unit(embeddings[:-1])).sum(-1).mean(0)


def unit(x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Vectors of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
