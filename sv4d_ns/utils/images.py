"""Pictures as arrays: straight-alpha RGBA on white, resized, and the curve that turns measures into weights."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional


def over_white(rgba: UInt8[np.ndarray, "*batch 4"]) -> UInt8[np.ndarray, "*batch 3"]:
    """Straight-alpha pictures composited on white in sRGB, rounded to the nearest level."""
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def luminance(rgb: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch"]:
    """Rec. 601 luma of sRGB values, in their scale and type."""
    return rgb @ np.array([0.299, 0.587, 0.114], rgb.dtype)


def resize_rgba(rgba: UInt8[np.ndarray, "*batch h w 4"], size: int) -> UInt8[np.ndarray, "*batch size size 4"]:
    """Antialiased bilinear resize on premultiplied colour, so that edges take no colour from empty pixels."""
    if rgba.shape[-3] == size and rgba.shape[-2] == size:
        return rgba
    batch = rgba.shape[:-3]
    values = torch.from_numpy(rgba.reshape(-1, *rgba.shape[-3:])).float().movedim(-1, 1) / 255.0
    premultiplied = torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], 1)
    small = functional.interpolate(premultiplied, (size, size), mode="bilinear", antialias=True, align_corners=False)
    alpha = small[:, 3:].clamp(0, 1)
    colour = torch.where(alpha > 1e-3, small[:, :3] / alpha.clamp(min=1e-3), torch.ones_like(small[:, :3]))
    straight = torch.cat([colour.clamp(0, 1), alpha], 1)
    return (straight * 255).round().byte().movedim(1, -1).numpy().reshape(*batch, size, size, 4)


def tiled(rows: Iterable[Iterable[UInt8[np.ndarray, "h w c"]]]) -> UInt8[np.ndarray, "H W c"]:
    """One picture of rows of equally large pictures."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


OBSERVED_COLOR, GENERATED_COLOR, UNSEEN_COLOR = (0.0, 0.45, 0.70), (0.90, 0.62, 0.0), (0.35, 0.35, 0.35)
"""Of surface that the input video saw, that generated views only saw, and that none saw: blue and orange of Okabe and
Ito's palette, which colour-blind readers tell apart. sRGB."""

LABEL_HEIGHT = 12
"""Pixels of a label's type."""
LABEL_COLOR = (70, 70, 70)


def labelled(
    rows: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]], row_names: Sequence[str], column_names: Sequence[str]
) -> UInt8[np.ndarray, "H W 3"]:
    """`tiled` with a name to the left of each row and one above each column, in grey on white."""
    tiles = tiled(rows)
    height, width = rows[0][0].shape[:2]
    font = ImageFont.load_default(LABEL_HEIGHT)
    left = max(math.ceil(font.getlength(name)) for name in row_names) + LABEL_HEIGHT
    top = 2 * LABEL_HEIGHT
    sheet = Image.new("RGB", (left + tiles.shape[1], top + tiles.shape[0]), "white")
    sheet.paste(Image.fromarray(tiles), (left, top))
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(row_names):
        pen.text((left - LABEL_HEIGHT // 2, top + (number + 0.5) * height), name, LABEL_COLOR, font, anchor="rm")
    for number, name in enumerate(column_names):
        pen.text((left + (number + 0.5) * width, top / 2), name, LABEL_COLOR, font, anchor="mm")
    return np.asarray(sheet)


def captioned(names: Sequence[str], width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """A strip to be put above pictures of equal width that stand side by side: a name over each, in grey on white."""
    strip = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(max(0.6 * height, 6))
    for number, name in enumerate(names):
        pen.text(((number + 0.5) * width / len(names), height / 2), name, LABEL_COLOR, font, anchor="mm")
    return np.asarray(strip)


def smoothstep(x: Float[Tensor, "*n"], low: float, high: float) -> Float[Tensor, "*n"]:
    """u^2 (3 - 2u), u = clip((x - low) / (high - low), 0, 1)."""
    u = ((x - low) / (high - low)).clamp(0, 1)
    return u * u * (3 - 2 * u)
