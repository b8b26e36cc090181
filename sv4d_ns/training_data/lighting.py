"""Soft light that is fixed in the world: a sky over a ground with ambient occlusion, and a few shadowed lamps.

What reaches a place is kept on a coarse grid around the object, so colour depends on place and normal only, never on
the camera: all views of a moment agree, as in the cases that models are judged on (`benchmarks/make_cases.py`).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sv4d_ns.training_data.gltf_scene import PosedMesh
from sv4d_ns.utils.compiled import njit

HALF_SIDE = 0.62
"""Of the light grid's box, world units."""
GRID = 32
SKY_DIRECTIONS = 20
LAMP_SPREAD = 0.18
"""Sine of the angle of the four directions around a lamp that make its shadow soft."""


@dataclass(frozen=True)
class Lighting:
    """Linear light; a white surface that faces up under an open sky gets about `sky` plus its lamps.

    Attributes:
        sky, ground: colour of what comes from above and below.
        directions: unit vectors towards the lamps.
        strengths: colour of each lamp's light at right angles.
        tint: multiplies the colours of the asset.
    """

    sky: Float[np.ndarray, "3"]
    ground: Float[np.ndarray, "3"]
    directions: Float[np.ndarray, "lamps 3"]
    strengths: Float[np.ndarray, "lamps 3"]
    tint: Float[np.ndarray, "3"]


def direction(azimuth_deg: float, elevation_deg: float) -> Float[np.ndarray, "3"]:
    """Unit vector towards an azimuth and elevation of the cameras' page."""
    a, e = np.deg2rad(azimuth_deg), np.deg2rad(elevation_deg)
    return np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])


def benchmark_lighting() -> Lighting:
    """The benchmark's key, fill and rim; their strengths are not published and matched by eye."""
    return Lighting(
        sky=np.full(3, 0.62),
        ground=np.full(3, 0.38),
        directions=np.stack([direction(35, 48), direction(-100, 30), direction(160, 35)]),
        strengths=np.outer([0.50, 0.18, 0.22], np.ones(3)),
        tint=np.ones(3),
    )


def draw_lighting(rng: np.random.Generator) -> Lighting:
    """Random soft light around the benchmark's, slightly coloured; one in three also tints the asset."""
    warmth = rng.normal(0.0, 0.03, (5, 3))
    key_azimuth, key_elevation = rng.uniform(-110, 110), rng.uniform(20, 75)
    sky = rng.uniform(0.4, 0.8)
    tint = np.ones(3)
    if rng.random() < 1 / 3:
        tint = np.exp(rng.normal(0.0, 0.25, 3))
        tint = np.minimum(tint / tint.max() * rng.uniform(0.8, 1.1), 1.2)
    directions = [
        direction(key_azimuth, key_elevation),
        direction(key_azimuth - rng.uniform(90, 170), rng.uniform(10, 50)),
        direction(key_azimuth + rng.uniform(90, 170), rng.uniform(10, 50)),
    ]
    strengths = np.array([rng.uniform(0.25, 0.75), rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.3)])
    return Lighting(
        sky=sky * (1 + warmth[0]),
        ground=sky * rng.uniform(0.45, 0.8) * (1 + warmth[1]),
        directions=np.stack(directions),
        strengths=strengths[:, None] * (1 + warmth[2:]),
        tint=tint,
    )


@dataclass(frozen=True)
class LightField:
    """Light on the grid's cells: ambient (4: constant, and slope with the normal) and what each lamp's light loses.

    `cells` is [grid, grid, grid, 4 + lamps] (float32), axes x, y, z.
    """

    lighting: Lighting
    cells: Float[np.ndarray, "g g g c"]


