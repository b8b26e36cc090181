"""U^2-Net-p (Qin et al., "U^2-Net: Going deeper with nested U-structure for salient object detection", 2020).

The small version: 1.1 million parameters, 64 channels between its blocks and 16 inside them. Written from the paper's
table of layers, for inference: batch normalisation is folded into the convolutions. The weights are the authors'
(Apache-2.0, `weights/README.md`); `scripts/convert_u2netp` brought them here.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "u2netp.safetensors"
SIDE = 320
"""Pixels along the side of the square pictures it was trained on."""

OUTER, INNER = 64, 16
"""Channels between and inside the blocks."""

Features = Float[Tensor, "b c h w"]


class Layer(nn.Conv2d):
    """A 3x3 convolution and ReLU."""

    def __init__(self, channels_in: int, channels_out: int, dilation: int = 1):
        super().__init__(channels_in, channels_out, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Features) -> Features:
        return super().forward(x).relu_()


class ResidualUBlock(nn.Module):
    """RSU-L of the paper: a U-Net of L layers whose output is added to its input layer's."""

    def __init__(self, layers: int, channels_in: int):
        super().__init__()
        self.entry = Layer(channels_in, OUTER)
        self.down = nn.ModuleList(Layer(INNER if level else OUTER, INNER) for level in range(layers - 1))
        self.bottom = Layer(INNER, INNER, dilation=2)
        self.up = nn.ModuleList(Layer(2 * INNER, INNER if level else OUTER) for level in reversed(range(layers - 1)))

    def forward(self, x: Features) -> Features:
        x = entered = self.entry(x)
        seen = []
        for level, layer in enumerate(self.down):
            x = layer(_halved(x) if level else x)
            seen.append(x)
        x = self.bottom(x)
        for layer in self.up:
            x = layer(torch.cat([_sized_like(x, seen[-1]), seen.pop()], dim=1))
        return x + entered


class DilatedBlock(nn.Module):
    """RSU-4F of the paper: the same without pooling, its layers' reach grown by dilation."""

    def __init__(self, channels_in: int):
        super().__init__()
        self.entry = Layer(channels_in, OUTER)
        self.down = nn.ModuleList(Layer(INNER if level else OUTER, INNER, 2**level) for level in range(3))
        self.bottom = Layer(INNER, INNER, dilation=8)
        self.up = nn.ModuleList(Layer(2 * INNER, INNER if level else OUTER, 2**level) for level in reversed(range(3)))

    def forward(self, x: Features) -> Features:
        x = entered = self.entry(x)
        seen = []
        for layer in self.down:
            x = layer(x)
            seen.append(x)
        x = self.bottom(x)
        for layer in self.up:
            x = layer(torch.cat([x, seen.pop()], dim=1))
        return x + entered


class U2NetP(nn.Module):
    """Logits of how salient each pixel of a picture is."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [ResidualUBlock(layers, OUTER if layers < 7 else 3) for layers in (7, 6, 5, 4)]
        self.encoder = nn.ModuleList([*blocks, DilatedBlock(OUTER), DilatedBlock(OUTER)])
        blocks = [ResidualUBlock(layers, 2 * OUTER) for layers in (4, 5, 6, 7)]
        self.decoder = nn.ModuleList([DilatedBlock(2 * OUTER), *blocks])
        self.side = nn.ModuleList(nn.Conv2d(OUTER, 1, 3, padding=1) for _ in range(6))
        self.fuse = nn.Conv2d(6, 1, 1)

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """
        Args:
            pictures: with the mean and standard deviation of ImageNet taken out (`normalised`).
        """
        seen, x = [], pictures
        for level, block in enumerate(self.encoder):
            x = block(_halved(x) if level else x)
            seen.append(x)
        levels = [seen.pop()]
        for block in self.decoder:
            skip = seen.pop()
            levels.append(block(torch.cat([_sized_like(levels[-1], skip), skip], dim=1)))
        sides = [side(level) for side, level in zip(self.side, reversed(levels), strict=True)]
        return self.fuse(torch.cat([_sized_like(side, pictures) for side in sides], dim=1))


def normalised(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Levels in [0, 1] as the network takes them."""
    mean = pictures.new_tensor((0.485, 0.456, 0.406))[:, None, None]
    deviation = pictures.new_tensor((0.229, 0.224, 0.225))[:, None, None]
    return (pictures - mean) / deviation


@cache
def load_u2netp() -> U2NetP:
    """The network with the weights of this package, on the CPU."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        network = U2NetP()
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()}, assign=True)
    return network.eval().requires_grad_(False)


def _halved(x: Features) -> Features:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _sized_like(x: Features, other: Features) -> Features:
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)
