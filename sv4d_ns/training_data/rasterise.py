"""Pictures of a posed mesh: a compiled z-buffer with sixteen samples a pixel, textures, vertex colours and soft light.

Each face that a pixel shows is shaded once, at the middle of its samples there. Both sides of every face are drawn, as
Blender's Cycles does, whatever `doubleSided` says. A half-transparent face covers that share of a pixel's samples.
"""

import numpy as np
from jaxtyping import Float, UInt8

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG
from sv4d_ns.training_data.gltf_scene import PosedMesh, Scene
from sv4d_ns.training_data.lighting import HALF_SIDE, LightField, lit
from sv4d_ns.utils.compiled import njit

SAMPLES = 4
"""Of a pixel's side."""
_LINEAR = np.where(
    np.arange(256) / 255 <= 0.04045, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
).astype(np.float32)
_STEPS = 4096
_RAMP = np.linspace(0.0, 1.0, _STEPS + 1)
_SRGB = np.where(_RAMP <= 0.0031308, _RAMP * 12.92, 1.055 * _RAMP ** (1 / 2.4) - 0.055).astype(np.float32)
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], np.float32) / 16 + 1 / 32


def draw(
    mesh: PosedMesh, light: LightField, c2w: Float[np.ndarray, "v 4 4"], size: int, fov_deg: float = FIELD_OF_VIEW_DEG
) -> UInt8[np.ndarray, "v h w 4"]:
    """RGBA pictures with straight alpha, white where nothing is.

    Args:
        c2w: OpenGL camera-to-world matrices.
        size: pixels per side.
        fov_deg: field of view over the side.
    """
    pictures = np.empty((len(c2w), size, size, 4), np.uint8)
    look = look_of(mesh.scene, light)
    for camera, picture in zip(np.asarray(c2w, dtype=np.float64), pictures, strict=True):
        _picture(
            np.ascontiguousarray(camera), np.tan(np.deg2rad(fov_deg) / 2), mesh.positions, mesh.normals,
            mesh.scene.faces, look, picture,
        )  # fmt: skip
    return pictures


def look_of(scene: Scene, light: LightField) -> tuple:  # type: ignore[type-arg]
    """What decides the colour of a point of a face, for the compiled code."""
    lighting = light.lighting
    return (
        scene.uvs, scene.colours, scene.face_materials, scene.material_factors, scene.material_textures,
        scene.material_modes, scene.material_cutoffs, scene.texels, scene.texture_levels, scene.texture_clamps,
        light.cells, lighting.sky, lighting.ground, lighting.directions, lighting.strengths, lighting.tint,
    )  # fmt: skip


@njit(cache=True, nogil=True, fastmath=True)
def texel(texels, levels, clamps, u, v, level, out):  # type: ignore[no-untyped-def]
    """Bilinear RGBA of a texture at a level: linear light, alpha as it is."""
    base, height, width = levels[level, 0], levels[level, 1], levels[level, 2]
    x = (min(max(u, 0.0), 1.0) if clamps[0] else u - np.floor(u)) * width - 0.5
    y = (min(max(v, 0.0), 1.0) if clamps[1] else v - np.floor(v)) * height - 0.5
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    p, q = x - x0, y - y0
    out[0], out[1], out[2], out[3] = 0.0, 0.0, 0.0, 0.0
    for corner in range(4):
        i, j = x0 + (corner & 1), y0 + (corner >> 1)
        i = min(max(i, 0), width - 1) if clamps[0] else i % width
        j = min(max(j, 0), height - 1) if clamps[1] else j % height
        weight = (p if corner & 1 else 1.0 - p) * (q if corner >> 1 else 1.0 - q)
        at = base + 4 * (j * width + i)
        for c in range(3):
            out[c] += weight * _LINEAR[texels[at + c]]
        out[3] += weight * texels[at + 3] / 255.0


@njit(cache=True, nogil=True, fastmath=True)
def surface_colour(look, a, b, c, face, u, v, w, level, out):  # type: ignore[no-untyped-def]
    """Base colour and alpha (linear) of a face at barycentric weights u, v, w into `out`."""
    uvs, colours, materials, factors, textures, _, _, texels, levels, clamps = look[:10]
    material = materials[face]
    if textures[material] >= 0:
        s = u * uvs[a, 0] + v * uvs[b, 0] + w * uvs[c, 0]
        t = u * uvs[a, 1] + v * uvs[b, 1] + w * uvs[c, 1]
        texture = textures[material]
        texel(texels, levels[texture], clamps[texture], s, t, level, out)
    else:
        out[:] = 1.0
    for k in range(4):
        out[k] *= factors[material, k] * (u * colours[a, k] + v * colours[b, k] + w * colours[c, k])