def light_field(mesh: PosedMesh, lighting: Lighting, grid: int = GRID, directions: int = SKY_DIRECTIONS) -> LightField:
    """Light around a posed mesh in the world of the cameras."""
    blocked = np.zeros((grid, grid, grid), np.bool_)
    _mark(mesh.positions, mesh.scene.faces, HALF_SIDE, blocked)
    index = np.arange(directions) + 0.5
    z = 1.0 - 2.0 * index / directions
    turn = np.pi * (1.0 + 5.0**0.5) * index
    ring = np.sqrt(1.0 - z * z)
    sky = np.stack([ring * np.cos(turn), ring * np.sin(turn), z], axis=1)
    brightness = np.where(z > 0, lighting.sky.mean(), lighting.ground.mean())
    lamps = []
    for toward in lighting.directions:
        across = np.cross(toward, [0.0, 0.0, 1.0] if abs(toward[2]) < 0.9 else [1.0, 0.0, 0.0])
        across /= np.linalg.norm(across)
        up = np.cross(toward, across)
        signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
        lamps.append([toward + LAMP_SPREAD * (p * across + q * up) for p, q in signs])
    cells = np.zeros((grid, grid, grid, 4 + len(lamps)), np.float32)
    _fill(blocked, sky, brightness, np.array(lamps).reshape(-1, 4, 3), cells)
    return LightField(lighting, cells)


@njit(cache=True, nogil=True, fastmath=True)
def _mark(positions, faces, half, blocked):  # type: ignore[no-untyped-def]
    """Mark the cells that the surface passes, by points less than half a cell apart."""
    grid = blocked.shape[0]
    scale = grid / (2.0 * half)
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        ax, ay, az = positions[a, 0], positions[a, 1], positions[a, 2]
        ux, uy, uz = positions[b, 0] - ax, positions[b, 1] - ay, positions[b, 2] - az
        vx, vy, vz = positions[c, 0] - ax, positions[c, 1] - ay, positions[c, 2] - az
        wx, wy, wz = ux - vx, uy - vy, uz - vz
        longest = np.sqrt(max(ux * ux + uy * uy + uz * uz, vx * vx + vy * vy + vz * vz, wx * wx + wy * wy + wz * wz))
        steps = int(longest * scale * 1.5) + 1
        for i in range(steps + 1):
            p = i / steps
            for j in range(steps + 1 - i):
                q = j / steps
                x = int((ax + p * ux + q * vx + half) * scale)
                y = int((ay + p * uy + q * vy + half) * scale)
                z = int((az + p * uz + q * vz + half) * scale)
                if 0 <= x < grid and 0 <= y < grid and 0 <= z < grid:
                    blocked[x, y, z] = True


@njit(cache=True, nogil=True, fastmath=True)
def _sweep(blocked, dx, dy, dz, clear):  # type: ignore[no-untyped-def]
    """Share of light from a direction that arrives at every cell, slice by slice away from the light."""
    grid = blocked.shape[0]
    axis = 0 if abs(dx) >= abs(dy) and abs(dx) >= abs(dz) else (1 if abs(dy) >= abs(dz) else 2)
    main = dx if axis == 0 else (dy if axis == 1 else dz)
    first = dy if axis == 0 else dx
    second = dz if axis != 2 else dy
    first, second = first / abs(main), second / abs(main)
    step = 1 if main > 0 else -1
    fi, fj = int(np.floor(first)), int(np.floor(second))
    p, q = np.float32(first - fi), np.float32(second - fj)
    w00, w10, w01, w11 = (1 - p) * (1 - q), p * (1 - q), (1 - p) * q, p * q
    before = np.ones((grid + 3, grid + 3), np.float32)
    for s in range(grid):
        k = grid - 1 - s if step > 0 else s
        for i in range(grid):
            for j in range(grid):
                i0, j0 = i + fi + 1, j + fj + 1
                value = w00 * before[i0, j0] + w10 * before[i0 + 1, j0]
                value += w01 * before[i0, j0 + 1] + w11 * before[i0 + 1, j0 + 1]
                if axis == 0:
                    clear[k, i, j] = value
                elif axis == 1:
                    clear[i, k, j] = value
                else:
                    clear[i, j, k] = value
        for i in range(grid):
            for j in range(grid):
                if axis == 0:
                    before[i + 1, j + 1] = 0.0 if blocked[k, i, j] else clear[k, i, j]
                elif axis == 1:
                    before[i + 1, j + 1] = 0.0 if blocked[i, k, j] else clear[i, k, j]
                else:
                    before[i + 1, j + 1] = 0.0 if blocked[i, j, k] else clear[i, j, k]


