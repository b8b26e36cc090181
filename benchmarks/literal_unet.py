"""The SV4D 2.0 network written the long way, as the released code computes it, to measure `MultiViewVideoUNet` against.

Every cross-attention projects queries, keys and values and takes the softmax over its one token; contexts are repeated
to one row per sequence; attention is an explicit softmax over batches of at most 32768; temporal convolutions are
three-dimensional ones. Modules carry the released files' names, so that `checkpoints.restore_unet` fills them.
Source: the behaviour of Stability-AI/generative-models, `SpatialUNetModelWithTime`; none of its code.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION_BATCH = 32768


def sinusoid(values: Float[Tensor, "n"], dim: int) -> Float[Tensor, "n dim"]:
    """[cos | sin] at dim/2 frequencies from 1 down to about 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = values[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Mixer(nn.Module):
    """sigmoid(mix_factor) * first + (1 - sigmoid(mix_factor)) * second."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        return alpha * first + (1 - alpha) * second


class ResBlock(nn.Module):
    """A residual block on [b c h w], or on [b c n h w] with a (3, 1, 1) kernel."""

    def __init__(self, channels: int, out: int, embedding: int, temporal: bool) -> None:
        super().__init__()

        def conv(inputs: int) -> nn.Module:
            if temporal:
                return nn.Conv3d(inputs, out, (3, 1, 1), padding=(1, 0, 0))
            return nn.Conv2d(inputs, out, 3, padding=1)

        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), conv(channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), conv(out))
        self.skip_connection = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift = self.emb_layers(embedding)
        h = self.in_layers(x)
        shift = shift[..., None, None] if x.ndim == 4 else shift.transpose(1, 2)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h + shift)


class VideoResBlock(ResBlock):
    """A residual block inside each image, mixed with one over the flattened (t v) axis."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__(channels, out, embedding, temporal=False)
        self.time_mix_blocks = ResBlock(out, out, embedding, temporal=True)
        self.time_mixer = Mixer()

    def forward(self, x: Tensor, state: "State") -> Tensor:  # type: ignore[override]
        x = super().forward(x, state.embedding)
        film = x.unflatten(0, (state.b, -1)).transpose(1, 2).contiguous()
        mixed = self.time_mix_blocks(film, state.embedding.unflatten(0, (state.b, -1)))
        return self.time_mixer(film, mixed).transpose(1, 2).flatten(0, 1).contiguous()


class CrossAttention(nn.Module):
    """Multi-head attention with an explicit softmax, in batches of (sequence, head)."""

    def __init__(self, channels: int, head_dim: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context or channels, channels, bias=False)
        self.to_v = nn.Linear(context or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Float[Tensor, "n s c"], context: Float[Tensor, "n k d"] | None = None) -> Tensor:
        source = x if context is None else context
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()
            for t in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        scale = query.shape[-1] ** -0.5
        parts = []
        for start in range(0, len(query), ATTENTION_BATCH):
            rows = slice(start, start + ATTENTION_BATCH)
            weights = torch.einsum("bid,bjd->bij", query[rows], key[rows]) * scale
            parts.append(torch.einsum("bij,bjd->bid", weights.softmax(dim=-1), value[rows]))
        mixed = torch.cat(parts).unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return self.to_out(mixed)


class GEGLU(nn.Module):
    """Linear; the first half times GELU of the second."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; on [n s c] with one context row for each of the n sequences."""

    def __init__(self, channels: int, head_dim: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = CrossAttention(channels, head_dim)
        self.attn2 = CrossAttention(channels, head_dim, context)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class GroupTransformerBlock(TransformerBlock):
    """The same over groups of the first axis: [(b g) s c], attention over the g."""

    def __init__(self, channels: int, head_dim: int, context: int) -> None:
        super().__init__(channels, head_dim, context)
        self.norm_in = nn.LayerNorm(channels)
        self.ff_in = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, group: int = 1) -> Tensor:
        b, s = len(x) // group, x.shape[1]
        x = x.unflatten(0, (b, group)).transpose(1, 2).flatten(0, 1).contiguous()
        x = self.ff_in(self.norm_in(x)) + x
        x = super().forward(x, context)
        return x.unflatten(0, (b, s)).transpose(1, 2).flatten(0, 1).contiguous()


class State:
    """What every layer is given: the grid, the embedding of every image, the contexts."""

    def __init__(self, embedding: Tensor, context: Tensor, cond_view: Tensor) -> None:
        self.embedding, self.context, self.cond_view = embedding, context, cond_view
        self.b, self.t = context.shape[:2]
        self.v = len(cond_view) // self.b


class VideoTransformer(nn.Module):
    """Spatial, camera and time attention around a residual connection."""

    def __init__(self, channels: int, head_dim: int, context: int, motion: int, embedding: int, joint: bool) -> None:
        super().__init__()
        self.channels, self.joint = channels, joint
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, head_dim, context)])
        self.time_mix_blocks = nn.ModuleList([GroupTransformerBlock(channels, head_dim, context)])
        self.motion_blocks = nn.ModuleList([GroupTransformerBlock(channels, head_dim, motion)])
        self.time_mix_time_embed, self.time_mix_motion_embed = (
            nn.Sequential(nn.Linear(width, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, channels))
            for width in (embedding, channels)
        )
        self.time_mixer, self.time_mixer_motion = Mixer(), Mixer()
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, state: State) -> Tensor:
        b, t, v = state.b, state.t, state.v
        height, width = x.shape[-2:]
        p = height * width
        residual = x
        x = self.proj_in(self.norm(x).flatten(2).transpose(1, 2).contiguous())  # [(b t v) p c]
        x = self.transformer_blocks[0](x, state.context.repeat_interleave(v, dim=1).flatten(0, 1)[:, None])

        per_row = state.context.repeat_interleave(p, dim=1).flatten(0, 1)[:, None]  # rows in (b t p) order
        shift = self.time_mix_time_embed(state.embedding.unflatten(0, (b, t, v))[:, 0])
        grid = x.unflatten(0, (b, t, v))
        placed = grid + shift[:, None, :, None]
        if self.joint:  # [(b v p) t c]
            x = grid.permute(0, 2, 3, 1, 4).flatten(0, 2).contiguous()
            placed = placed.permute(0, 2, 3, 1, 4).flatten(0, 2).contiguous()
        else:  # [(b v) (t p) c]
            x = grid.transpose(1, 2).flatten(0, 1).flatten(1, 2).contiguous()
            placed = placed.transpose(1, 2).flatten(0, 1).flatten(1, 2).contiguous()
        x = self.time_mixer(x, self.time_mix_blocks[0](placed, per_row, v))
        if self.joint:
            x = x.unflatten(0, (b, v, p)).permute(0, 3, 1, 2, 4)
        else:
            x = x.unflatten(0, (b, v)).unflatten(2, (t, p)).transpose(1, 2)

        x = x.flatten(2, 3).flatten(0, 1).contiguous()  # [(b t) (v p) c]
        shift = self.time_mix_motion_embed(sinusoid(torch.arange(t), self.channels)).repeat(b, 1)
        reference = F.interpolate(state.cond_view, size=(height, width), mode="bilinear")
        reference = reference.unflatten(0, (b, v)).permute(0, 1, 3, 4, 2).flatten(0, 3)[:, None].contiguous()
        x = self.time_mixer_motion(x, self.motion_blocks[0](x + shift[:, None], reference, t))

        x = self.proj_out(x.unflatten(1, (v, p)).flatten(0, 1))
        return x.transpose(1, 2).unflatten(-1, (height, width)).contiguous() + residual


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbours twice as large, and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class LiteralUNet(nn.Module):
    """The whole network; arguments as the released configuration names them."""

    def __init__(
        self,
        *,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_head_channels: int,
        context_dim: int,
        motion_context_dim: int,
        adm_in_channels: int,
        use_3d_attention: bool,
        in_channels: int = 8,
        out_channels: int = 4,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        embedding = 4 * model_channels

        def resnet(channels: int, out: int) -> nn.Module:
            return VideoResBlock(channels, out, embedding)

        def attention(channels: int, level: int) -> list[nn.Module]:
            if 2**level not in attention_resolutions:
                return []
            return [
                VideoTransformer(
                    channels, num_head_channels, context_dim, motion_context_dim, embedding, use_3d_attention
                )
            ]

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label_emb = nn.Sequential(
            nn.Sequential(nn.Linear(adm_in_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        )
        channels, last = model_channels, len(channel_mult) - 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        skips = [channels]
        for level, factor in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                out = factor * model_channels
                self.input_blocks.append(nn.ModuleList([resnet(channels, out), *attention(out, level)]))
                channels = out
                skips.append(channels)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        # the middle attends whatever the levels do
        middle = attention(channels, int(math.log2(attention_resolutions[0])))
        self.middle_block = nn.ModuleList([resnet(channels, channels), *middle, resnet(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channel_mult))):
            for index in range(num_res_blocks + 1):
                out = channel_mult[level] * model_channels
                layers = [resnet(channels + skips.pop(), out), *attention(out, level)]
                if level > 0 and index == num_res_blocks:
                    layers.append(Upsample(out))
                self.output_blocks.append(nn.ModuleList(layers))
                channels = out
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, cond_view: Tensor) -> Tensor:
        """Arguments and result as in `MultiViewVideoUNet.forward`."""
        embedding = self.time_embed(sinusoid(timesteps, self.model_channels)) + self.label_emb(y)
        state = State(embedding, context, cond_view)
        skips = []
        for layers in self.input_blocks:
            x = self._run(layers, x, state)
            skips.append(x)
        x = self._run(self.middle_block, x, state)
        for layers in self.output_blocks:
            x = self._run(layers, torch.cat([x, skips.pop()], dim=1), state)
        return self.out(x)

    def _run(self, layers: nn.Module, x: Tensor, state: State) -> Tensor:
        for layer in layers:
            x = layer(x, state) if isinstance(layer, (VideoResBlock, VideoTransformer)) else layer(x)
        return x