@njit(cache=True, nogil=True, fastmath=True)
def mip_level(look, face, a, b, c, area):  # type: ignore[no-untyped-def]
    """Texture level at which a texel is about a pixel; `area` of the face in pixels."""
    uvs, _, materials, _, textures = look[:5]
    levels = look[8]
    texture = textures[materials[face]]
    if texture < 0:
        return 0
    texels = abs(
        (uvs[b, 0] - uvs[a, 0]) * (uvs[c, 1] - uvs[a, 1]) - (uvs[c, 0] - uvs[a, 0]) * (uvs[b, 1] - uvs[a, 1])
    ) * (levels[texture, 0, 1] * levels[texture, 0, 2])
    ratio = texels / max(2.0 * area, 1e-9)
    if ratio <= 1.0:
        return 0
    return min(int(0.5 * np.log2(ratio) + 0.5), levels.shape[1] - 1)


@njit(cache=True, nogil=True, fastmath=True)
def cross(a, b, c):  # type: ignore[no-untyped-def]
    """(b - a) x (c - a)."""
    ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    return uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx


@njit(cache=True, nogil=True, fastmath=True)
def encode(value):  # type: ignore[no-untyped-def]
    """sRGB of linear light, in [0, 1]."""
    return _SRGB[int(min(max(value, 0.0), 1.0) * _STEPS + 0.5)]


@njit(cache=True, nogil=True)
def _transparent(look, a, b, c, face, u, v, w, row, column, scratch):  # type: ignore[no-untyped-def]
    """Whether a sample of a face that is not opaque shows what lies behind it."""
    modes, cutoffs = look[5], look[6]
    surface_colour(look, a, b, c, face, u, v, w, 0, scratch)
    if modes[look[2][face]] == 1:
        return scratch[3] < cutoffs[look[2][face]]
    return scratch[3] < _BAYER[row % 4, column % 4]


@njit(cache=True, nogil=True, fastmath=True)
def zbuffer(x, y, inverse, faces, look, near, shown):  # type: ignore[no-untyped-def]
    """The nearest face of every sample, and one over its depth."""
    side = near.shape[0]
    materials, modes = look[2], look[5]
    scratch = np.empty(4, np.float64)
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        if inverse[a] <= 0.0 or inverse[b] <= 0.0 or inverse[c] <= 0.0:
            continue
        xa, ya, xb, yb, xc, yc = x[a], y[a], x[b], y[b], x[c], y[c]
        left, right = max(int(np.ceil(min(xa, xb, xc) - 0.5)), 0), min(int(np.floor(max(xa, xb, xc) - 0.5)), side - 1)
        top, bottom = max(int(np.ceil(min(ya, yb, yc) - 0.5)), 0), min(int(np.floor(max(ya, yb, yc) - 0.5)), side - 1)
        if left > right or top > bottom:
            continue
        area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
        if abs(area) < 1e-12:
            continue
        scale = 1.0 / area
        ux, uy = -(yc - yb) * scale, (xc - xb) * scale
        vx, vy = -(ya - yc) * scale, (xa - xc) * scale
        u0 = ((xb - 0.5) * (yc - 0.5) - (xc - 0.5) * (yb - 0.5)) * scale
        v0 = ((xc - 0.5) * (ya - 0.5) - (xa - 0.5) * (yc - 0.5)) * scale
        za, zb, zc = inverse[a], inverse[b], inverse[c]
        opaque = modes[materials[face]] == 0
        for row in range(top, bottom + 1):
            for column in range(left, right + 1):
                u, v = u0 + uy * row + ux * column, v0 + vy * row + vx * column
                w = 1.0 - u - v
                if u >= -1e-9 and v >= -1e-9 and w >= -1e-9:
                    z = u * za + v * zb + w * zc
                    if z <= near[row, column]:
                        continue
                    if not opaque:
                        p, q, r = u * za / z, v * zb / z, w * zc / z
                        if _transparent(look, a, b, c, face, p, q, r, row, column, scratch):
                            continue
                    near[row, column] = z
                    shown[row, column] = face


