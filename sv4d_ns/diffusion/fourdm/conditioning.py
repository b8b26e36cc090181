"""What 4DM is told: the prompt, the input frames, the cameras; and how these become the rows of one network call.

Source: aejion/4Diffusion @ 627d0cd, the guidance of its 4D stage and `scripts/demo.py`.
"""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

NEGATIVE_PROMPT = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, bad "
    "proportions"
)
"""Of the 4D stage. The double spaces of the next one are the reference's."""
SAMPLING_NEGATIVE_PROMPT = (
    "uniform low no texture ugly, boring, bad anatomy, blurry, pixelated,  obscure, unnatural colors, poor lighting, "
    "dull, and unclear."
)


class TokenOrder(str, Enum):
    """Which frame's image tokens an image of the grid gets.

    FRAME: those of its own frame; what the network was trained with and the 4D stage uses.
    DEMO_SCRIPT: image k of the flattened (f n) grid those of frame k mod f, as the published sampling script does by
        an oversight; only for comparison with its results.
    """

    FRAME = "frame"
    DEMO_SCRIPT = "demo_script"


@dataclass(frozen=True)
class FourDMCondition:
    """Everything one window of f frames is conditioned on.

    Attributes:
        text: tokens of the prompt.
        negative_text: tokens of the negative prompt.
        image_tokens: tokens of every input frame (`FourDMUNet.image_tokens`).
        no_image_tokens: what the same projection makes of zeros.
        image_latents: scaled latents of every input frame.
    """

    text: Float[Tensor, "s d"]
    negative_text: Float[Tensor, "s d"]
    image_tokens: Float[Tensor, "f k d"]
    no_image_tokens: Float[Tensor, "k d"]
    image_latents: Float[Tensor, "f c h w"]

    @property
    def num_frames(self) -> int:
        """f."""
        return len(self.image_tokens)

    def frames(self, indices: list[int]) -> "FourDMCondition":
        """The condition of some of the frames."""
        return replace(self, image_tokens=self.image_tokens[indices], image_latents=self.image_latents[indices])


@dataclass(frozen=True)
class NetworkRows:
    """The arguments of one call of `FourDMUNet` beside the sample and the time, for the batch [uncond, cond].

    Rows are in (b f n) order; n counts the views and, last, the image view, whose camera is all zeros.
    """

    text: Float[Tensor, "bfn s d"]
    image_tokens: Float[Tensor, "bfn k d"]
    cameras: Float[Tensor, "bfn 16"]
    image_latents: Float[Tensor, "bf c h w"]
    num_frames: int
    num_views: int


def flat_cameras(c2w: Float[Tensor, "v 4 4"]) -> Float[Tensor, "v 16"]:
    """Camera-to-world matrices (OpenGL, z up, azimuth 0 at +x) row by row, the translation scaled to length one."""
    scaled = c2w.clone()
    position = scaled[:, :3, 3]
    scaled[:, :3, 3] = position / (position.norm(dim=-1, keepdim=True) + 1e-8)
    return scaled.flatten(1)


def network_rows(
    condition: FourDMCondition, cameras: Float[Tensor, "v 16"], order: TokenOrder = TokenOrder.FRAME
) -> NetworkRows:
    """Lay out one window for classifier-free guidance.

    Without condition the network gets the negative prompt, the tokens of "no image" and zero latents, and still the
    cameras.
    """
    frames, views = condition.num_frames, len(cameras) + 1
    count = frames * views
    with_image_view = torch.cat([cameras, torch.zeros_like(cameras[:1])])
    row = torch.arange(count, device=cameras.device)
    frame_of = row // views if order is TokenOrder.FRAME else row % frames
    no_image = condition.no_image_tokens.expand(count, -1, -1)
    return NetworkRows(
        text=torch.cat([condition.negative_text.expand(count, -1, -1), condition.text.expand(count, -1, -1)]),
        image_tokens=torch.cat([no_image, condition.image_tokens[frame_of]]),
        cameras=with_image_view.repeat(2 * frames, 1),
        image_latents=torch.cat([torch.zeros_like(condition.image_latents), condition.image_latents]),
        num_frames=frames,
        num_views=views,
    )


def composite(rgba: UInt8[np.ndarray, "*batch h w 4"], background: float = 1.0) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Straight-alpha pictures on a grey of [0, 1], truncated to 8 bits as the reference's conditioning images are."""
    alpha = rgba[..., 3:].astype(np.float32) / 255.0
    colour = rgba[..., :3].astype(np.float32) * alpha + 255.0 * background * (1.0 - alpha)
    return colour.astype(np.uint8)
