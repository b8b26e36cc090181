"""Novel-view video synthesis: frames of one view in, a grid of views out.

`ViewSynthesizer` is the only thing the 4D optimisation knows of the diffusion model. Stage 1 calls `generate`,
stage 2 calls `refine` (SDEdit on the whole grid); both return plain uint8 RGBA arrays.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sv4d_ns.diffusion.seams import WHITE_EDGES, BoundaryDrift
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.images import over_white, smoothstep


class ViewSynthesizer(Protocol):
    """What the 4D optimisation needs of a multi-view video model."""

    image_size: int
    """Pixels along the side of the square frames it reads and makes."""
    refine_strength: float
    """The `strength` of stage 2 this model is best at, in (0, 1]."""

    def default_plan(self) -> ViewPlan:
        """The views this model is best at."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain facts for the grid's provenance: model, weights, settings."""
        ...

    def generate(
        self, frames: UInt8[np.ndarray, "t s s 4"], plan: ViewPlan, *, seed: int, store: Path, progress: Progress
    ) -> "Views":
        """Novel views of an object video. Finished windows are kept in `store`, so a killed call resumes."""
        ...

    def refine(
        self,
        frames: UInt8[np.ndarray, "t s s 4"],
        renders: UInt8[np.ndarray, "t v s s 4"],
        plan: ViewPlan,
        *,
        strength: float,
        seed: int,
        store: Path,
        progress: Progress,
    ) -> "Views":
        """SDEdit: noise `renders` to the level `strength` in (0, 1] and denoise them given the input video."""
        ...


def to_model_space(rgba: UInt8[np.ndarray, "*batch h w 4"], channels: int) -> Float[Tensor, "*batch c h w"]:
    """Float images in [0, 1] as the model reads them: RGB on white, and alpha if it has a fourth channel."""
    white = over_white(rgba).astype(np.float32) / 255.0
    if channels == 4:
        white = np.concatenate([white, rgba[..., 3:].astype(np.float32) / 255.0], axis=-1)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(white, -1, -3)))


@dataclass(frozen=True, eq=False)
class Views:
    """What a synthesizer made."""

    images: UInt8[np.ndarray, "t v s s 4"]
    """sRGB, straight alpha."""
    confidence: UInt8[np.ndarray, "t v s s"]
    """How sure the model was of each pixel, 0..255."""
    drift: tuple[BoundaryDrift, ...] = ()
    """How far windows disagree about the frames both made, a boundary each."""
    plan: ViewPlan | None = None
    """Their cameras, from a model that knows them only afterwards; None for those that were asked for."""


def from_model_space(moments: Iterable[Float[Tensor, "v c h w"]]) -> Views:
    """The inverse of `to_model_space` for one moment's views after the other, with silhouettes made definite.

    A model with an alpha channel that samples in few steps predicts a mean: its alpha is the probability that the
    object covers the pixel. The silhouette is cut around one half (smoothstep from 1/4 to 3/4), and the probability
    becomes the confidence, (2 alpha - 1)^2: 1 where the pixel surely is or is not object, 0 on a coin's toss. A model
    without one paints on white: what differs from white by more than the noise of a decoder is foreground (smoothstep
    from 4/255 to 24/255 of the largest channel difference) and all pixels are believed. These curves are our choice.
    """
    images, confidence = zip(*map(_definite, moments), strict=True)
    return Views(np.stack(images), np.stack(confidence))


def _definite(views: Float[Tensor, "v c h w"]) -> tuple[UInt8[np.ndarray, "v h w 4"], UInt8[np.ndarray, "v h w"]]:
    values = views.detach().float().cpu().clamp(0, 1).movedim(-3, -1)
    white = values[..., :3]
    if values.shape[-1] == 4:
        coverage = values[..., 3:]
        alpha, confidence = smoothstep(coverage, 0.25, 0.75), (2.0 * coverage - 1.0) ** 2
    else:
        coverage = alpha = smoothstep((1.0 - white).amax(-1, keepdim=True), *WHITE_EDGES)
        confidence = torch.ones_like(alpha)
    # at little coverage the colour is noise divided by nearly nothing
    straight = torch.where(coverage > 0.03, (white - (1.0 - coverage)) / coverage.clamp(min=0.03), 1.0)
    rgba = torch.cat([straight.clamp(0, 1), alpha], dim=-1)
    return (rgba * 255).round().byte().numpy(), (confidence[..., 0] * 255).round().byte().numpy()


BUNDLED = "sv4d_ns bundled"
"""Name of the model of this package, in provenance and messages."""
BUNDLED_SIZE = 128
"""Pixels per side of its views: twice the network's, because the colours that the input shows are taken from it."""
