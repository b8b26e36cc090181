"""Colours of pictures with alpha, as the bundled model reads them."""

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage


def premultiplied(pictures: UInt8[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 4"]:
    """RGBA in [0, 1] with the colour times alpha."""
    values = pictures.astype(np.float32) / 255.0
    values[..., :3] *= values[..., 3:]
    return values


def continued(pictures: UInt8[np.ndarray, "... h w 4"]) -> Float[np.ndarray, "... h w 3"]:
    """Straight colours in [0, 1]; where nothing covers a pixel, those of the nearest pixel that is covered well."""
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    out = flat[..., :3].astype(np.float32) / 255.0
    for picture, colours in zip(flat, out, strict=True):
        solid = picture[..., 3] >= 128
        if solid.any() and not solid.all():
            nearest = ndimage.distance_transform_edt(~solid, return_distances=False, return_indices=True)
            colours[...] = colours[tuple(nearest)]
    return out.reshape(*pictures.shape[:-1], 3)
