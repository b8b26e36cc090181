"""How far two windows disagree about the frames both of them made.

Windows of a long video overlap by at least one frame. The later window is given the earlier one's pictures of its first
frame as references and makes that frame again; what comes out differently there adds up from window to window. The
three figures are our own choice: all of the picture, its colour alone, and its silhouette alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WHITE_EDGES = (4 / 255, 24 / 255)
"""Largest channel difference from white below which a pixel of a model without alpha is background, and above which it
is object: more than the noise of a decoder (our choice)."""

FLOOR = 1e-10
"""Smallest mean squared error told apart from none: 100 dB."""


@dataclass(frozen=True)
class BoundaryDrift:
    """Two windows about the frames they share, over all views; the later one's pictures are kept.

    Attributes:
        frame: the first frame both made.
        frames: how many both made.
        psnr: of the later against the earlier one, RGB on white in [0, 1], dB; at most 100.
        colour_shift: mean of later minus earlier where both see the object, in 8-bit levels, of the channel in which it
            is largest; 0 where they nowhere do.
        iou: intersection over union of the silhouettes, mean over pictures; 1 where both are empty.
    """

    frame: int
    frames: int
    psnr: float
    colour_shift: float
    iou: float


def silhouettes(images: Float[Tensor, "*batch c h w"]) -> Bool[Tensor, "*batch h w"]:
    """Where a picture in [0, 1] shows the object: alpha from one half, or without alpha what is not white."""
    if images.shape[-3] == 4:
        return images[..., 3, :, :] >= 0.5
    return (1 - images).amax(dim=-3) >= sum(WHITE_EDGES) / 2


def boundary_drift(frame: int, earlier: Float[Tensor, "n v c h w"], later: Float[Tensor, "n v c h w"]) -> BoundaryDrift:
    """Compare the pictures of the shared frames, in [0, 1], RGB on white and perhaps alpha."""
    first, second = earlier[:, :, :3], later[:, :, :3]
    masks = silhouettes(earlier), silhouettes(later)
    both, either = masks[0] & masks[1], masks[0] | masks[1]
    areas, unions = both.flatten(2).sum(-1).double(), either.flatten(2).sum(-1).double()
    iou = torch.where(unions > 0, areas / unions.clamp(min=1), torch.ones_like(unions))
    shift = ((second - first) * both[:, :, None]).double().sum(dim=(0, 1, 3, 4)) / both.sum().clamp(min=1)
    error = (second - first).double().square().mean().clamp(min=FLOOR)
    return BoundaryDrift(
        frame=frame,
        frames=len(earlier),
        psnr=round((-10 * error.log10()).item(), 3),
        colour_shift=round(255 * shift[shift.abs().argmax()].item(), 3),
        iou=round(iou.mean().item(), 4),
    )


def drift_line(boundaries: Sequence[BoundaryDrift]) -> str:
    """One line about all boundaries of a video; empty for none."""
    if not boundaries:
        return ""
    psnr = [boundary.psnr for boundary in boundaries]
    iou = [boundary.iou for boundary in boundaries]
    worst = min(boundaries, key=lambda boundary: boundary.psnr)
    colour = max((boundary.colour_shift for boundary in boundaries), key=abs)
    count = "1 window boundary" if len(boundaries) == 1 else f"{len(boundaries)} window boundaries"
    return (
        f"Drift over {count}: PSNR {sum(psnr) / len(psnr):.1f} dB (worst {worst.psnr:.1f} at frame {worst.frame + 1}), "
        f"colour {colour:+.1f} of 255 levels at most, silhouette IoU {sum(iou) / len(iou):.3f} (worst {min(iou):.3f})."
    )
