"""Exact pictures of round cones, ellipsoids and boxes: analytic ray casting on one thread.

Every primitive is convex and intersected in closed form, so silhouettes are exact up to antialiasing and all views
of one moment agree. Shading is Lambert under a key light, a fill light and a hemisphere (all fixed in the world):
colour does not depend on the viewing direction, like the 4D benchmark's pictures.
"""

from enum import IntEnum

import numpy as np
from jaxtyping import Float, Int, UInt8

from sv4d_ns.utils.compiled import njit

SUPERSAMPLING = 3
"""Rays per pixel side. Our choice: alpha in steps of 1/9 at 64 pixels, at a few milliseconds a picture."""


class Shape(IntEnum):
    """What a part is; the meaning of its four `dims`."""

    ELLIPSOID = 0
    """Semi-axes x, y, z (the fourth is unused)."""
    CONE = 1
    """Convex hull of two balls: at the origin with radius dims[1], at (dims[0], 0, 0) with radius dims[2]."""
    BOX = 2
    """Half-sides x, y, z (the fourth is unused)."""


class Texture(IntEnum):
    """How a part mixes its three colours; `axis` is a direction of the part, `scale` a frequency or a threshold."""

    PLAIN = 0
    STRIPES = 1
    SPOTS = 2
    CHECKER = 3
    GRADIENT = 4
    BELLY = 5
    PATCHES = 6


@njit(cache=True, fastmath=True)
def _hit(shape, dims, ox, oy, oz, dx, dy, dz):
    """Smallest ray parameter at which the ray (o + s d), coming from outside, meets the part; negative where none."""
    if shape == 0:
        ix, iy, iz = 1.0 / dims[0], 1.0 / dims[1], 1.0 / dims[2]
        ox, oy, oz, dx, dy, dz = ox * ix, oy * iy, oz * iz, dx * ix, dy * iy, dz * iz
        a = dx * dx + dy * dy + dz * dz
        b = ox * dx + oy * dy + oz * dz
        root = b * b - a * (ox * ox + oy * oy + oz * oz - 1.0)
        return -1.0 if root < 0.0 else (-b - np.sqrt(root)) / a
    if shape == 2:
        near, far = -1e30, 1e30
        for axis in range(3):
            o = ox if axis == 0 else (oy if axis == 1 else oz)
            d = dx if axis == 0 else (dy if axis == 1 else dz)
            inverse = 1.0 / d if abs(d) > 1e-12 else 1e12
            first, second = (-dims[axis] - o) * inverse, (dims[axis] - o) * inverse
            near, far = max(near, min(first, second)), min(far, max(first, second))
        return near if near <= far else -1.0
    length, ra, rb = dims[0], dims[1], dims[2]
    a = dx * dx + dy * dy + dz * dz
    best = 1e30
    for end in range(2):
        x = ox - (0.0 if end == 0 else length)
        radius = ra if end == 0 else rb
        b = x * dx + oy * dy + oz * dz
        root = b * b - a * (x * x + oy * oy + oz * oz - radius * radius)
        if root >= 0.0:
            best = min(best, (-b - np.sqrt(root)) / a)
    # the common tangent of both balls makes the angle with sine `sine` to the axis: cosine * rho = ra - sine * x
    sine = (ra - rb) / length
    square = 1.0 - sine * sine
    if square > 1e-6:
        rest, slope = ra - sine * ox, -sine * dx
        qa = square * (dy * dy + dz * dz) - slope * slope
        qb = square * (oy * dy + oz * dz) - slope * rest
        qc = square * (oy * oy + oz * oz) - rest * rest
        root = qb * qb - qa * qc
        if root >= 0.0 and abs(qa) > 1e-12:
            root = np.sqrt(root)
            for sign in (-1.0, 1.0):
                s = (-qb + sign * root) / qa
                x = ox + s * dx
                # the ball that touches there sits at x - (its radius) * sine on the axis
                radius = (ra - sine * x) / square
                if radius > 0.0 and 0.0 <= x - radius * sine <= length and s < best:
                    best = s
    return best if best < 1e30 else -1.0


