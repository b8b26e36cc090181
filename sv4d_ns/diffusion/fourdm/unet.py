"""The 4D-aware UNet of 4Diffusion (4DM), composed of diffusers modules.

Source: aejion/4Diffusion @ 627d0cd, `MultiViewUNetModel` (ImageDream's network with motion modules). It is Stable
Diffusion 2.1's UNet with four additions: the camera as a class embedding; self-attention over all views of a frame;
a second cross-attention to the tokens of the input image; a motion module after each layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from sv4d_ns.diffusion.fourdm.motion_module import MAX_FRAMES, MotionModule

CAMERA_DIM = 16
"""A camera-to-world matrix, row by row."""


@dataclass
class GridShape:
    """Frames and views of the images a forward pass is working on; set by `FourDMUNet.forward` for its layers."""

    frames: int = 1
    views: int = 1


class JointViewAttention:
    """Self-attention over the pixels of all views of a frame: (b v) l c is folded to b (v l) c."""

    def __init__(self, grid: GridShape):
        self.grid = grid
        self.inner = AttnProcessor2_0()

    def __call__(self, attn: Attention, hidden_states: Float[Tensor, "n l c"], **kwargs: Any) -> Tensor:
        folded = hidden_states.unflatten(0, (-1, self.grid.views)).flatten(1, 2)
        return self.inner(attn, folded, **kwargs).unflatten(1, (self.grid.views, -1)).flatten(0, 1)


def _apply_motion(motion: MotionModule, grid: GridShape, module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook that puts a motion module behind a transformer (which returns a tuple) or a residual block."""
    if isinstance(output, tuple):
        return (motion.on_grid(output[0], grid.frames, grid.views), *output[1:])
    return motion.on_grid(output, grid.frames, grid.views)


class FourDMUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predicts the noise of f frames times n views, the last view being the input image itself.

    The defaults are the released model: 1,394,882,180 parameters, of which 453,209,280 in motion modules.

    Args:
        block_out_channels: channels of each level, multiples of 32.
        layers_per_block: residual blocks of a level on the way down.
        attention_levels: which levels have transformers; the middle block always has one.
        attention_head_dim: channels of one attention head.
        cross_attention_dim: size of the text tokens, and of the image tokens.
        image_embed_dim: size of the image encoder's tokens.
        image_tokens: how many tokens the input image is summed up in.
        motion_heads: attention heads of the motion modules.
    """

    _supports_gradient_checkpointing = True
    config: Any  # untyped because diffusers adds its attributes at run time

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention_levels: Sequence[bool] = (True, True, True, False),
        attention_head_dim: int = 64,
        cross_attention_dim: int = 1024,
        image_embed_dim: int = 1280,
        image_tokens: int = 16,
        motion_heads: int = 8,
    ):
        super().__init__()
        levels = list(attention_levels)
        self.unet: Any = UNet2DConditionModel(
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in levels),
            up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(levels)),
            cross_attention_dim=cross_attention_dim,
            # diffusers takes the number of heads under this name
            attention_head_dim=tuple(width // attention_head_dim for width in block_out_channels),
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=CAMERA_DIM,
        )
        self.image_projection = IPAdapterPlusImageProjection(
            embed_dims=image_embed_dim,
            output_dims=cross_attention_dim,
            hidden_dims=cross_attention_dim,
            depth=4,
            dim_head=64,
            heads=12,
            num_queries=image_tokens,
            ffn_ratio=4,
        )
        self.grid = GridShape()
        self._set_attention(cross_attention_dim, image_tokens)
        self._add_motion_modules(motion_heads)

    def _set_attention(self, cross_attention_dim: int, image_tokens: int) -> None:
        processors: dict[str, Any] = {}
        for name in self.unet.attn_processors:
            attn = self.unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = (
                JointViewAttention(self.grid)
                if name.endswith("attn1.processor")
                else IPAdapterAttnProcessor2_0(attn.inner_dim, cross_attention_dim, num_tokens=(image_tokens,))
            )
        self.unet.set_attn_processor(processors)

    def _add_motion_modules(self, heads: int) -> None:
        """One behind every layer (its transformer where it has one, else its residual block)."""
        for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
            layers = getattr(block, "attentions", None) or block.resnets
            block.motion_modules = nn.ModuleList()
            for layer in layers:
                channels = layer.out_channels or layer.in_channels
                motion = MotionModule(channels, heads)
                block.motion_modules.append(motion)
                layer.register_forward_hook(partial(_apply_motion, motion, self.grid))

    def image_tokens(self, embeddings: Float[Tensor, "n l e"]) -> Float[Tensor, "n k d"]:
        """The tokens of input images, from the second-last hidden states of the image encoder.

        They depend on the input alone: computed once per run, not once per denoising step. Zero embeddings give the
        tokens of "no image", which are not zero.
        """
        return self.image_projection(embeddings)

    def forward(
        self,
        sample: Float[Tensor, "bfn c h w"],
        timestep: Int[Tensor, "bfn"] | int,
        text: Float[Tensor, "bfn s d"],
        image_tokens: Float[Tensor, "bfn k d"],
        cameras: Float[Tensor, "bfn 16"],
        num_frames: int,
        num_views: int,
        image_latents: Float[Tensor, "bf c h w"] | None = None,
    ) -> Float[Tensor, "bfn c h w"]:
        """The noise in every image, in (b f n) order with n fastest; the last view's own prediction is of no use.

        Args:
            sample: noisy latents.
            timestep: 0..999, one for each image or one for all.
            text: tokens of the prompt.
            image_tokens: see `image_tokens`.
            cameras: camera-to-world matrices with unit translation, row by row; zeros for the image view.
            num_frames: f, at most 32.
            num_views: n, the image view included.
            image_latents: clean latents that replace those of the image view.

        Raises:
            ValueError: when the number of images is not a multiple of frames times views, or f is too long.
        """
        if num_frames > MAX_FRAMES or sample.shape[0] % (num_frames * num_views):
            raise ValueError(
                f"{sample.shape[0]} images are not whole grids of {num_frames} frames (at most {MAX_FRAMES}) and "
                f"{num_views} views."
            )
        self.grid.frames, self.grid.views = num_frames, num_views
        if image_latents is not None:
            grid = sample.unflatten(0, (-1, num_views))
            sample = torch.cat([grid[:, :-1], image_latents[:, None].to(sample.dtype)], dim=1).flatten(0, 1)
        return self.unet(
            sample,
            timestep,
            # the form in which diffusers' image-prompt processors take both
            encoder_hidden_states=(text, [image_tokens]),
            class_labels=cameras.to(sample.dtype),
            return_dict=False,
        )[0]
