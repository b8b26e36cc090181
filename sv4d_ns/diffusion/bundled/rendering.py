"""Pictures of a volume in the input camera's frustum, with gradients: compiled on a CPU, torch everywhere else.

Emission-absorption along rays at equal steps. A cell holds its optical depth along the depth axis; a sample's colour is
the cell's own, mixed by the gate with the colour the input picture has where the sample projects to. Both versions
compute the same sums (`tests/test_bundled_rendering.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.frustum import BALL_RADIUS, Frustum
from sv4d_ns.utils.compiled import njit
from sv4d_ns.utils.threads import run_in_threads

STEP = 0.018
"""Distance between samples, world units: about a cell of a 64^3 grid."""
MAX_SAMPLES = int(np.ceil(2.0 * BALL_RADIUS / STEP))
"""No ray has more inside the ball."""
SAMPLES_AT_ONCE = 2**24
"""Of all rays, where the twin makes them: about 1 GiB."""
OPAQUE = 6.9
"""Optical depth at which a ray ends: a thousandth of the light is left."""
CLEAR = 1e-5
"""Optical depths below this are skipped."""
BLOCK = 4
"""Cells along each side of the blocks that rays skip where they are empty."""


@dataclass
class Volume:
    """One moment's volume for each object of a batch."""

    density: Float[Tensor, "b d h w"]
    """Optical depth of a cell along the depth axis, 0 or more."""
    colour: Float[Tensor, "b 3 i j k"]
    """sRGB in [0, 1], at a coarser grid of the same frustum."""
    gate: Float[Tensor, "b i j k"]
    """Share of the input picture's colour, in [0, 1]."""
    image: Float[Tensor, "b 3 s s"]
    """The input picture's straight colour in [0, 1], of any size, continued beyond the silhouette."""

    def __getitem__(self, part: slice) -> "Volume":
        """Some of the batch."""
        return Volume(*(tensor[part] for tensor in (self.density, self.colour, self.gate, self.image)))

    @staticmethod
    def join(parts: "Sequence[Volume]") -> "Volume":
        """Batches one after the other."""
        columns = zip(*((v.density, v.colour, v.gate, v.image) for v in parts), strict=True)
        return Volume(*(torch.cat(column) for column in columns))