@njit(cache=True, fastmath=True)
def _normal(shape, dims, x, y, z):
    """Outward unit normal at a surface point of the part."""
    if shape == 0:
        nx, ny, nz = x / (dims[0] * dims[0]), y / (dims[1] * dims[1]), z / (dims[2] * dims[2])
    elif shape == 2:
        px, py, pz = abs(x) / dims[0], abs(y) / dims[1], abs(z) / dims[2]
        nx = np.sign(x) if px >= py and px >= pz else 0.0
        ny = np.sign(y) if py > px and py >= pz else 0.0
        nz = np.sign(z) if pz > px and pz > py else 0.0
    else:
        sine = (dims[1] - dims[2]) / dims[0]
        rho = np.sqrt(y * y + z * z)
        centre = x - rho * sine / np.sqrt(max(1.0 - sine * sine, 1e-6))
        centre = min(max(centre, 0.0), dims[0])
        nx, ny, nz = x - centre, y, z
    inverse = 1.0 / np.sqrt(max(nx * nx + ny * ny + nz * nz, 1e-20))
    return nx * inverse, ny * inverse, nz * inverse


@njit(cache=True)
def _noise(i, j, k, seed):
    """A number in [0, 1) for an integer lattice point."""
    h = np.uint32(i * 73856093) ^ np.uint32(j * 19349663) ^ np.uint32(k * 83492791) ^ np.uint32(seed * 2654435761)
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x45D9F3B))
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x45D9F3B))
    return np.float64((h ^ (h >> np.uint32(16))) & np.uint32(0xFFFF)) / 65536.0


@njit(cache=True, fastmath=True)
def _mix(texture, axis, scale, phase, x, y, z, nx, ny, nz):
    """Which of the part's colours shows at a surface point: 0, 1, or between them."""
    along = x * axis[0] + y * axis[1] + z * axis[2]
    if texture == 1:
        return 1.0 if np.sin(along * scale + phase) > 0.25 else 0.0
    if texture == 2:
        gx, gy, gz = x * scale + phase, y * scale, z * scale
        i, j, k = np.floor(gx), np.floor(gy), np.floor(gz)
        seed = int(phase * 1000.0)
        centre = 0.3 + 0.4 * _noise(int(i), int(j), int(k), seed)
        other = 0.3 + 0.4 * _noise(int(i), int(j), int(k), seed + 7)
        distance = (gx - i - centre) ** 2 + (gy - j - other) ** 2 + (gz - k - 0.5) ** 2
        return 1.0 if distance < 0.16 else 0.0
    if texture == 3:
        return 1.0 if np.sin(x * scale + phase) * np.sin(y * scale) * np.sin(z * scale + 1.0) > 0.0 else 0.0
    if texture == 4:
        return min(max(0.5 + along * scale, 0.0), 1.0)
    if texture == 5:
        return 1.0 if nx * axis[0] + ny * axis[1] + nz * axis[2] > scale else 0.0
    if texture == 6:
        value = np.sin(x * scale + phase) + np.sin(y * scale * 1.3 + 2.0 * phase)
        value += np.sin(z * scale * 0.9 + 3.0 * phase)
        return 1.0 if value > 0.6 else 0.0
    return 0.0


@njit(cache=True, fastmath=True, nogil=True)
def _visible(c2w, tangent, grid, rotations, positions, bounds, shapes, dims):
    """Nearest part and distance along the axis of every ray of a square grid: (depth, owner, local).

    `bounds` are radii of the parts' bounding balls around `positions` plus `offset`; `local` holds each part's frame
    seen from the camera: the directions of camera right, up and backward, and the ray origin.
    """
    step = 2.0 * tangent / grid
    depth = np.full((grid, grid), 1e30, dtype=np.float64)
    owner = np.full((grid, grid), -1, dtype=np.int32)
    local = np.empty((shapes.shape[0], 4, 3))
    for part in range(shapes.shape[0]):
        # the part's frame seen from the camera: ray origin and the directions of camera right, up and backward
        for axis in range(3):
            origin = 0.0
            for k in range(3):
                origin += rotations[part, k, axis] * (c2w[k, 3] - positions[part, k])
            local[part, 3, axis] = origin
            for column in range(3):
                value = 0.0
                for k in range(3):
                    value += rotations[part, k, axis] * c2w[k, column]
                local[part, column, axis] = value
        cx, cy, cz = 0.0, 0.0, 0.0
        for k in range(3):
            centre = positions[part, k] + rotations[part, k, 0] * bounds[part, 1]
            cx += c2w[k, 0] * (centre - c2w[k, 3])
            cy += c2w[k, 1] * (centre - c2w[k, 3])
            cz -= c2w[k, 2] * (centre - c2w[k, 3])
        radius = bounds[part, 0]
        near, far = max(cz - radius, 1e-3), cz + radius
        left = min((cx - radius) / near, (cx - radius) / far)
        right = max((cx + radius) / near, (cx + radius) / far)
        low = min((cy - radius) / near, (cy - radius) / far)
        high = max((cy + radius) / near, (cy + radius) / far)
        first_column = max(int((left + tangent) / step) - 1, 0)
        last_column = min(int((right + tangent) / step) + 2, grid)
        first_row = max(int((tangent - high) / step) - 1, 0)
        last_row = min(int((tangent - low) / step) + 2, grid)
        for row in range(first_row, last_row):
            v = tangent - (row + 0.5) * step
            for column in range(first_column, last_column):
                u = (column + 0.5) * step - tangent
                dx = u * local[part, 0, 0] + v * local[part, 1, 0] - local[part, 2, 0]
                dy = u * local[part, 0, 1] + v * local[part, 1, 1] - local[part, 2, 1]
                dz = u * local[part, 0, 2] + v * local[part, 1, 2] - local[part, 2, 2]
                s = _hit(shapes[part], dims[part], local[part, 3, 0], local[part, 3, 1], local[part, 3, 2], dx, dy, dz)
                if 0.0 < s < depth[row, column]:
                    depth[row, column] = s
                    owner[row, column] = part
    return depth, owner, local


