"""The multi-view video diffusion UNet of SV4D 2.0 as a diffusers model.

Source: Stability-AI/generative-models, `SpatialUNetModelWithTime`. Differences of form, none of value: see
`attention.py`. The released network ignores its `cond_motion` and `image_only_indicator` inputs; they do not exist
here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, TemporalResnetBlock, Upsample2D
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sv4d_ns.diffusion.memory import Chunks
from sv4d_ns.diffusion.sv4d.attention import AlphaBlender, CameraAttention, Conditions, MultiViewTransformer, head_count

RESNET_EPS = 1e-5


@dataclass
class MultiViewVideoUNetOutput(BaseOutput):
    """Network output F in the reference's preconditioning, [btv, out_channels, h, w]."""

    sample: Tensor


def zero_(module: nn.Module) -> None:
    """Set every parameter of the module to zero, where training must start from the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class TemporalConv(nn.Conv3d):
    """A (3, 1, 1) convolution, evaluated as a (3, 1) one over (time, pixels): equal, and twice as fast on a CPU."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Float[Tensor, "b c n h w"]) -> Float[Tensor, "b c n h w"]:
        flat = F.conv2d(x.flatten(3), self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return flat.unflatten(3, x.shape[3:])


def _activated(x: Tensor) -> Tensor:
    """SiLU of a tensor nobody else reads; in place where no gradient is recorded."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ImageResBlock(ResnetBlock2D):
    """diffusers' residual block with the options of this network only, and without its spare copies."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, temb_channels=embedding_dim, eps=RESNET_EPS
        )

    def forward(self, x: Float[Tensor, "n c h w"], embedding: Float[Tensor, "n e"]) -> Float[Tensor, "n d h w"]:
        y = self.conv1(_activated(self.norm1(x)))
        y += self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        y = self.conv2(_activated(self.norm2(y)))
        y += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y


class TemporalResBlock(TemporalResnetBlock):
    """The same along the flattened (t v) axis; its group norm is over all images of a sample."""

    def __init__(self, channels: int, embedding_dim: int):
        super().__init__(channels, channels, embedding_dim, eps=RESNET_EPS)
        self.conv1 = TemporalConv(channels)
        self.conv2 = TemporalConv(channels)

    def forward(self, x: Float[Tensor, "b c n h w"], embedding: Float[Tensor, "b n e"]) -> Float[Tensor, "b c n h w"]:
        y = self.conv1(_activated(self.norm1(x)))
        y += self.time_emb_proj(F.silu(embedding)).transpose(1, 2)[..., None, None]
        y = self.conv2(_activated(self.norm2(y)))
        y += x
        return y


class SpatioTemporalResBlock(nn.Module):
    """A residual block inside each image, blended with one along the flattened (t v) axis.

    The temporal convolution runs over t*v as the reference's does: its taps reach neighbouring views and wrap from the
    last view of a frame to the first view of the next, and its group norm is over all images of a sample.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__()
        self.spatial_res_block = ImageResBlock(in_channels, out_channels, embedding_dim)
        self.temporal_res_block = TemporalResBlock(out_channels, embedding_dim)
        self.time_mixer = AlphaBlender(0.0)
        zero_(self.spatial_res_block.conv2)
        zero_(self.temporal_res_block.conv2)

    def forward(self, x: Float[Tensor, "btv c h w"], conditions: Conditions) -> Float[Tensor, "btv d h w"]:
        samples = conditions.context.shape[0]
        x = self.spatial_res_block(x, conditions.embedding)
        film = x.unflatten(0, (samples, -1)).transpose(1, 2).contiguous()
        mixed = self.temporal_res_block(film, conditions.embedding.unflatten(0, (samples, -1)))
        return self.time_mixer(film, mixed).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class _Layers:
    """What all blocks of one network have in common."""

    head_dim: int
    context_dim: int
    reference_channels: int
    embedding_dim: int
    camera_attention: CameraAttention
    chunks: Chunks

    def resnet(self, in_channels: int, out_channels: int) -> SpatioTemporalResBlock:
        return SpatioTemporalResBlock(in_channels, out_channels, self.embedding_dim)

    def transformer(self, channels: int) -> MultiViewTransformer:
        head_count(channels, self.head_dim)
        return MultiViewTransformer(
            channels,
            self.head_dim,
            self.context_dim,
            self.reference_channels,
            self.embedding_dim,
            self.camera_attention,
            self.chunks,
        )


class _Block(nn.Module):
    """Residual blocks, each followed by a transformer where the level has attention."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # set by ModelMixin.enable_gradient_checkpointing

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def _layer(self, index: int, x: Tensor, conditions: Conditions) -> Tensor:
        x = self._run(self.resnets[index], x, conditions)
        if index < len(self.attentions):
            x = self._run(self.attentions[index], x, conditions)
        return x