def render_rays(
    volume: Volume, origins: Float[Tensor, "b n 3"], directions: Float[Tensor, "b n 3"], frustum: Frustum
) -> Float[Tensor, "b n 4"]:
    """Premultiplied colour and alpha along rays.

    Args:
        volume: of the batch's objects.
        origins: in coordinates of the input camera (x right, y up, z forward), world units.
        directions: of any length.
        frustum: where the volume's grid lies.
    """
    unit = F.normalize(directions, dim=-1)
    constants = (frustum.near, frustum.far, frustum.tangent, frustum.radius)
    if volume.density.device.type == "cpu":
        arguments = (volume.density, volume.colour, volume.gate, volume.image, origins, unit)
        return _Compiled.apply(*(tensor.float() for tensor in arguments), constants)  # type: ignore[no-any-return]
    at_once = max(1, SAMPLES_AT_ONCE // (MAX_SAMPLES * len(origins)))
    parts = zip(origins.split(at_once, 1), unit.split(at_once, 1), strict=True)
    return torch.cat([render_rays_torch(volume, *part, frustum) for part in parts], 1)


def entry_and_length(
    origins: Float[Tensor, "b n 3"], directions: Float[Tensor, "b n 3"], radius: float
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Where unit rays enter the ball around the middle of the scene, and how long they stay; 0 for those that miss."""
    middle = torch.cat([origins[..., :2], origins[..., 2:] - radius], -1)
    along = (middle * directions).sum(-1)
    half = (along.square() - middle.square().sum(-1) + BALL_RADIUS**2).clamp(min=0.0).sqrt()
    return -along - half, 2.0 * half


def render_rays_torch(
    volume: Volume, origins: Float[Tensor, "b n 3"], directions: Float[Tensor, "b n 3"], frustum: Frustum
) -> Float[Tensor, "b n 4"]:
    """`render_rays` for unit directions in plain torch: the compiled version's twin."""
    entry, length = entry_and_length(origins, directions, frustum.radius)
    steps = (torch.arange(MAX_SAMPLES, device=origins.device) + 0.5) * STEP
    inside = steps < length[..., None]
    points = origins[..., None, :] + (entry[..., None] + steps)[..., None] * directions[..., None, :]
    depth = points[..., 2].clamp(min=1e-3)
    place = torch.stack(
        [
            points[..., 0] / (depth * frustum.tangent),
            -points[..., 1] / (depth * frustum.tangent),
            2.0 * (depth - frustum.near) / (frustum.far - frustum.near) - 1.0,
        ],
        dim=-1,
    )[:, None]

    def read(grid: Float[Tensor, "b c d h w"], padding: str) -> Float[Tensor, "b c n s"]:
        found = F.grid_sample(grid, place.to(grid.dtype), padding_mode=padding, align_corners=False)
        return found[:, :, 0]

    cell = (frustum.far - frustum.near) / volume.density.shape[1]
    optical = read(volume.density[:, None], "zeros")[:, 0] * (STEP / cell) * inside
    own, gate = read(volume.colour, "border"), read(volume.gate[:, None], "border")
    seen = F.grid_sample(volume.image, place[:, 0, ..., :2], padding_mode="border", align_corners=False)
    colour = own + gate * (seen - own)
    before = torch.cumsum(optical, -1) - optical
    weight = torch.exp(-before) * (1.0 - torch.exp(-optical))
    return torch.cat([(weight[:, None] * colour).sum(-1), weight.sum(-1)[:, None]], 1).transpose(1, 2)


@njit(cache=True, fastmath=True, inline="always")
def _corner(place, size):
    """Lower cell of a linear interpolation with values at cell centres, and the share of the upper one."""
    shifted = place - 0.5
    low = int(np.floor(shifted))
    return low, np.float32(shifted - low)


@njit(cache=True, fastmath=True)
def _read(grid, z, y, x):
    """Trilinear value of a grid [d, h, w] at cell coordinates; 0 outside."""
    depth, height, width = grid.shape
    k, fz = _corner(z, depth)
    j, fy = _corner(y, height)
    i, fx = _corner(x, width)
    if k >= 0 and j >= 0 and i >= 0 and k + 1 < depth and j + 1 < height and i + 1 < width:
        gx, gy, gz = np.float32(1.0) - fx, np.float32(1.0) - fy, np.float32(1.0) - fz
        return gz * (
            gy * (gx * grid[k, j, i] + fx * grid[k, j, i + 1])
            + fy * (gx * grid[k, j + 1, i] + fx * grid[k, j + 1, i + 1])
        ) + fz * (
            gy * (gx * grid[k + 1, j, i] + fx * grid[k + 1, j, i + 1])
            + fy * (gx * grid[k + 1, j + 1, i] + fx * grid[k + 1, j + 1, i + 1])
        )
    total = np.float32(0.0)
    for dk in range(2):
        kk = k + dk
        if kk < 0 or kk >= depth:
            continue
        wk = fz if dk else np.float32(1.0) - fz
        for dj in range(2):
            jj = j + dj
            if jj < 0 or jj >= height:
                continue
            wj = wk * (fy if dj else np.float32(1.0) - fy)
            for di in range(2):
                ii = i + di
                if 0 <= ii < width:
                    total += wj * (fx if di else np.float32(1.0) - fx) * grid[kk, jj, ii]
    return total


@njit(cache=True, fastmath=True)
def _add(grid, z, y, x, value):
    """The transpose of `_read`."""
    depth, height, width = grid.shape
    k, fz = _corner(z, depth)
    j, fy = _corner(y, height)
    i, fx = _corner(x, width)
    for dk in range(2):
        kk = k + dk
        if kk < 0 or kk >= depth:
            continue
        wk = value * (fz if dk else np.float32(1.0) - fz)
        for dj in range(2):
            jj = j + dj
            if jj < 0 or jj >= height:
                continue
            wj = wk * (fy if dj else np.float32(1.0) - fy)
            for di in range(2):
                ii = i + di
                if 0 <= ii < width:
                    grid[kk, jj, ii] += wj * (fx if di else np.float32(1.0) - fx)


@njit(cache=True, fastmath=True)
def _read_inside(grid, z, y, x, own, number):
    """Trilinear colour and gate of a grid [d, h, w, 4] at cell coordinates between its outermost centres: the colour to
    own[number], the gate returned."""
    depth, height, width, _ = grid.shape
    k, fz = _corner(z, depth)
    j, fy = _corner(y, height)
    i, fx = _corner(x, width)
    k1, j1, i1 = min(k + 1, depth - 1), min(j + 1, height - 1), min(i + 1, width - 1)
    gx, gy, gz = np.float32(1.0) - fx, np.float32(1.0) - fy, np.float32(1.0) - fz
    a, b, c, d = gz * gy * gx, gz * gy * fx, gz * fy * gx, gz * fy * fx
    e, f, g, h = fz * gy * gx, fz * gy * fx, fz * fy * gx, fz * fy * fx
    gate = np.float32(0.0)
    for channel in range(4):
        value = (
            a * grid[k, j, i, channel]
            + b * grid[k, j, i1, channel]
            + c * grid[k, j1, i, channel]
            + d * grid[k, j1, i1, channel]
            + e * grid[k1, j, i, channel]
            + f * grid[k1, j, i1, channel]
            + g * grid[k1, j1, i, channel]
            + h * grid[k1, j1, i1, channel]
        )
        if channel < 3:
            own[number, channel] = value
        else:
            gate = value
    return gate


@njit(cache=True, fastmath=True)
def _blocks_with_matter(density, least):
    """Whether a point of each block of `BLOCK` cells a side can read more than `least`, from cells around it too."""
    depth, height, width = density.shape
    sides = ((depth - 1) // BLOCK + 1, (height - 1) // BLOCK + 1, (width - 1) // BLOCK + 1)
    found = np.zeros(sides, np.bool_)
    for k in range(depth):
        for j in range(height):
            for i in range(width):
                if density[k, j, i] > least:
                    for bk in range(max(k - 1, 0) // BLOCK, min(k + 1, depth - 1) // BLOCK + 1):
                        for bj in range(max(j - 1, 0) // BLOCK, min(j + 1, height - 1) // BLOCK + 1):
                            for bi in range(max(i - 1, 0) // BLOCK, min(i + 1, width - 1) // BLOCK + 1):
                                found[bk, bj, bi] = True
    return found


@njit(cache=True, fastmath=True)
def _together(colour, gate):
    """Colours [3, d, h, w] and gate [d, h, w] beside each other, [d, h, w, 4]."""
    depth, height, width = gate.shape
    out = np.empty((depth, height, width, 4), np.float32)
    for k in range(depth):
        for j in range(height):
            for i in range(width):
                for c in range(3):
                    out[k, j, i, c] = colour[c, k, j, i]
                out[k, j, i, 3] = gate[k, j, i]
    return out


@njit(cache=True, fastmath=True)
def _place_coarse(place, size, coarse):
    """A coordinate of the fine grid in the coarse one, kept between the centres of its outermost cells."""
    return min(max(place * coarse / size, 0.5), coarse - 0.5)


@njit(cache=True, fastmath=True)
def _pixel(image, y, x, out):
    """Bilinear colour of a picture [3, h, w] at pixel coordinates, continued beyond its border."""
    height, width = image.shape[1], image.shape[2]
    y, x = min(max(y, 0.5), height - 0.5), min(max(x, 0.5), width - 0.5)
    j, fy = _corner(y, height)
    i, fx = _corner(x, width)
    j1, i1 = min(j + 1, height - 1), min(i + 1, width - 1)
    for c in range(3):
        top = image[c, j, i] * (np.float32(1.0) - fx) + image[c, j, i1] * fx
        low = image[c, j1, i] * (np.float32(1.0) - fx) + image[c, j1, i1] * fx
        out[c] = top * (np.float32(1.0) - fy) + low * fy


@njit(cache=True, fastmath=True)
def _march(density, blocks, coarse, image, o, d, constants, places, optical, own, share, seen):
    """Samples of one ray that hold matter: fills the arrays and returns how many there are."""
    near, far, tangent, radius = constants
    mx, my, mz = o[0], o[1], o[2] - radius
    along = mx * d[0] + my * d[1] + mz * d[2]
    root = along * along - (mx * mx + my * my + mz * mz) + BALL_RADIUS * BALL_RADIUS
    if root <= 0.0:
        return 0
    half = np.sqrt(root)
    entry, length = -along - half, 2.0 * half
    depth, height, width = density.shape
    coarse_d, coarse_h, coarse_w, _ = coarse.shape
    scale = STEP / ((far - near) / depth)
    count, passed = 0, 0.0
    for step in range(MAX_SAMPLES):
        t = (step + 0.5) * STEP
        if t >= length:
            break
        t += entry
        z = o[2] + t * d[2]
        if z < 1e-3:
            continue
        column = 0.5 * width * ((o[0] + t * d[0]) / (z * tangent) + 1.0)
        row = 0.5 * height * (1.0 - (o[1] + t * d[1]) / (z * tangent))
        layer = depth * (z - near) / (far - near)
        k = min(max(int(layer), 0), depth - 1) // BLOCK
        j = min(max(int(row), 0), height - 1) // BLOCK
        i = min(max(int(column), 0), width - 1) // BLOCK
        if not blocks[k, j, i]:
            continue
        value = _read(density, layer, row, column) * scale
        if value < CLEAR:
            continue
        places[count, 0], places[count, 1], places[count, 2] = layer, row, column
        optical[count] = value
        cz = _place_coarse(layer, depth, coarse_d)
        cy = _place_coarse(row, height, coarse_h)
        cx = _place_coarse(column, width, coarse_w)
        share[count] = _read_inside(coarse, cz, cy, cx, own, count)
        _pixel(image, row * image.shape[1] / height, column * image.shape[2] / width, seen[count])
        count += 1
        passed += value
        if passed > OPAQUE:
            break
    return count


@njit(cache=True, fastmath=True, nogil=True)
def _forward(density, colour, gate, image, origins, directions, constants, out):
    places = np.empty((MAX_SAMPLES, 3), np.float32)
    optical, share = np.empty(MAX_SAMPLES, np.float32), np.empty(MAX_SAMPLES, np.float32)
    own, seen = np.empty((MAX_SAMPLES, 3), np.float32), np.empty((MAX_SAMPLES, 3), np.float32)
    least = CLEAR * (constants[1] - constants[0]) / (STEP * density.shape[1])
    for b in range(origins.shape[0]):
        blocks, coarse = _blocks_with_matter(density[b], least), _together(colour[b], gate[b])
        for n in range(origins.shape[1]):
            count = _march(
                density[b], blocks, coarse, image[b], origins[b, n], directions[b, n], constants, places, optical,
                own, share, seen,
            )  # fmt: skip
            light = np.float32(1.0)
            red, green, blue = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for s in range(count):
                left = light * np.exp(-optical[s])
                weight = light - left
                red += weight * (own[s, 0] + share[s] * (seen[s, 0] - own[s, 0]))
                green += weight * (own[s, 1] + share[s] * (seen[s, 1] - own[s, 1]))
                blue += weight * (own[s, 2] + share[s] * (seen[s, 2] - own[s, 2]))
                light = left
            out[b, n, 0], out[b, n, 1], out[b, n, 2] = red, green, blue
            out[b, n, 3] = np.float32(1.0) - light


@njit(cache=True, fastmath=True, nogil=True)
def _backward(
    density, colour, gate, image, origins, directions, constants, cotangent, d_density, d_colour, d_gate
):  # fmt: skip
    places = np.empty((MAX_SAMPLES, 3), np.float32)
    optical, share = np.empty(MAX_SAMPLES, np.float32), np.empty(MAX_SAMPLES, np.float32)
    own, seen = np.empty((MAX_SAMPLES, 3), np.float32), np.empty((MAX_SAMPLES, 3), np.float32)
    weights, lights = np.empty(MAX_SAMPLES, np.float32), np.empty(MAX_SAMPLES, np.float32)
    depth, height, width = density.shape[1:]
    coarse_d, coarse_h, coarse_w = gate.shape[1:]
    scale = np.float32(STEP / ((constants[1] - constants[0]) / depth))
    least = CLEAR * (constants[1] - constants[0]) / (STEP * density.shape[1])
    for b in range(origins.shape[0]):
        blocks, coarse = _blocks_with_matter(density[b], least), _together(colour[b], gate[b])
        for n in range(origins.shape[1]):
            g = cotangent[b, n]
            if g[0] == 0.0 and g[1] == 0.0 and g[2] == 0.0 and g[3] == 0.0:
                continue
            count = _march(
                density[b], blocks, coarse, image[b], origins[b, n], directions[b, n], constants, places, optical,
                own, share, seen,
            )  # fmt: skip
            light = np.float32(1.0)
            for s in range(count):
                left = light * np.exp(-optical[s])
                weights[s], lights[s] = light - left, left
                light = left
            behind = np.float32(0.0)
            for s in range(count - 1, -1, -1):
                wanted = g[3]
                mixed = np.float32(0.0)
                z, y, x = places[s, 0], places[s, 1], places[s, 2]
                cz = _place_coarse(z, depth, coarse_d)
                cy = _place_coarse(y, height, coarse_h)
                cx = _place_coarse(x, width, coarse_w)
                for c in range(3):
                    wanted += g[c] * (own[s, c] + share[s] * (seen[s, c] - own[s, c]))
                    mixed += g[c] * (seen[s, c] - own[s, c])
                    _add(d_colour[b, c], cz, cy, cx, weights[s] * g[c] * (np.float32(1.0) - share[s]))
                _add(d_gate[b], cz, cy, cx, weights[s] * mixed)
                _add(d_density[b], z, y, x, (lights[s] * wanted - behind) * scale)
                behind += weights[s] * wanted


def _each_moment(*tensors: Tensor) -> Iterator[tuple[np.ndarray, ...]]:
    """The memory of each object of a batch, still with a batch's axis."""
    arrays = [t.numpy() for t in tensors]
    for number in range(len(arrays[0])):
        yield tuple(array[number : number + 1] for array in arrays)


class _Compiled(torch.autograd.Function):
    """The compiled renderer; rays and the input picture get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        density: Tensor,
        colour: Tensor,
        gate: Tensor,
        image: Tensor,
        origins: Tensor,
        directions: Tensor,
        constants: tuple[float, float, float, float],
    ) -> Tensor:
        tensors = tuple(t.detach().contiguous() for t in (density, colour, gate, image, origins, directions))
        out = torch.empty(*origins.shape[:2], 4)
        run_in_threads([partial(_forward, *each, constants, made) for *each, made in _each_moment(*tensors, out)])
        ctx.save_for_backward(*tensors)
        ctx.constants = constants
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        made = [torch.zeros_like(t) for t in tensors[:3]]
        tasks = []
        for *each, cotangent, density, colour, gate in _each_moment(*tensors, cotangents[0].contiguous(), *made):
            tasks.append(partial(_backward, *each, ctx.constants, cotangent, density, colour, gate))
        run_in_threads(tasks)
        return (*made, None, None, None, None)
