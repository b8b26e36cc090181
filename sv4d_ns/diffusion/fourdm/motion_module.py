"""The temporal ("motion") module of 4Diffusion: attention along time, for each view and pixel by itself.

Source: aejion/4Diffusion @ 627d0cd, `VanillaTemporalModule`, which is AnimateDiff's module with one difference that
matters: the group norm's statistics are taken per frame.
"""

from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from jaxtyping import Float
from torch import Tensor, nn

MAX_FRAMES = 32
"""Length of the table of time positions; no window can be longer."""


class PerFrameGroupNorm(nn.GroupNorm):
    """Group norm of a film [b, c, f, h, w] with the statistics of each frame.

    diffusers' own module normalises over all frames together, which with the same weights gives other values.
    """

    def forward(self, input: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        frames = super().forward(input.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (input.shape[0], input.shape[2])).transpose(1, 2)


class MotionModule(AnimateDiffTransformer3D):
    """Two self-attentions over the frames and a feed-forward layer, around a residual connection.

    Args:
        channels: of the feature map; a multiple of 32 and of `heads`.
        heads: attention heads, 8 in the released model.
    """

    def __init__(self, channels: int, heads: int = 8):
        super().__init__(
            num_attention_heads=heads,
            attention_head_dim=channels // heads,
            in_channels=channels,
            double_self_attention=True,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=MAX_FRAMES,
        )
        self.norm = PerFrameGroupNorm(32, channels, eps=1e-6)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def on_grid(self, x: Float[Tensor, "bfn c h w"], frames: int, views: int) -> Float[Tensor, "bfn c h w"]:
        """Apply to images in (b f n) order, n fastest: the f frames of each of the n views see each other."""
        grid = x.unflatten(0, (-1, frames, views))
        films = grid.transpose(1, 2).flatten(0, 2)
        films = self(films, num_frames=frames)
        return films.unflatten(0, (-1, views, frames)).transpose(1, 2).flatten(0, 2)