@njit(cache=True, fastmath=True, nogil=True)
def _picture(
    c2w, tangent, size, samples, rotations, positions, bounds, shapes, dims, textures, axes, scales, phases,
    colours, lights, out,
):  # fmt: skip
    """Write one RGBA picture."""
    grid = size * samples
    step = 2.0 * tangent / grid
    depth, owner, local = _visible(c2w, tangent, grid, rotations, positions, bounds, shapes, dims)
    for pixel_row in range(size):
        for pixel_column in range(size):
            red, green, blue, hits = 0.0, 0.0, 0.0, 0
            for row in range(pixel_row * samples, (pixel_row + 1) * samples):
                v = tangent - (row + 0.5) * step
                for column in range(pixel_column * samples, (pixel_column + 1) * samples):
                    part = owner[row, column]
                    if part < 0:
                        continue
                    hits += 1
                    u = (column + 0.5) * step - tangent
                    s = depth[row, column]
                    axes_seen = local[part]
                    x = axes_seen[3, 0] + s * (u * axes_seen[0, 0] + v * axes_seen[1, 0] - axes_seen[2, 0])
                    y = axes_seen[3, 1] + s * (u * axes_seen[0, 1] + v * axes_seen[1, 1] - axes_seen[2, 1])
                    z = axes_seen[3, 2] + s * (u * axes_seen[0, 2] + v * axes_seen[1, 2] - axes_seen[2, 2])
                    nx, ny, nz = _normal(shapes[part], dims[part], x, y, z)
                    share = _mix(textures[part], axes[part], scales[part], phases[part], x, y, z, nx, ny, nz)
                    wx = rotations[part, 0, 0] * nx + rotations[part, 0, 1] * ny + rotations[part, 0, 2] * nz
                    wy = rotations[part, 1, 0] * nx + rotations[part, 1, 1] * ny + rotations[part, 1, 2] * nz
                    wz = rotations[part, 2, 0] * nx + rotations[part, 2, 1] * ny + rotations[part, 2, 2] * nz
                    light = lights[0, 0] + lights[0, 1] * wz
                    for lamp in range(1, lights.shape[0]):
                        facing = wx * lights[lamp, 0] + wy * lights[lamp, 1] + wz * lights[lamp, 2]
                        light += max(facing, 0.0)
                    c = colours[part]
                    # squares stand for linear light (gamma 2), so shading happens there and roots bring it back
                    red += min(np.sqrt(light * (c[0, 0] + share * (c[1, 0] - c[0, 0]))), 1.0)
                    green += min(np.sqrt(light * (c[0, 1] + share * (c[1, 1] - c[0, 1]))), 1.0)
                    blue += min(np.sqrt(light * (c[0, 2] + share * (c[1, 2] - c[0, 2]))), 1.0)
            if hits > 0:
                out[pixel_row, pixel_column, 0] = int(255.0 * red / hits + 0.5)
                out[pixel_row, pixel_column, 1] = int(255.0 * green / hits + 0.5)
                out[pixel_row, pixel_column, 2] = int(255.0 * blue / hits + 0.5)
                out[pixel_row, pixel_column, 3] = int(255.0 * hits / (samples * samples) + 0.5)
            else:
                out[pixel_row, pixel_column, :3] = 255
                out[pixel_row, pixel_column, 3] = 0


