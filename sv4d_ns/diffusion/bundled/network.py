"""A denoiser of multi-view video whose prediction is the render of one volume a moment.

The input frame's features are lifted along the input camera's rays into a frustum grid, completed there in 3D with
what the noised (or clean) views of other cameras show, and decoded to a volume; pictures from any camera are its
renders, so they agree with each other by construction. Frames see each other by attention along time. This is not the
architecture of SV4D 2.0 (which predicts views); docs/deviations.md says what the two have in common.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.frustum import Frustum, ball_mask, cell_points, project
from sv4d_ns.diffusion.bundled.rendering import Volume
from sv4d_ns.utils.devices import upload

SIGMA_DATA = 0.5
"""Standard deviation of pictures in [-1, 1] (EDM, arXiv 2206.00364, table 1)."""
CLEAN_SIGMA = 0.002
"""Noise level that stands for a clean reference view."""
EMPTY_ALPHA = 0.02
"""A column whose input pixel covers less than this is empty."""
HEADS = 4
MOMENTS_AT_ONCE = 4
"""Moments whose finer grids a CPU computes at once: as fast as all of them, in a third less memory. A GPU does all."""
TIME_REACH = 3
"""Frames further apart than this do not attend to each other, so that clips may be of any length."""


class ResBlock2d(nn.Module):
    """Two normalised convolutions beside a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Same shape."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(inner)))  # type: ignore[no-any-return]


class ResBlock3d(nn.Module):
    """`ResBlock2d` in space."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv3d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n c d h w"]:
        """Same shape."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(inner)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention over the second axis with a residual; `zero` starts it as the identity."""

    def __init__(self, channels: int, zero: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x: Float[Tensor, "n s c"],
        positions: Float[Tensor, "s c"] | None = None,
        mask: Bool[Tensor, "s s"] | None = None,
    ) -> Float[Tensor, "n s c"]:
        """Same shape; `positions` are added to what is attended with, `mask` is true where attention is allowed."""
        normed = self.norm(x)
        if positions is not None:
            normed = normed + positions
        q, k, v = self.qkv(normed).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SpaceTimeBlock(nn.Module):
    """Convolutions in space, attention over all cells, attention of each cell along time, and an MLP."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ResBlock3d(channels)
        self.space = Attention(channels)
        self.time = Attention(channels, zero=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Float[Tensor, "bt c d h w"], frames: int) -> Float[Tensor, "bt c d h w"]:
        """Same shape; clips of `frames` moments lie one after the other in the batch."""
        x = self.conv(x)
        shape = x.shape
        cells = self.space(x.flatten(2).transpose(1, 2))
        if frames > 1:
            tracks = cells.unflatten(0, (-1, frames)).transpose(1, 2)
            moved = self.time(tracks.flatten(0, 1), time_positions(frames, shape[1], x), time_mask(frames, x.device))
            cells = moved.unflatten(0, tracks.shape[:2]).transpose(1, 2).flatten(0, 1)
        cells = cells + self.mlp(cells)
        return cells.transpose(1, 2).reshape(shape)  # type: ignore[no-any-return]


def time_positions(frames: int, channels: int, like: Tensor) -> Float[Tensor, "t c"]:
    """Sinusoids of the frame number with periods from 4 to 64 frames."""
    rates = 2 * torch.pi / torch.logspace(2, 6, channels // 2, base=2.0)
    angles = torch.arange(frames)[:, None] * rates
    return upload(torch.cat([angles.sin(), angles.cos()], dim=-1), like.device).to(like)


def time_mask(frames: int, device: torch.device) -> Bool[Tensor, "t t"]:
    """Which frames attend to which: those at most `TIME_REACH` apart."""
    index = torch.arange(frames, device=device)
    return (index[:, None] - index).abs() <= TIME_REACH


def lift(x: Float[Tensor, "n cd h w"], depths: int) -> Float[Tensor, "n c d h w"]:
    """Channels of a picture's features spread over the depths of its rays."""
    return x.unflatten(1, (-1, depths))