@njit(cache=True, nogil=True, fastmath=True)
def shade(look, positions, normals, a, b, c, face, u, v, w, level, ex, ey, ez, albedo, light):  # type: ignore[no-untyped-def]
    """Light that a face sends towards an eye, linear, into `light`; the eye decides only which side is seen."""
    cells, sky, ground, directions, strengths, tint = look[10:]
    nx = u * normals[a, 0] + v * normals[b, 0] + w * normals[c, 0]
    ny = u * normals[a, 1] + v * normals[b, 1] + w * normals[c, 1]
    nz = u * normals[a, 2] + v * normals[b, 2] + w * normals[c, 2]
    px = u * positions[a, 0] + v * positions[b, 0] + w * positions[c, 0]
    py = u * positions[a, 1] + v * positions[b, 1] + w * positions[c, 1]
    pz = u * positions[a, 2] + v * positions[b, 2] + w * positions[c, 2]
    gx, gy, gz = cross(positions[a], positions[b], positions[c])
    outward = gx * nx + gy * ny + gz * nz
    toward = gx * (ex - px) + gy * (ey - py) + gz * (ez - pz)
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    if length < 1e-9:
        nx, ny, nz, outward = gx, gy, gz, 1.0
        length = max(np.sqrt(nx * nx + ny * ny + nz * nz), 1e-30)
    sign = (1.0 if outward * toward >= 0.0 else -1.0) / length
    surface_colour(look, a, b, c, face, u, v, w, level, albedo)
    lit(cells, HALF_SIDE, sky, ground, directions, strengths, px, py, pz, nx * sign, ny * sign, nz * sign, light)
    for k in range(3):
        light[k] *= albedo[k] * tint[k]


@njit(cache=True, nogil=True, fastmath=True)
def _picture(c2w, tangent, positions, normals, faces, look, out):  # type: ignore[no-untyped-def]
    size = out.shape[0]
    side = size * SAMPLES
    count = positions.shape[0]
    x, y, inverse = np.empty(count), np.empty(count), np.empty(count)
    focal = 0.5 * side / tangent
    for vertex in range(count):
        dx, dy = positions[vertex, 0] - c2w[0, 3], positions[vertex, 1] - c2w[1, 3]
        dz = positions[vertex, 2] - c2w[2, 3]
        depth = -(c2w[0, 2] * dx + c2w[1, 2] * dy + c2w[2, 2] * dz)
        inverse[vertex] = 1.0 / depth if depth > 1e-3 else -1.0
        x[vertex] = 0.5 * side + focal * (c2w[0, 0] * dx + c2w[1, 0] * dy + c2w[2, 0] * dz) * inverse[vertex]
        y[vertex] = 0.5 * side - focal * (c2w[0, 1] * dx + c2w[1, 1] * dy + c2w[2, 1] * dz) * inverse[vertex]
    near = np.zeros((side, side), np.float32)
    shown = np.full((side, side), -1, np.int32)
    zbuffer(x, y, inverse, faces, look, near, shown)
    albedo, light, total = np.empty(4), np.empty(3), np.empty(3)
    done = np.empty(SAMPLES * SAMPLES, np.bool_)
    for row in range(size):
        for column in range(size):
            hits = 0
            total[:] = 0.0
            done[:] = False
            for first in range(SAMPLES * SAMPLES):
                face = shown[row * SAMPLES + first // SAMPLES, column * SAMPLES + first % SAMPLES]
                if face < 0 or done[first]:
                    continue
                samples, sx, sy = 0, 0.0, 0.0
                for other in range(first, SAMPLES * SAMPLES):
                    r, s = row * SAMPLES + other // SAMPLES, column * SAMPLES + other % SAMPLES
                    if shown[r, s] == face:
                        done[other] = True
                        samples += 1
                        sx += s + 0.5
                        sy += r + 0.5
                sx, sy = sx / samples, sy / samples
                a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
                area = (x[b] - x[a]) * (y[c] - y[a]) - (x[c] - x[a]) * (y[b] - y[a])
                u = ((x[b] - sx) * (y[c] - sy) - (x[c] - sx) * (y[b] - sy)) / area * inverse[a]
                v = ((x[c] - sx) * (y[a] - sy) - (x[a] - sx) * (y[c] - sy)) / area * inverse[b]
                w = ((x[a] - sx) * (y[b] - sy) - (x[b] - sx) * (y[a] - sy)) / area * inverse[c]
                both = u + v + w
                u, v, w = u / both, v / both, w / both
                level = mip_level(look, face, a, b, c, abs(area) / (2 * SAMPLES * SAMPLES))
                shade(
                    look, positions, normals, a, b, c, face, u, v, w, level, c2w[0, 3], c2w[1, 3], c2w[2, 3], albedo,
                    light,
                )  # fmt: skip
                hits += samples
                for k in range(3):
                    total[k] += samples * encode(light[k])
            if hits > 0:
                for k in range(3):
                    out[row, column, k] = int(255.0 * total[k] / hits + 0.5)
                out[row, column, 3] = int(255.0 * hits / (SAMPLES * SAMPLES) + 0.5)
            else:
                out[row, column, :3] = 255
                out[row, column, 3] = 0