@njit(cache=True, nogil=True, fastmath=True)
def _fill(blocked, sky, brightness, lamps, cells):  # type: ignore[no-untyped-def]
    grid = blocked.shape[0]
    clear = np.empty((grid, grid, grid), np.float32)
    flat, out = clear.reshape(-1), cells.reshape(-1, cells.shape[3])
    count = sky.shape[0]
    for k in range(count):
        dx, dy, dz = sky[k]
        _sweep(blocked, dx, dy, dz, clear)
        # clamped cosine in two bands of spherical harmonics: 1/4 + cosine / 2
        share = np.float32(brightness[k] / count)
        sx, sy, sz = np.float32(2.0 * dx) * share, np.float32(2.0 * dy) * share, np.float32(2.0 * dz) * share
        for cell in range(flat.shape[0]):
            value = flat[cell]
            out[cell, 0] += share * value
            out[cell, 1] += sx * value
            out[cell, 2] += sy * value
            out[cell, 3] += sz * value
    for lamp in range(lamps.shape[0]):
        for k in range(lamps.shape[1]):
            dx, dy, dz = lamps[lamp, k]
            _sweep(blocked, dx, dy, dz, clear)
            for cell in range(flat.shape[0]):
                out[cell, 4 + lamp] += flat[cell] / lamps.shape[1]


@njit(cache=True, nogil=True, fastmath=True)
def lit(cells, half, sky, ground, directions, strengths, x, y, z, nx, ny, nz, out):  # type: ignore[no-untyped-def]
    """Light (RGB, linear) that a white surface at a place with a normal sends back, into `out`."""
    grid = cells.shape[0]
    scale = grid / (2.0 * half)
    # the surface's own cells are dark: look where the normal points, beyond them
    away = 1.6 / scale
    gx = min(max((x + away * nx + half) * scale - 0.5, 0.0), grid - 1.001)
    gy = min(max((y + away * ny + half) * scale - 0.5, 0.0), grid - 1.001)
    gz = min(max((z + away * nz + half) * scale - 0.5, 0.0), grid - 1.001)
    i, j, k = int(gx), int(gy), int(gz)
    p, q, r = gx - i, gy - j, gz - k
    ambient, bx, by, bz = 0.0, 0.0, 0.0, 0.0
    lamps = directions.shape[0]
    out[0], out[1], out[2] = 0.0, 0.0, 0.0
    for corner in range(8):
        ci, cj, ck = corner & 1, (corner >> 1) & 1, corner >> 2
        weight = (p if ci else 1.0 - p) * (q if cj else 1.0 - q) * (r if ck else 1.0 - r)
        cell = cells[i + ci, j + cj, k + ck]
        ambient += weight * cell[0]
        bx += weight * cell[1]
        by += weight * cell[2]
        bz += weight * cell[3]
        for lamp in range(lamps):
            facing = directions[lamp, 0] * nx + directions[lamp, 1] * ny + directions[lamp, 2] * nz
            if facing > 0.0:
                share = weight * cell[4 + lamp] * facing
                for c in range(3):
                    out[c] += share * strengths[lamp, c]
    ambient = max(ambient + bx * nx + by * ny + bz * nz, 0.0)
    # colour of the ambient light: sky from above, ground from below
    up = 0.5 + 0.5 * nz
    grey = up * (sky[0] + sky[1] + sky[2]) + (1.0 - up) * (ground[0] + ground[1] + ground[2])
    for c in range(3):
        out[c] += ambient * 3.0 * (up * sky[c] + (1.0 - up) * ground[c]) / max(grey, 1e-6)