def finer(x: Float[Tensor, "n c8 d h w"]) -> Float[Tensor, "n c D H W"]:
    """Groups of eight channels become the eight halves of a cell: twice the resolution along each axis."""
    n, channels, d, h, w = x.shape
    split = x.reshape(n, channels // 8, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return split.reshape(n, channels // 8, 2 * d, 2 * h, 2 * w)


class FrameEncoder(nn.Module):
    """Features of the input frame at four resolutions, on the way down and up again."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        first, second, third, fourth = widths
        self.conv_in = nn.Conv2d(6, first, 3, padding=1)
        self.down1 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.block1 = ResBlock2d(second)
        self.down2 = nn.Conv2d(second, third, 3, stride=2, padding=1)
        self.block2 = nn.Sequential(ResBlock2d(third), ResBlock2d(third))
        self.down3 = nn.Conv2d(third, fourth, 3, stride=2, padding=1)
        self.block3 = nn.Sequential(ResBlock2d(fourth), ResBlock2d(fourth))
        self.up2 = nn.Conv2d(fourth, third, 1)
        self.up2_block = ResBlock2d(third)
        self.up1 = nn.Conv2d(third, second, 1)
        self.up1_block = ResBlock2d(second)
        self.up0 = nn.Conv2d(second, first, 1)
        self.up0_block = ResBlock2d(first)

    def forward(self, x: Float[Tensor, "n 6 s s"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features at the full, half, quarter and eighth resolution."""
        f0 = self.conv_in(x)
        f1 = self.block1(self.down1(F.silu(f0)))
        f2 = self.block2(self.down2(F.silu(f1)))
        f3 = self.block3(self.down3(F.silu(f2)))
        f2 = self.up2_block(f2 + F.interpolate(self.up2(f3), scale_factor=2.0))
        f1 = self.up1_block(f1 + F.interpolate(self.up1(f2), scale_factor=2.0))
        f0 = self.up0_block(f0 + F.interpolate(self.up0(f1), scale_factor=2.0))
        return f0, f1, f2, f3


class ViewEncoder(nn.Module):
    """Features of a noised view at a quarter of its size, told its noise level."""

    def __init__(self, channels: int):
        super().__init__()
        self.patches = nn.Conv2d(4, channels, 4, stride=4)
        self.level = nn.Linear(16, channels)
        self.block = ResBlock2d(channels)

    def forward(self, views: Float[Tensor, "n 4 s s"], sigma: Float[Tensor, " n"]) -> Float[Tensor, "n c q q"]:
        """Views in [-1, 1] plus noise of standard deviation `sigma`."""
        scaled = views / (sigma.square() + SIGMA_DATA**2).sqrt()[:, None, None, None]
        rates = 2.0 ** torch.arange(8, device=sigma.device) / 8
        angles = sigma.clamp(min=CLEAN_SIGMA).log()[:, None] * rates
        told = self.level(torch.cat([angles.sin(), angles.cos()], -1).to(scaled.dtype))
        return self.block(self.patches(scaled) + told[:, :, None, None])  # type: ignore[no-any-return]


def _few(whole: Float[Tensor, "n ..."]) -> Sequence[Tensor]:
    """Its rows, moments, in parts that are computed one after the other."""
    return whole.split(MOMENTS_AT_ONCE) if whole.device.type == "cpu" else (whole,)


def _gathered(
    features: Float[Tensor, "n v c q q"], place: Float[Tensor, "n v dh w 2"], counted: Bool[Tensor, "n v d h w"]
) -> Float[Tensor, "n 2c d h w"]:
    """Mean and largest of what the counted views show at the places where they see the cells; 0 where none counts."""
    read = F.grid_sample(features.flatten(0, 1), place.flatten(0, 1), align_corners=False)
    read = read.reshape(*features.shape[:3], *counted.shape[2:])
    there = counted[:, :, None]
    weight = there.to(read.dtype)
    mean = (read * weight).sum(1) / weight.sum(1).clamp(min=1.0)
    largest = torch.where(there, read, -torch.inf).amax(1)
    return torch.cat([mean, torch.where(counted.any(1)[:, None], largest, 0.0)], 1)


@dataclass
class VolumeLogits:
    """What the network predicts, before it becomes a `Volume`."""

    density: Float[Tensor, "n d h w"]
    """Logit of the probability that a cell is inside the object."""
    colour: Float[Tensor, "n 3 i j k"]
    """sRGB in [0, 1]."""
    gate: Float[Tensor, "n i j k"]
    """Share of the input pixel's colour, in [0, 1], before occlusion."""
    possible: Bool[Tensor, "n d h w"]
    """Cells that can hold the object: inside the ball and the input's silhouette."""


class VolumeDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Volumes from an input video and noised views of it.

    Args:
        image_size: pixels per side of the pictures it reads; also the cells along each axis of the density.
        encoder_widths: channels of the frame encoder at full, half, quarter and eighth resolution.
        widths: channels in 3D at an eighth, a quarter and half of the density's resolution.
        view_channels: channels of the noised views' features.
        depth: blocks at the coarsest resolution.
    """

    config: Any  # untyped because diffusers adds its attributes at run time
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        encoder_widths: Sequence[int] = (32, 64, 128, 192),
        widths: Sequence[int] = (128, 64, 32),
        view_channels: int = 64,
        depth: int = 2,
    ):
        super().__init__()
        coarse, middle, fine = widths
        self.cells = (image_size // 8, image_size // 4, image_size // 2)
        self.encoder = FrameEncoder(encoder_widths)
        first, second, third, fourth = encoder_widths
        self.lift3 = nn.Conv2d(fourth, coarse * self.cells[0], 1)
        self.place3 = nn.Parameter(torch.zeros(1, coarse, *(self.cells[0],) * 3))
        self.views = ViewEncoder(view_channels)
        self.views_coarse = nn.Conv3d(2 * view_channels, coarse, 1)
        self.views_middle = nn.Conv3d(2 * view_channels, middle, 1)
        self.blocks = nn.ModuleList([SpaceTimeBlock(coarse) for _ in range(depth)])
        self.split2 = nn.Conv3d(coarse, 8 * middle, 1)
        self.lift2 = nn.Conv2d(third, middle * self.cells[1], 1)
        self.place2 = nn.Parameter(torch.zeros(1, middle, *(self.cells[1],) * 3))
        self.middle = nn.Sequential(ResBlock3d(middle), ResBlock3d(middle))
        self.split1 = nn.Conv3d(middle, 8 * fine, 1)
        self.lift1 = nn.Conv2d(second, fine * self.cells[2], 1)
        self.fine = nn.Conv3d(fine, fine, 3, padding=1)
        self.colour = nn.Conv3d(fine, 4, 1)
        self.density = nn.Conv3d(fine, 8, 1)
        self.profile = nn.Conv2d(first, image_size, 3, padding=1)
        self.sharpness = nn.Parameter(torch.zeros(2))
        for layer in (self.views_coarse, self.views_middle):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        nn.init.constant_(self.density.bias, -1.0)  # type: ignore[arg-type]

    def deepened(self, depth: int) -> "VolumeDenoiser":
        """A network with `depth` blocks, at least as many as this one's, that computes what this one does: those that
        are added begin as the identity."""
        shape = {name: value for name, value in self.config.items() if not name.startswith("_")}
        deeper = VolumeDenoiser(**{**shape, "depth": depth})
        deeper.load_state_dict({**deeper.state_dict(), **self.state_dict()})
        for block in list(deeper.blocks)[self.config.depth :]:
            for layer in (block.conv.conv2, block.space.out, block.time.out, block.mlp[-1]):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        return deeper

    def forward(
        self,
        frames: Float[Tensor, "b t 4 s s"],
        elevation_deg: Float[Tensor, " b"],
        known: Float[Tensor, " b"],
        views: Float[Tensor, "b t v 4 s s"],
        sigma: Float[Tensor, "b v"],
        present: Bool[Tensor, "b v"],
        to_camera: Float[Tensor, "b v 4 4"],
        frustum: Frustum,
    ) -> VolumeLogits:
        """The volumes' logits of all frames, one after the other (n = b t).

        Args:
            frames: the input video, premultiplied RGBA in [0, 1].
            elevation_deg: of the input camera above the horizon.
            known: 1 where that elevation is known, 0 where it is a guess.
            views: RGB on white and alpha in [-1, 1], plus noise.
            sigma: the noise's standard deviation in each view; 0 for clean reference views.
            present: false for views that are not to be looked at.
            to_camera: from the input camera's coordinates to each view's own (x right, y up, z forward).
            frustum: where the volume's grid lies.
        """
        t = frames.shape[1]
        flat = frames.flatten(0, 1)
        told = torch.stack([elevation_deg / 30.0 * known, known], -1).repeat_interleave(t, 0)
        planes = told[:, :, None, None].expand(-1, -1, *flat.shape[-2:]).to(flat.dtype)
        f0, f1, f2, f3 = self.encoder(torch.cat([flat * 2.0 - 1.0, planes], 1))
        seen = self._unproject(views, sigma, present, to_camera, frustum)
        x = lift(self.lift3(f3), self.cells[0]) + self.place3
        x = x + self.views_coarse(F.avg_pool3d(seen, 2))
        for block in self.blocks:
            x = block(x, t)
        # from here on moments know nothing of each other, and their grids grow
        parts = zip(*(_few(whole) for whole in (x, seen, f0, f1, f2)), strict=True)
        density, colours = (torch.cat(made) for made in zip(*(self._decode(*part) for part in parts), strict=True))
        possible = (flat[:, 3] > EMPTY_ALPHA)[:, None] & ball_mask(frustum, self.config.image_size, flat.device)
        return VolumeLogits(density, colours[:, :3], colours[:, 3], possible)

    def _decode(
        self, x: Float[Tensor, "n c i j k"], seen: Tensor, f0: Tensor, f1: Tensor, f2: Tensor
    ) -> tuple[Float[Tensor, "n d h w"], Float[Tensor, "n 4 i2 j2 k2"]]:
        """Density's logit, and colour and gate in [0, 1], of features at the coarsest resolution."""
        x = finer(self.split2(x)) + lift(self.lift2(f2), self.cells[1]) + self.place2 + self.views_middle(seen)
        x = self.middle(x)
        x = finer(self.split1(x)) + lift(self.lift1(f1), self.cells[2])
        x = F.silu(x + self.fine(F.silu(x)))
        density = finer(self.density(x))[:, 0].float() + self.profile(F.silu(f0)).float()
        return density, torch.sigmoid(self.colour(x).float())

    def _unproject(
        self,
        views: Float[Tensor, "b t v 4 s s"],
        sigma: Float[Tensor, "b v"],
        present: Bool[Tensor, "b v"],
        to_camera: Float[Tensor, "b v 4 4"],
        frustum: Frustum,
    ) -> Float[Tensor, "bt c d h w"]:
        """Mean and largest feature that the present views show at each cell of the middle grid."""
        b, t, v = views.shape[:3]
        levels = sigma[:, None].expand(b, t, v)
        features = self.views(views.flatten(0, 2), levels.flatten()).unflatten(0, (b * t, v))
        cells = cell_points(frustum, self.cells[1], views.device)
        place, inside = project(cells, to_camera.float(), frustum.tangent)
        place = place[:, None].expand(b, t, *place.shape[1:]).flatten(0, 1).flatten(2, 3)
        counted = (inside & present[:, :, None, None, None])[:, None].expand(b, t, *inside.shape[1:]).flatten(0, 1)
        # each moment's features at all its cells are large, and only for as long as they are summed up
        parts = zip(*(_few(whole) for whole in (features, place.to(features.dtype), counted)), strict=True)
        return torch.cat([_gathered(*part) for part in parts])

    def volume(self, logits: VolumeLogits, image: Float[Tensor, "n 3 p p"]) -> Volume:
        """The volume that is rendered.

        The gate is kept to the first surface along each input ray: what another surface hides is not in the picture.

        Args:
            logits: from `forward`.
            image: the input's straight colours at any size, continued beyond the silhouette.
        """
        scale, shift = self.sharpness[0].float().exp(), self.sharpness[1].float()
        density = F.softplus(logits.density * scale + shift) * logits.possible
        coarse = F.avg_pool3d(density[:, None], 2)[:, 0] * 2.0
        before = torch.cumsum(coarse, 1) - coarse
        reached = F.pad(before, (0, 0, 0, 0, 1, 0))[:, :-1]  # the surface itself may be two cells thick
        return Volume(density, logits.colour, logits.gate * torch.exp(-reached.detach()), image)
