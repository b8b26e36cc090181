"""The transformer of the multi-view video UNet: attention in space, across cameras, and along time.

Source: Stability-AI/generative-models, `PostHocSpatialTransformerWithTimeMixingAndMotion` and
`BasicTransformerTimeMixBlock`; behaviour as verified against it, composed of diffusers modules.

Every cross-attention of this network sees exactly one context token, so its softmax is 1 and the attention is a linear
map of that token. `norm2`, `attn2.to_q` and `attn2.to_k` are kept as parameters (checkpoints have them) and never
evaluated; they therefore receive no gradient.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sv4d_ns.diffusion.memory import Chunks, feature_bytes_at_once

# CUDA attention kernels put the batch on a grid axis of at most 65535 blocks; at 576 px the released model's camera
# attention has 124 416 sequences.
MAX_ATTENTION_BATCH = 65535

# Values of a feed-forward layer's gates worked on at once on a CPU: two such buffers (1 MiB each in float32) fill its
# second-level cache; with smaller ones the calls cost more than the cache saves.
CACHED_VALUES = 2**18


def stays_in_cache(x: Tensor) -> bool:
    """Whether to work in place on few rows at once, which a CPU's cache then holds; elsewhere on whole tensors.

    That is float32 on a CPU where no gradient is recorded, nothing is cast, and no compiler fuses the steps itself.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return on_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class CameraAttention(str, Enum):
    """Which tokens attend to each other in the camera block (no parameter depends on it).

    RELEASED: V consecutive entries of the flattened (view, pixel) axis of one frame, with the frame vectors misaligned,
        exactly as the released 4-view model runs (`use_3d_attention=True`): in effect V neighbouring pixels of a view.
    PER_VIEW_PIXEL: the V views of one pixel of one frame (`use_3d_attention=False`, the released 8-view model).
    FULL_3D: all pixels of all V views of one frame; what the paper describes, for models trained here.
    """

    RELEASED = "released"
    PER_VIEW_PIXEL = "per_view_pixel"
    FULL_3D = "full_3d"


@dataclass(frozen=True)
class Conditions:
    """What every block of one forward pass is conditioned on.

    Attributes:
        embedding: time and camera embedding of every image, in (b t v) order.
        view_embedding: the same of frame 0 only, which is all the camera block looks at.
        context: one image embedding per input frame.
        references: latents of the known views of the window's first frame (zeros where unknown).
    """

    embedding: Float[Tensor, "btv e"]
    view_embedding: Float[Tensor, "b v e"]
    context: Float[Tensor, "b t d"]
    references: Float[Tensor, "bv r H W"]

    @property
    def grid(self) -> tuple[int, int, int]:
        """(B, T, V)."""
        return self.context.shape[0], self.context.shape[1], self.view_embedding.shape[1]


class AlphaBlender(nn.Module):
    """sigmoid(mix_factor) * first + (1 - sigmoid(mix_factor)) * second.

    The reference's AlphaBlender also takes an image-only indicator, which it multiplies by zero everywhere.
    """

    def __init__(self, initial: float):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([initial]))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.lerp(second, first, torch.sigmoid(self.mix_factor).to(first.dtype))


class ChunkedAttnProcessor:
    """Self-attention through diffusers' attention back ends, in batches the kernels accept."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "n s c"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> Float[Tensor, "n s c"]:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("This processor does self-attention without a mask only.")
        return attn.to_out[0](self.mixed_values(attn, hidden_states))

    def mixed_values(self, attn: Attention, x: Float[Tensor, "n s c"]) -> Float[Tensor, "n s c"]:
        """What the output projection is given."""
        if len(x) <= MAX_ATTENTION_BATCH:
            return self._mixed_values(attn, x)
        return torch.cat([self._mixed_values(attn, part) for part in x.split(MAX_ATTENTION_BATCH)])

    def _mixed_values(self, attn: Attention, x: Tensor) -> Tensor:
        query, key, value = (to(x).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        mixed = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return mixed.flatten(-2).to(query.dtype)


def _self_attention() -> Any:
    """The processor, untyped because diffusers' annotation names its own classes only."""
    return ChunkedAttnProcessor()


def single_token_attention(attn: Attention, context: Float[Tensor, "... d"]) -> Float[Tensor, "... c"]:
    """What cross-attention to one token adds to every query: its projected value, whatever the query."""
    return attn.to_out[0](attn.to_v(context))


