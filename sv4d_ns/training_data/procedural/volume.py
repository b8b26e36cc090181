"""Which cells a creature fills, and the colour of its surface near a point, from the parts' signed distances."""

import numpy as np
from jaxtyping import Bool, Float

from sv4d_ns.training_data.procedural.renderer import _mix, _normal
from sv4d_ns.utils.compiled import njit


@njit(cache=True, fastmath=True)
def _distance(shape, dims, x, y, z):
    """Signed distance of a point of the part's frame to its surface (ellipsoids: first order), negative inside."""
    if shape == 0:
        px, py, pz = x / dims[0], y / dims[1], z / dims[2]
        ratio = np.sqrt(px * px + py * py + pz * pz)
        slope = np.sqrt((px / dims[0]) ** 2 + (py / dims[1]) ** 2 + (pz / dims[2]) ** 2)
        if slope < 1e-9:
            return -min(dims[0], dims[1], dims[2])
        return ratio * (ratio - 1.0) / slope
    if shape == 2:
        qx, qy, qz = abs(x) - dims[0], abs(y) - dims[1], abs(z) - dims[2]
        outside = np.sqrt(max(qx, 0.0) ** 2 + max(qy, 0.0) ** 2 + max(qz, 0.0) ** 2)
        return outside + min(max(qx, qy, qz), 0.0)
    sine = (dims[1] - dims[2]) / dims[0]
    rho = np.sqrt(y * y + z * z)
    centre = x - rho * sine / np.sqrt(max(1.0 - sine * sine, 1e-6))
    centre = min(max(centre, 0.0), dims[0])
    radius = dims[1] + (dims[2] - dims[1]) * centre / dims[0]
    return np.sqrt((x - centre) ** 2 + rho * rho) - radius


@njit(cache=True, fastmath=True, nogil=True)
def _nearest(points, reach, rotations, positions, bounds, shapes, dims, distance, owner):
    """Distance to the nearest part and which it is, for points that are within `reach` of a part's ball."""
    for n in range(points.shape[0]):
        distance[n] = 1e30
        owner[n] = -1
    for part in range(shapes.shape[0]):
        cx = positions[part, 0] + rotations[part, 0, 0] * bounds[part, 1]
        cy = positions[part, 1] + rotations[part, 1, 0] * bounds[part, 1]
        cz = positions[part, 2] + rotations[part, 2, 0] * bounds[part, 1]
        square = (bounds[part, 0] + reach) ** 2
        for n in range(points.shape[0]):
            wx, wy, wz = points[n, 0], points[n, 1], points[n, 2]
            if (wx - cx) ** 2 + (wy - cy) ** 2 + (wz - cz) ** 2 > square:
                continue
            wx, wy, wz = wx - positions[part, 0], wy - positions[part, 1], wz - positions[part, 2]
            x = rotations[part, 0, 0] * wx + rotations[part, 1, 0] * wy + rotations[part, 2, 0] * wz
            y = rotations[part, 0, 1] * wx + rotations[part, 1, 1] * wy + rotations[part, 2, 1] * wz
            z = rotations[part, 0, 2] * wx + rotations[part, 1, 2] * wy + rotations[part, 2, 2] * wz
            found = _distance(shapes[part], dims[part], x, y, z)
            if found < distance[n]:
                distance[n] = found
                owner[n] = part


@njit(cache=True, fastmath=True, nogil=True)
def _colours(
    points, owner, rotations, positions, shapes, dims, textures, axes, scales, phases, colours, lights, out
):  # fmt: skip
    """Shaded colour of each point's nearest part where the surface is closest."""
    for n in range(points.shape[0]):
        part = owner[n]
        if part < 0:
            continue
        wx, wy, wz = (points[n, 0] - positions[part, 0], points[n, 1] - positions[part, 1],
                      points[n, 2] - positions[part, 2])  # fmt: skip
        x = rotations[part, 0, 0] * wx + rotations[part, 1, 0] * wy + rotations[part, 2, 0] * wz
        y = rotations[part, 0, 1] * wx + rotations[part, 1, 1] * wy + rotations[part, 2, 1] * wz
        z = rotations[part, 0, 2] * wx + rotations[part, 1, 2] * wy + rotations[part, 2, 2] * wz
        nx, ny, nz = _normal(shapes[part], dims[part], x, y, z)
        away = _distance(shapes[part], dims[part], x, y, z)
        x, y, z = x - away * nx, y - away * ny, z - away * nz
        share = _mix(textures[part], axes[part], scales[part], phases[part], x, y, z, nx, ny, nz)
        light = lights[0, 0]
        normal_z = rotations[part, 2, 0] * nx + rotations[part, 2, 1] * ny + rotations[part, 2, 2] * nz
        normal_x = rotations[part, 0, 0] * nx + rotations[part, 0, 1] * ny + rotations[part, 0, 2] * nz
        normal_y = rotations[part, 1, 0] * nx + rotations[part, 1, 1] * ny + rotations[part, 1, 2] * nz
        light += lights[0, 1] * normal_z
        for lamp in range(1, lights.shape[0]):
            facing = normal_x * lights[lamp, 0] + normal_y * lights[lamp, 1] + normal_z * lights[lamp, 2]
            light += max(facing, 0.0)
        for c in range(3):
            value = colours[part, 0, c] + share * (colours[part, 1, c] - colours[part, 0, c])
            out[n, c] = min(np.sqrt(max(light * value, 0.0)), 1.0)


def inside(
    points: Float[np.ndarray, "n 3"],
    rotations: Float[np.ndarray, "p 3 3"],
    positions: Float[np.ndarray, "p 3"],
    surface: "dict[str, np.ndarray]",
) -> Bool[np.ndarray, " n"]:
    """Whether world points are inside any part; arguments as in `renderer.draw`."""
    distance, owner = np.empty(len(points)), np.empty(len(points), np.int32)
    shape = (surface["bounds"], surface["shapes"], surface["dims"])
    _nearest(points, 0.0, rotations, positions, *shape, distance, owner)
    return distance <= 0.0  # type: ignore[no-any-return]


def surface_colours(
    points: Float[np.ndarray, "n 3"],
    reach: float,
    rotations: Float[np.ndarray, "p 3 3"],
    positions: Float[np.ndarray, "p 3"],
    surface: "dict[str, np.ndarray]",
    lights: Float[np.ndarray, "l 3"],
) -> Float[np.ndarray, "n 3"]:
    """Shaded sRGB in [0, 1] of the surface nearest to world points; white farther than `reach` from every part."""
    distance, owner = np.empty(len(points)), np.empty(len(points), np.int32)
    _nearest(
        points, reach, rotations, positions, surface["bounds"], surface["shapes"], surface["dims"], distance, owner
    )
    out = np.ones((len(points), 3))
    names = ("shapes", "dims", "textures", "axes", "scales", "phases", "colours")
    _colours(points, owner, rotations, positions, *(surface[name] for name in names), lights, out)
    return out