@njit(cache=True, fastmath=True, nogil=True)
def _geometry(c2w, tangent, size, rotations, positions, bounds, shapes, dims, out_depth, out_normal):
    """Write depth along the optical axis and world normals at the pixels' centres."""
    step = 2.0 * tangent / size
    depth, owner, local = _visible(c2w, tangent, size, rotations, positions, bounds, shapes, dims)
    for row in range(size):
        v = tangent - (row + 0.5) * step
        for column in range(size):
            part = owner[row, column]
            out_depth[row, column] = 0.0 if part < 0 else depth[row, column]
            out_normal[row, column] = 0.0
            if part < 0:
                continue
            u = (column + 0.5) * step - tangent
            s, axes_seen = depth[row, column], local[part]
            x = axes_seen[3, 0] + s * (u * axes_seen[0, 0] + v * axes_seen[1, 0] - axes_seen[2, 0])
            y = axes_seen[3, 1] + s * (u * axes_seen[0, 1] + v * axes_seen[1, 1] - axes_seen[2, 1])
            z = axes_seen[3, 2] + s * (u * axes_seen[0, 2] + v * axes_seen[1, 2] - axes_seen[2, 2])
            nx, ny, nz = _normal(shapes[part], dims[part], x, y, z)
            for k in range(3):
                out_normal[row, column, k] = (
                    rotations[part, k, 0] * nx + rotations[part, k, 1] * ny + rotations[part, k, 2] * nz
                )


def bounding_balls(shapes: Int[np.ndarray, " p"], dims: Float[np.ndarray, "p 4"]) -> Float[np.ndarray, "p 2"]:
    """Radius of a ball around each part and the position of its centre on the part's x axis."""
    balls = np.zeros((len(shapes), 2))
    ellipsoid, cone, box = (shapes == shape for shape in (Shape.ELLIPSOID, Shape.CONE, Shape.BOX))
    balls[ellipsoid, 0] = dims[ellipsoid, :3].max(axis=1)
    balls[cone, 0] = dims[cone, 0] / 2 + dims[cone, 1:3].max(axis=1)
    balls[cone, 1] = dims[cone, 0] / 2
    balls[box, 0] = np.linalg.norm(dims[box, :3], axis=1)
    return balls


def draw(
    c2w: Float[np.ndarray, "4 4"],
    fov_deg: float,
    size: int,
    rotations: Float[np.ndarray, "p 3 3"],
    positions: Float[np.ndarray, "p 3"],
    surface: "dict[str, np.ndarray]",
    lights: Float[np.ndarray, "l 3"],
    out: UInt8[np.ndarray, "h w 4"],
) -> None:
    """Render one picture into `out`: straight alpha, white where nothing is hit.

    Args:
        c2w: OpenGL camera-to-world matrix.
        fov_deg: field of view over the side of the square picture.
        size: pixels per side.
        rotations, positions: world-from-part transform of every part.
        surface: arrays `shapes`, `dims`, `textures`, `axes`, `scales`, `phases`, `colours` of the parts, and
            `bounds` (`bounding_balls`); colours are linear light.
        lights: row 0 holds (ambient, ambient slope with the normal's z, unused); the others point to a lamp and
            their length is its strength.
        out: the picture to overwrite.
    """
    _picture(
        c2w,
        np.tan(np.deg2rad(fov_deg) / 2),
        size,
        SUPERSAMPLING,
        rotations,
        positions,
        surface["bounds"],
        surface["shapes"],
        surface["dims"],
        surface["textures"],
        surface["axes"],
        surface["scales"],
        surface["phases"],
        surface["colours"],
        lights,
        out,
    )


def draw_geometry(
    c2w: Float[np.ndarray, "4 4"],
    fov_deg: float,
    size: int,
    rotations: Float[np.ndarray, "p 3 3"],
    positions: Float[np.ndarray, "p 3"],
    surface: "dict[str, np.ndarray]",
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w 3"]]:
    """Depth along the optical axis (world units, 0 where nothing is hit) and unit world normals at pixel centres.

    Arguments as in `draw`.
    """
    depth, normals = np.empty((size, size)), np.empty((size, size, 3))
    shape = (surface["bounds"], surface["shapes"], surface["dims"])
    _geometry(c2w, np.tan(np.deg2rad(fov_deg) / 2), size, rotations, positions, *shape, depth, normals)
    return depth, normals