class GatedFeedForward(FeedForward):
    """diffusers' GEGLU feed-forward layer, with its first projection made in two halves.

    The halves of one projection are strided views, on which GELU and product take twice as long on a CPU.
    """

    def __init__(self, dim: int):
        super().__init__(dim, activation_fn="geglu")

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        proj: Any = self.net[0].proj
        if is_plain(proj):
            values, gates = (F.linear(x, *half) for half in zip(proj.weight.chunk(2), proj.bias.chunk(2), strict=True))
        else:
            values, gates = proj(x).chunk(2, dim=-1)
        return self.net[2](_gated(values, gates))

    def added_to(self, residual: Float[Tensor, "... c"], x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """residual + forward(x)."""
        proj: Any = self.net[0].proj
        if stays_in_cache(x) and is_plain(self, type(self)) and is_plain(proj) and is_plain(self.net[2]):
            return self._added_by_rows(residual, x)
        y = self(x)
        y += residual
        return y

    def _added_by_rows(self, residual: Tensor, x: Tensor) -> Tensor:
        proj: Any = self.net[0].proj
        out: Any = self.net[2]
        (to_values, to_gates), (value_bias, gate_bias) = proj.weight.t().chunk(2, dim=1), proj.bias.chunk(2)
        x, y = x.flatten(0, -2), (residual + out.bias).flatten(0, -2)
        at_once = min(max(1, CACHED_VALUES // out.in_features), len(x))
        buffers = [x.new_empty(at_once, out.in_features) for _ in range(2)]
        for rows, added in zip(x.split(at_once), y.split(at_once), strict=True):
            values, gates = (buffer[: len(rows)] for buffer in buffers)
            torch.ops.aten.gelu_(torch.mm(rows, to_gates, out=gates).add_(gate_bias))
            torch.mm(rows, to_values, out=values).add_(value_bias).mul_(gates)
            added.addmm_(values, out.weight.t())
        return y.view_as(residual)


def _gated(values: Tensor, gates: Tensor) -> Tensor:
    """values * GELU(gates); overwrites both where no gradient is recorded."""
    if torch.is_grad_enabled():
        return values * F.gelu(gates)
    return values.mul_(torch.ops.aten.gelu_(gates))


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling the layer is no more than its own arithmetic: no adapter, offloading, casting or other hook."""
    hooked = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is kind and not hooked


class SpatialBlock(nn.Module):
    """Self-attention inside each image, then the frame's image embedding, then a feed-forward layer.

    The names inside are those of diffusers' BasicTransformerBlock.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int, chunks: Chunks):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads, dim_head=head_dim, processor=_self_attention())
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim=context_dim, heads=heads, dim_head=head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GatedFeedForward(dim)
        self._chunks = chunks

    def forward(self, x: Float[Tensor, "b t v p c"], context: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v p c"]:
        return self._in_chunks(x, context)

    def _in_chunks(self, x: Float[Tensor, "... s c"], context: Float[Tensor, "... d"]) -> Float[Tensor, "... s c"]:
        """Sequences are independent of each other; neighbours share a context where there are fewer of them."""
        sequences = x.flatten(0, -3)
        added = single_token_attention(self.attn2, context).flatten(0, -2)
        share = len(sequences) // len(added)

        def part(start: int, stop: int) -> Tensor:
            if share == 1:
                return self._attend(sequences[start:stop], added[start:stop, None])
            rows = torch.arange(start, stop, device=added.device) // share
            return self._attend(sequences[start:stop], added[rows, None])

        # queries, keys and values, or the feed-forward layer's two halves
        widest = (3 if stays_in_cache(x) else 8) * sequences[0].numel() * sequences.element_size()
        return self._chunks.run(part, len(sequences), feature_bytes_at_once(x.device), cost=widest).view_as(x)

    def _attend(self, x: Float[Tensor, "n s c"], added: Float[Tensor, "n 1 c"]) -> Float[Tensor, "n s c"]:
        y = self._attended(x, added)
        return self.ff.added_to(y, self.norm3(y))

    def _attended(self, x: Float[Tensor, "n s c"], added: Float[Tensor, "n 1 c"]) -> Float[Tensor, "n s c"]:
        attn: Any = self.attn1
        out: Any = attn.to_out[0]
        ours = is_plain(attn, Attention) and isinstance(attn.processor, ChunkedAttnProcessor)
        if ours and is_plain(out) and stays_in_cache(x):  # the residual connection within the output projection
            y = (x + (added + out.bias)).flatten(0, 1)
            return y.addmm_(attn.processor.mixed_values(attn, self.norm1(x)).flatten(0, 1), out.weight.t()).view_as(x)
        y = attn(self.norm1(x))
        y += x
        y += added
        return y


class GroupBlock(SpatialBlock):
    """The block shared by the camera and the time attention; attends over the second last axis.

    The names inside are those of diffusers' TemporalBasicTransformerBlock.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int, chunks: Chunks):
        super().__init__(dim, heads, head_dim, context_dim, chunks)
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = GatedFeedForward(dim)

    def forward(self, x: Float[Tensor, "b n m s c"], context: Float[Tensor, "b n #m d"]) -> Float[Tensor, "b n m s c"]:
        return self._in_chunks(x, context)

    def _attend(self, x: Float[Tensor, "n s c"], added: Float[Tensor, "n 1 c"]) -> Float[Tensor, "n s c"]:
        return super()._attend(self.ff_in.added_to(x, self.norm_in(x)), added)


def to_camera_groups(x: Float[Tensor, "b t v p c"], kind: CameraAttention) -> Float[Tensor, "b t m s c"]:
    """Arrange tokens so that those which attend to each other form the second last axis.

    The second axis is the frame whose image embedding conditions the group: for RELEASED it is not the frame the
    tokens belong to (the reference orders groups (group, frame) and embeddings (frame, pixel)).
    """
    b, t, v, p, c = x.shape
    if kind is CameraAttention.FULL_3D:
        return x.reshape(b, t, 1, v * p, c)
    if kind is CameraAttention.PER_VIEW_PIXEL:
        return x.transpose(2, 3)
    groups = x.reshape(b, t, p, v, c).transpose(1, 2)  # consecutive tokens of (v p) become (group, member)
    return groups.reshape(b, t, p, v, c)


def from_camera_groups(
    groups: Float[Tensor, "b t m s c"], kind: CameraAttention, views: int
) -> Float[Tensor, "b t v p c"]:
    """The inverse of `to_camera_groups`."""
    b, t, m, s, c = groups.shape
    if kind is CameraAttention.FULL_3D:
        return groups.reshape(b, t, views, s // views, c)
    if kind is CameraAttention.PER_VIEW_PIXEL:
        return groups.transpose(2, 3)
    return groups.reshape(b, m, t, s, c).transpose(1, 2).reshape(b, t, views, m, c)


class MultiViewTransformer(nn.Module):
    """Spatial, camera and time attention of one layer, around a residual connection.

    Args:
        channels: of the feature map; a multiple of 32 and of `head_dim`.
        head_dim: channels of one attention head.
        context_dim: of the image embeddings.
        reference_channels: of the reference latents, the context of the time attention.
        embedding_dim: of the time and camera embedding.
        camera_attention: see `CameraAttention`.
        chunks: shared by all layers of a network, so that one learns from another's lack of memory.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        context_dim: int,
        reference_channels: int,
        embedding_dim: int,
        camera_attention: CameraAttention,
        chunks: Chunks,
    ):
        super().__init__()
        heads = channels // head_dim
        self.camera_attention = camera_attention
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(channels, heads, head_dim, context_dim, chunks)])
        self.view_transformer_blocks = nn.ModuleList([GroupBlock(channels, heads, head_dim, context_dim, chunks)])
        self.frame_transformer_blocks = nn.ModuleList(
            [GroupBlock(channels, heads, head_dim, reference_channels, chunks)]
        )
        self.view_embed = TimestepEmbedding(embedding_dim, 4 * channels, out_dim=channels)
        self.frame_position = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.frame_embed = TimestepEmbedding(channels, 4 * channels, out_dim=channels)
        self.view_mixer = AlphaBlender(0.0)
        self.frame_mixer = AlphaBlender(0.5)
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Float[Tensor, "btv c h w"], conditions: Conditions) -> Float[Tensor, "btv c h w"]:
        b, t, v = conditions.grid
        h, w = x.shape[-2:]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2)).unflatten(0, (b, t, v))
        tokens = self.transformer_blocks[0](tokens, conditions.context)
        tokens = self.view_mixer(tokens, self._across_cameras(tokens, conditions))
        tokens = self.frame_mixer(tokens, self._along_time(tokens, conditions, (h, w)))
        tokens = self.proj_out(tokens.flatten(0, 2))
        return x + tokens.transpose(1, 2).unflatten(-1, (h, w))

    def _across_cameras(self, tokens: Float[Tensor, "b t v p c"], conditions: Conditions) -> Tensor:
        placed = tokens + self.view_embed(conditions.view_embedding)[:, None, :, None]
        groups = to_camera_groups(placed, self.camera_attention)
        groups = self.view_transformer_blocks[0](groups, conditions.context[:, :, None])
        return from_camera_groups(groups, self.camera_attention, tokens.shape[2])

    def _along_time(self, tokens: Float[Tensor, "b t v p c"], conditions: Conditions, size: tuple[int, int]) -> Tensor:
        b, t, v = conditions.grid
        position = self.frame_position(torch.arange(t, device=tokens.device)).to(tokens.dtype)
        placed = tokens + self.frame_embed(position)[None, :, None, None]
        references = F.interpolate(conditions.references, size=size, mode="bilinear", align_corners=False)
        references = references.unflatten(0, (b, v)).flatten(3).transpose(2, 3)
        series = placed.permute(0, 2, 3, 1, 4)
        series = self.frame_transformer_blocks[0](series, references)
        return series.permute(0, 3, 1, 2, 4)


def head_count(channels: int, head_dim: int) -> int:
    """Attention heads of a level; raises ValueError where the channels do not divide."""
    if channels % 32 or channels % head_dim:
        raise ValueError(f"{channels} channels must be a multiple of {math.lcm(32, head_dim)} (32 groups, head size).")
    return channels // head_dim