class DownBlock(_Block):
    """One level of the way down; returns the features and every skip connection it leaves."""

    def __init__(
        self, layers: _Layers, in_channels: int, out_channels: int, depth: int, attention: bool, downsample: bool
    ):
        super().__init__(
            [layers.resnet(in_channels if i == 0 else out_channels, out_channels) for i in range(depth)],
            [layers.transformer(out_channels) for _ in range(depth if attention else 0)],
        )
        samplers = [Downsample2D(out_channels, use_conv=True, padding=1, name="op")] if downsample else []
        self.downsamplers = nn.ModuleList(samplers)

    def forward(self, x: Tensor, conditions: Conditions) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for index in range(len(self.resnets)):
            x = self._layer(index, x, conditions)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(_Block):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, layers: _Layers, channels: int):
        super().__init__([layers.resnet(channels, channels) for _ in range(2)], [layers.transformer(channels)])

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        return self._layer(1, self._layer(0, x, conditions), conditions)


class UpBlock(_Block):
    """One level of the way up; joins one skip connection per residual block, the last one first."""

    def __init__(
        self,
        layers: _Layers,
        in_channels: int,
        skip_channels: Sequence[int],
        out_channels: int,
        attention: bool,
        upsample: bool,
    ):
        widths = [in_channels, *[out_channels] * (len(skip_channels) - 1)]
        super().__init__(
            [layers.resnet(w + s, out_channels) for w, s in zip(widths, skip_channels, strict=True)],
            [layers.transformer(out_channels) for _ in range(len(skip_channels) if attention else 0)],
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels, use_conv=True)] if upsample else [])

    def forward(self, x: Tensor, skips: Sequence[Tensor], conditions: Conditions) -> Tensor:
        for index, skip in enumerate(reversed(skips)):
            x = self._layer(index, torch.cat([x, skip], dim=1), conditions)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MultiViewVideoUNet(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Denoiser of T frames times V novel views of one object. The defaults are the released SV4D 2.0 network.

    Args:
        in_channels: noisy latents plus the concatenated latents of the input frame.
        out_channels: latent channels.
        block_out_channels: channels of each level, multiples of 32 (and of `attention_head_dim` where a level attends).
        layers_per_block: residual blocks of a level on the way down (one more on the way up).
        attention_levels: which levels have transformers; the middle block always has one.
        attention_head_dim: channels of one head.
        cross_attention_dim: size of the image embeddings.
        reference_channels: channels of the reference latents.
        projection_class_embeddings_input_dim: size of the camera vector of an image.
        camera_attention: a `CameraAttention` value.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: Any = ("SpatioTemporalResBlock", "MultiViewTransformer")
    _repeated_blocks: Any = ("SpatioTemporalResBlock", "MultiViewTransformer")
    _skip_layerwise_casting_patterns: Any = ("norm", "conv_in", "conv_out")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention_levels: Sequence[bool] = (True, True, True, False),
        attention_head_dim: int = 64,
        cross_attention_dim: int = 1024,
        reference_channels: int = 4,
        projection_class_embeddings_input_dim: int = 1280,
        camera_attention: str = CameraAttention.RELEASED.value,
    ):
        super().__init__()
        if len(attention_levels) != len(block_out_channels):
            raise ValueError(
                f"attention_levels has {len(attention_levels)} entries for {len(block_out_channels)} levels."
            )
        # an enum member given here is stored as its text, so that the configuration stays plain JSON
        self.register_to_config(camera_attention=CameraAttention(camera_attention).value)
        channels = tuple(block_out_channels)
        embedding_dim = 4 * channels[0]
        layers = _Layers(
            attention_head_dim,
            cross_attention_dim,
            reference_channels,
            embedding_dim,
            CameraAttention(camera_attention),
            Chunks("bytes of features in the transformers"),
        )
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], embedding_dim)
        self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, embedding_dim)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        last = len(channels) - 1
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        for level, width in enumerate(channels):
            block = DownBlock(
                layers, skips[-1], width, layers_per_block, attention_levels[level], downsample=level < last
            )
            self.down_blocks.append(block)
            skips += [width] * (layers_per_block + (level < last))

        self.mid_block = MidBlock(layers, channels[-1])

        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level in range(last, -1, -1):
            skip_channels = [skips.pop() for _ in range(layers_per_block + 1)]
            self.up_blocks.append(
                UpBlock(layers, width, skip_channels, channels[level], attention_levels[level], upsample=level > 0)
            )
            width = channels[level]

        self.conv_norm_out = nn.GroupNorm(32, width, eps=RESNET_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        zero_(self.conv_out)

    def forward(
        self,
        sample: Float[Tensor, "btv c h w"],
        timestep: Float[Tensor, "btv"] | Float[Tensor, ""] | float,
        encoder_hidden_states: Float[Tensor, "b t d"],
        class_labels: Float[Tensor, "btv p"],
        reference_latents: Float[Tensor, "bv r H W"],
        return_dict: bool = True,
    ) -> MultiViewVideoUNetOutput | tuple[Tensor]:
        """Predict the network output for T frames times V views of B samples, flattened (b t v), v fastest.

        Args:
            sample: scaled noisy latents, concatenated with the latents of each image's input frame.
            timestep: c_noise = ln(sigma)/4, one per image or one for all.
            encoder_hidden_states: one image embedding per input frame; gives B and T, and so V.
            class_labels: camera vector of every image.
            reference_latents: latents of the V views of the window's first frame where known, else zeros; any size.
            return_dict: a `MultiViewVideoUNetOutput`, or a tuple of one tensor.

        Raises:
            ValueError: when the sizes of the inputs do not fit together.
        """
        b, t, v = _grid_of(sample, encoder_hidden_states, class_labels, reference_latents)
        timestep = torch.as_tensor(timestep, device=sample.device).expand(b * t * v)
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        embedding = embedding + self.add_embedding(class_labels.to(sample.dtype))
        conditions = Conditions(
            embedding,
            embedding.unflatten(0, (b, t, v))[:, 0],
            encoder_hidden_states.to(sample.dtype),
            reference_latents.to(sample.dtype),
        )

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, left = block(x, conditions)
            skips += left
        x = self.mid_block(x, conditions)
        for block in self.up_blocks:
            taken = self.config["layers_per_block"] + 1
            # handed over, not popped inside: offloading hooks give a block copies of its lists
            x = block(x, skips[-taken:], conditions)
            del skips[-taken:]
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return MultiViewVideoUNetOutput(sample=x) if return_dict else (x,)


def _grid_of(sample: Tensor, context: Tensor, labels: Tensor, references: Tensor) -> tuple[int, int, int]:
    """(B, T, V) from the shapes of the inputs, which must agree."""
    if context.ndim != 3:
        raise ValueError(f"encoder_hidden_states must be [B, T, D], got {tuple(context.shape)}.")
    b, t = context.shape[:2]
    v, rest = divmod(sample.shape[0], b * t)
    if rest or v == 0:
        raise ValueError(f"{sample.shape[0]} images are not a multiple of B*T = {b}*{t}.")
    if labels.shape[0] != sample.shape[0]:
        raise ValueError(f"class_labels has {labels.shape[0]} rows for {sample.shape[0]} images.")
    if references.shape[0] != b * v:
        raise ValueError(f"reference_latents has {references.shape[0]} images, expected B*V = {b * v}.")
    return b, t, v
