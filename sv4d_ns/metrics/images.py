"""Picture metrics on white: PSNR, SSIM, and the overlap of silhouettes."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from sv4d_ns.utils.devices import upload
from sv4d_ns.utils.images import over_white

WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window, pixels."""
IDENTICAL_DB = 100.0
"""PSNR of identical pictures, and the cap of all others; the true value is infinite."""
OPAQUE = 128
"""Alpha (of 255) from which a pixel belongs to the silhouette."""
BATCH = 64


def on_white(rgba: UInt8[np.ndarray, "n h w 4"]) -> Float[Tensor, "n 3 h w"]:
    """sRGB in [0, 1], composited on white in 8 bits as viewers show it."""
    return torch.from_numpy(np.moveaxis(over_white(rgba), -1, -3).copy()).float() / 255.0


def psnr(made: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[np.ndarray, " n"]:
    """Peak signal-to-noise ratio of each picture in dB (peak 1, sRGB), at most `IDENTICAL_DB`."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values = [
        peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
        for a, b in zip(made.split(BATCH), truth.split(BATCH), strict=True)
    ]
    return torch.cat(values).clamp(max=IDENTICAL_DB).double().cpu().numpy()


def ssim(made: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[np.ndarray, " n"]:
    """Structural similarity of each picture (Wang et al. 2004: 11x11 Gaussian window, sigma 1.5, peak 1)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for a, b in zip(made.split(BATCH), truth.split(BATCH), strict=True):
        value = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        assert isinstance(value, Tensor)
        values.append(value.reshape(-1))
    return torch.cat(values).double().cpu().numpy()


def opaque_box(alpha: UInt8[np.ndarray, "n h w"], margin: int = 4) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around everything opaque in any picture, grown by `margin` pixels.

    Whole pictures where nothing is opaque. A side below 11 pixels, SSIM's window, is grown to that; what lies beyond
    the pictures is cut off, which leaves at least the 6 pixels that the window needs beside a mirrored border.
    """
    union: np.ndarray = np.any(alpha >= OPAQUE, axis=0)
    if not union.any():
        return slice(0, alpha.shape[1]), slice(0, alpha.shape[2])
    box = []
    for axis in (1, 0):
        used = np.flatnonzero(union.any(axis))
        grow = max(margin, (11 - (used[-1] + 1 - used[0]) + 1) // 2)
        box.append(slice(max(int(used[0]) - grow, 0), int(used[-1]) + 1 + grow))
    return box[0], box[1]


def silhouette_iou(made: UInt8[np.ndarray, "n h w"], truth: UInt8[np.ndarray, "n h w"]) -> Float[np.ndarray, " n"]:
    """Intersection over union of the silhouettes (alpha at least one half); 1 where both are empty."""
    a, b = made >= OPAQUE, truth >= OPAQUE
    union = (a | b).sum((-2, -1))
    return np.where(union > 0, (a & b).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def pooled_psnr(made: Float[np.ndarray, "..."], truth: Float[np.ndarray, "..."]) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], all pixels taken as one picture's."""
    return float(-10.0 * np.log10(max(float(np.mean((made - truth) ** 2)), 1e-10)))


def pooled_iou(made: UInt8[np.ndarray, "*n"], truth: UInt8[np.ndarray, "*n"]) -> float:
    """Intersection over union of silhouettes, all pixels taken as one picture's."""
    a, b = made >= OPAQUE, truth >= OPAQUE
    return float((a & b).sum() / max((a | b).sum(), 1))


@lru_cache(maxsize=4)
def gaussian_window(size: int = WINDOW, sigma: float = SIGMA) -> Float[Tensor, "size size"]:
    """A normalised Gaussian of `sigma` pixels."""
    distance = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-distance.square() / (2 * sigma**2))
    line = (line / line.sum()).float()
    return torch.outer(line, line)


def padded_ssim(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """Mean structural similarity (Wang et al. 2004) with gradients, zeros beyond the border.

    Gaussian window of 11 pixels; `ssim` mirrors the pictures at their border, which gives other values.
    """
    channels, c1, c2 = a.shape[1], 0.01**2, 0.03**2
    kernel = upload(gaussian_window(), a.device).to(a).expand(channels, 1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return functional.conv2d(x, kernel, padding=WINDOW // 2, groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()
