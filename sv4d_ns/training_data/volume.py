"""The true volume of a posed mesh in the input camera's frustum, and the colour of its surface near given points.

Game assets are closed parts that cross each other, beside open sheets. Crossings with the surface are found along the
three axes of the grid: the rays of the pixels, and lines across each depth slice. Between them
- closed components are inside wherever their winding number is not zero (two of three axes agree);
- open components are inside where the mean of the six half-lines' winding numbers, which estimates the generalised
  winding number (Jacobson, Kavan, Sorkine-Hornung 2013), is above one half: sleeves and bodies with a hole are solid;
- what is thinner than a cell, and sheets, take the cells that they cross;
- cavities that no path from outside reaches are filled.
"""

import numpy as np
from jaxtyping import Bool, Float

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG
from sv4d_ns.training_data.gltf_scene import PosedMesh
from sv4d_ns.training_data.lighting import LightField
from sv4d_ns.training_data.rasterise import cross, encode, look_of, mip_level, shade, zbuffer
from sv4d_ns.utils.compiled import njit

RESOLUTION = 64
NEAR, FAR = 1.43, 2.57
"""Distances along the optical axis between which the grid's depths lie, world units."""
THIN = 1.5
"""Thickness in cells up to which a closed component counts as thin."""
SPACING = 0.012
"""Between the surface samples that `nearest_colours` looks among, world units."""


def occupancy(
    mesh: PosedMesh,
    input_c2w: Float[np.ndarray, "4 4"],
    resolution: int = RESOLUTION,
    fov_deg: float = FIELD_OF_VIEW_DEG,
) -> Bool[np.ndarray, "d h w"]:
    """Which cells of the input camera's frustum grid are inside the object, [depth, row, column]."""
    scene = mesh.scene
    rotation, position = np.asarray(input_c2w)[:3, :3], np.asarray(input_c2w)[:3, 3]
    seen = (mesh.positions - position) @ rotation
    seen[:, 2] *= -1.0
    kept = _solid(mesh)
    faces = scene.faces[kept]
    tangent = np.tan(np.deg2rad(fov_deg) / 2)
    inside = np.zeros((resolution,) * 3, np.bool_)
    if not len(faces):
        return inside
    _occupancy(
        np.ascontiguousarray(seen), faces, mesh.face_signs[kept], scene.face_closed[kept], scene.face_components[kept],
        tangent, NEAR, FAR, inside,
    )  # fmt: skip
    return inside


def _solid(mesh: PosedMesh) -> Bool[np.ndarray, " f"]:
    """Faces that are more than half opaque as far as their material says (cut-outs by texture count whole)."""
    scene = mesh.scene
    return (scene.material_modes == 0)[scene.face_materials] | (scene.material_factors[:, 3] >= 0.5)[
        scene.face_materials
    ]


@njit(cache=True, nogil=True)
def _push(starts, fill, place, kind, counting, ray, at, sign):  # type: ignore[no-untyped-def]
    """Count a crossing of a ray, or put it into the ray's list in order."""
    if counting:
        starts[ray + 1] += 1
        return
    slot = starts[ray] + fill[ray]
    fill[ray] += 1
    while slot > starts[ray] and place[slot - 1] > at:
        place[slot], kind[slot] = place[slot - 1], kind[slot - 1]
        slot -= 1
    place[slot], kind[slot] = at, sign


@njit(cache=True, nogil=True)
def _along_depth(seen, faces, signs, closed, tangent, near, far, n, starts, fill, place, kind, counting):  # type: ignore[no-untyped-def]
    """Crossings of the pixels' rays; place is a depth in cells, kind +-1 for closed and +-2 for open components."""
    cell = (far - near) / n
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        za, zb, zc = seen[a, 2], seen[b, 2], seen[c, 2]
        if min(za, zb, zc) < 1e-3:
            continue
        # a tiny shift keeps rays off the corners and edges of neatly placed models
        scale = 0.5 * n / tangent
        xa, ya = seen[a, 0] / za * scale + 0.5 * n + 1.3e-7, -seen[a, 1] / za * scale + 0.5 * n + 2.1e-7
        xb, yb = seen[b, 0] / zb * scale + 0.5 * n + 1.3e-7, -seen[b, 1] / zb * scale + 0.5 * n + 2.1e-7
        xc, yc = seen[c, 0] / zc * scale + 0.5 * n + 1.3e-7, -seen[c, 1] / zc * scale + 0.5 * n + 2.1e-7
        area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
        if area == 0.0:
            continue
        left, right = max(int(np.ceil(min(xa, xb, xc) - 0.5)), 0), min(int(np.floor(max(xa, xb, xc) - 0.5)), n - 1)
        top, bottom = max(int(np.ceil(min(ya, yb, yc) - 0.5)), 0), min(int(np.floor(max(ya, yb, yc) - 0.5)), n - 1)
        # rows grow downward: an outward face that looks at the camera has a negative area
        enters = (1.0 if area < 0.0 else -1.0) * signs[face] * (1.0 if closed[face] else 2.0)
        for row in range(top, bottom + 1):
            for column in range(left, right + 1):
                sx, sy = column + 0.5, row + 0.5
                u = ((xb - sx) * (yc - sy) - (xc - sx) * (yb - sy)) / area
                v = ((xc - sx) * (ya - sy) - (xa - sx) * (yc - sy)) / area
                w = ((xa - sx) * (yb - sy) - (xb - sx) * (ya - sy)) / area
                if u >= 0.0 and v >= 0.0 and w >= 0.0:
                    depth = 1.0 / (u / za + v / zb + w / zc)
                    _push(starts, fill, place, kind, counting, row * n + column, (depth - near) / cell, enters)


@njit(cache=True, nogil=True)
def _across(seen, faces, signs, closed, axis, tangent, near, far, n, starts, fill, place, kind, counting):  # type: ignore[no-untyped-def]
    """Crossings of the lines of each depth slice along columns' (axis 0) or rows' (axis 1) direction."""
    cell = (far - near) / n
    other = 1 - axis
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        za, zb, zc = seen[a, 2], seen[b, 2], seen[c, 2]
        first = max(int(np.ceil((min(za, zb, zc) - near) / cell - 0.5)), 0)
        last = min(int(np.floor((max(za, zb, zc) - near) / cell - 0.5)), n - 1)
        if first > last:
            continue
        # the normal's part along the line decides whether it enters
        ux, uy, uz = seen[b, 0] - seen[a, 0], seen[b, 1] - seen[a, 1], zb - za
        vx, vy, vz = seen[c, 0] - seen[a, 0], seen[c, 1] - seen[a, 1], zc - za
        # camera space with z forward is left-handed, so the cross product turns inward
        along = uy * vz - uz * vy if axis == 0 else uz * vx - ux * vz
        if along == 0.0:
            continue
        # lines run to the right, and down
        enters = (1.0 if along > 0.0 else -1.0) * (1.0 if axis == 0 else -1.0)
        enters *= signs[face] * (1.0 if closed[face] else 2.0)
        for slice_ in range(first, last + 1):
            depth = near + (slice_ + 0.5) * cell
            count = 0
            p0, q0, p1, q1 = 0.0, 0.0, 0.0, 0.0
            for edge in range(3):
                i = a if edge == 0 else (b if edge == 1 else c)
                j = b if edge == 0 else (c if edge == 1 else a)
                if (seen[i, 2] < depth) == (seen[j, 2] < depth):
                    continue
                if seen[i, 2] > seen[j, 2]:
                    i, j = j, i
                t = (depth - seen[i, 2]) / (seen[j, 2] - seen[i, 2])
                p = seen[i, axis] + t * (seen[j, axis] - seen[i, axis])
                q = seen[i, other] + t * (seen[j, other] - seen[i, other])
                if count == 0:
                    p0, q0 = p, q
                else:
                    p1, q1 = p, q
                count += 1
            if count != 2:
                continue
            # in cells: columns grow to the right, rows downward
            scale = 0.5 * n / (tangent * depth)
            down0, down1 = (-scale, scale) if axis == 0 else (scale, -scale)
            line0, line1 = q0 * down0 + 0.5 * n + 1.7e-7, q1 * down0 + 0.5 * n + 1.7e-7
            at0, at1 = p0 * down1 + 0.5 * n, p1 * down1 + 0.5 * n
            low, high = min(line0, line1), max(line0, line1)
            for line in range(max(int(np.ceil(low - 0.5)), 0), min(int(np.ceil(high - 0.5)), n)):
                at = at0 + (line + 0.5 - line0) / (line1 - line0) * (at1 - at0)
                _push(starts, fill, place, kind, counting, slice_ * n + line, at, enters)


@njit(cache=True, nogil=True)
def _vote(axis, n, starts, place, kind, solid, hollow, shell):  # type: ignore[no-untyped-def]
    """Add an axis' votes: `solid` counts axes inside closed parts, `hollow` adds the half-lines' winding numbers."""
    for ray in range(n * n):
        begin, end = starts[ray], starts[ray + 1]
        if begin == end:
            continue
        total = 0.0
        for slot in range(begin, end):
            if abs(kind[slot]) == 2.0:
                total += 0.5 * kind[slot]
        wind, front, slot, entered = 0.0, 0.0, begin, 0.0
        for cell in range(n):
            while slot < end and place[slot] < cell + 0.5:
                at = int(np.floor(place[slot]))
                if abs(kind[slot]) == 1.0:
                    before = wind
                    wind += kind[slot]
                    if before == 0.0:
                        entered = place[slot]
                    elif wind == 0.0 and np.ceil(entered - 0.5) + 0.5 > place[slot]:
                        # a stretch without a cell's centre
                        middle = int(np.floor(0.5 * (entered + place[slot])))
                        if 0 <= middle < n:
                            _set(shell, axis, ray, middle, n)
                else:
                    front += 0.5 * kind[slot]
                    if 0 <= at < n:
                        _set(shell, axis, ray, at, n)
                slot += 1
            if slot == end and wind == 0.0 and front == 0.0 and total == 0.0:
                break
            # many sheets in a row count as one, or a tree's leaves would fill the grid behind them
            half_lines = min(max(front, -1.0), 1.0) - min(max(total - front, -1.0), 1.0)
            if wind != 0.0 or half_lines != 0.0:
                i, j = ray // n, ray % n
                d, r, c = (cell, i, j) if axis == 2 else ((i, j, cell) if axis == 0 else (i, cell, j))
                if wind != 0.0:
                    solid[d, r, c] += 1
                hollow[d, r, c] += half_lines
    return


@njit(cache=True, nogil=True)
def _set(shell, axis, ray, cell, n):  # type: ignore[no-untyped-def]
    i, j = ray // n, ray % n
    if axis == 2:
        shell[cell, i, j] = True
    elif axis == 0:
        shell[i, j, cell] = True
    else:
        shell[i, cell, j] = True


@njit(cache=True, nogil=True)
def _occupancy(seen, faces, signs, closed, components, tangent, near, far, inside):  # type: ignore[no-untyped-def]
    n = inside.shape[0]
    solid = np.zeros((n, n, n), np.uint8)
    hollow = np.zeros((n, n, n), np.float32)
    for axis in range(3):
        starts = np.zeros(n * n + 1, np.int64)
        fill = np.zeros(n * n, np.int64)
        place, kind = np.empty(0), np.empty(0)
        for turn in range(2):
            counting = turn == 0
            if axis == 2:
                _along_depth(seen, faces, signs, closed, tangent, near, far, n, starts, fill, place, kind, counting)
            else:
                _across(seen, faces, signs, closed, axis, tangent, near, far, n, starts, fill, place, kind, counting)
            if counting:
                for ray in range(n * n):
                    starts[ray + 1] += starts[ray]
                place, kind = np.empty(starts[-1]), np.empty(starts[-1])
        _vote(axis, n, starts, place, kind, solid, hollow, inside)
    for d in range(n):
        for r in range(n):
            for c in range(n):
                # six half-lines: their mean above one half, whichever way the sheet is turned
                if solid[d, r, c] >= 2 or abs(hollow[d, r, c]) > 3.5:
                    inside[d, r, c] = True
    _thin_parts(seen, faces, signs, closed, components, tangent, near, far, inside)
    _fill_cavities(inside)


@njit(cache=True, nogil=True)
def _fill_cavities(inside):  # type: ignore[no-untyped-def]
    """Fill what cannot be reached from the grid's border: nobody sees it, and walls of hollow parts are rarely told
    apart from skins. Marked cells of a sheet have no gap that a path over cells' faces could pass."""
    n = inside.shape[0]
    flat = inside.reshape(-1)
    outside = np.zeros(n * n * n, np.bool_)
    stack = np.empty(n * n * n, np.int32)
    top = 0
    for i in range(n):
        for j in range(n):
            for cell in ((i * n + j) * n, (i * n + j) * n + n - 1, (i * n) * n + j, (i * n + n - 1) * n + j,
                         i * n + j, ((n - 1) * n + i) * n + j):  # fmt: skip
                if not flat[cell] and not outside[cell]:
                    outside[cell] = True
                    stack[top] = cell
                    top += 1
    while top > 0:
        top -= 1
        cell = stack[top]
        c, r, d = cell % n, (cell // n) % n, cell // (n * n)
        for side in range(6):
            step = (1, n, n * n)[side // 2] * (1 if side % 2 else -1)
            at = (c, r, d)[side // 2]
            if (side % 2 and at == n - 1) or (not side % 2 and at == 0):
                continue
            other = cell + step
            if not flat[other] and not outside[other]:
                outside[other] = True
                stack[top] = other
                top += 1
    for cell in range(n * n * n):
        flat[cell] = not outside[cell]


@njit(cache=True, nogil=True, fastmath=True)
def _thin_parts(seen, faces, signs, closed, components, tangent, near, far, inside):  # type: ignore[no-untyped-def]
    """Mark the cells along the middle of thin closed components: rods that no line meets would be broken."""
    n = inside.shape[0]
    cell = (far - near) / n
    volumes, areas = np.zeros(components.max() + 1), np.zeros(components.max() + 1)
    for face in range(faces.shape[0]):
        a, b, c = seen[faces[face, 0]], seen[faces[face, 1]], seen[faces[face, 2]]
        x, y, z = cross(a, b, c)
        volumes[components[face]] += signs[face] * (x * a[0] + y * a[1] + z * a[2]) / 6.0
        areas[components[face]] += 0.5 * np.sqrt(x * x + y * y + z * z)
    for face in range(faces.shape[0]):
        # a rod's radius is twice its volume over its surface, half a plate's thickness is once that
        middle = 1.5 * abs(volumes[components[face]]) / max(areas[components[face]], 1e-12)
        if not closed[face] or 2.0 * middle > THIN * cell:
            continue
        x, y, z = cross(seen[faces[face, 0]], seen[faces[face, 1]], seen[faces[face, 2]])
        # camera space with z forward is left-handed, so the cross product turns inward
        length = signs[face] * middle / max(np.sqrt(x * x + y * y + z * z), 1e-30)
        x, y, z = x * length, y * length, z * length
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        ux, uy, uz = seen[b, 0] - seen[a, 0], seen[b, 1] - seen[a, 1], seen[b, 2] - seen[a, 2]
        vx, vy, vz = seen[c, 0] - seen[a, 0], seen[c, 1] - seen[a, 1], seen[c, 2] - seen[a, 2]
        wx, wy, wz = ux - vx, uy - vy, uz - vz
        longest = np.sqrt(max(ux * ux + uy * uy + uz * uz, vx * vx + vy * vy + vz * vz, wx * wx + wy * wy + wz * wz))
        steps = int(longest / cell * 1.5) + 1
        for i in range(steps + 1):
            p = i / steps
            for j in range(steps + 1 - i):
                q = j / steps
                depth = z + seen[a, 2] + p * uz + q * vz
                if depth < 1e-3:
                    continue
                scale = 0.5 * n / (tangent * depth)
                d = int(np.floor((depth - near) / cell))
                column = int(np.floor((x + seen[a, 0] + p * ux + q * vx) * scale + 0.5 * n))
                row = int(np.floor(0.5 * n - (y + seen[a, 1] + p * uy + q * vy) * scale))
                if 0 <= d < n and 0 <= row < n and 0 <= column < n:
                    inside[d, row, column] = True


def nearest_colours(
    mesh: PosedMesh, light: LightField, points: Float[np.ndarray, "n 3"], spacing: float = SPACING
) -> Float[np.ndarray, "n 3"]:
    """sRGB in [0, 1], lit as in the pictures, of the nearest visible surface to world points (float32).

    The surface is sampled `spacing` apart. Surfaces that no direction sees count as farther away.
    """
    colours = np.empty((len(points), 3), np.float32)
    _nearest(
        np.ascontiguousarray(points, dtype=np.float64), mesh.positions, mesh.normals, mesh.scene.faces,
        look_of(mesh.scene, light), spacing, _sphere(DIRECTIONS), colours,
    )  # fmt: skip
    return colours


DIRECTIONS = 14
"""From which surface samples are looked at, to tell the visible ones."""
DEPTH_SIZE = 128
CLEARANCE = 0.012
"""How far a sample may lie behind the first surface and still count as seen, world units (more than a pixel)."""
HANDICAP = 0.05
"""By how much farther away hidden samples count, added in squares, world units."""


def _sphere(count: int) -> Float[np.ndarray, "n 3"]:
    """Directions spread evenly (Fibonacci's lattice)."""
    index = np.arange(count) + 0.5
    z, turn = 1.0 - 2.0 * index / count, np.pi * (1.0 + 5.0**0.5) * index
    ring = np.sqrt(1.0 - z * z)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), z], axis=1)


@njit(cache=True, nogil=True, fastmath=True)
def _hidden(places, positions, faces, look, directions, half):  # type: ignore[no-untyped-def]
    """Whether no direction sees a surface sample, by depth pictures with parallel rays."""
    hidden = np.ones(places.shape[0], np.bool_)
    count = positions.shape[0]
    x, y, nearness = np.empty(count), np.empty(count), np.empty(count)
    scale = DEPTH_SIZE / (2.0 * half)
    for k in range(directions.shape[0]):
        dx, dy, dz = directions[k]
        # two directions across
        ax, ay, az = (0.0, -dz, dy) if abs(dx) < 0.7 else (dz, 0.0, -dx)
        length = np.sqrt(ax * ax + ay * ay + az * az)
        ax, ay, az = ax / length, ay / length, az / length
        bx, by, bz = dy * az - dz * ay, dz * ax - dx * az, dx * ay - dy * ax
        for vertex in range(count):
            px, py, pz = positions[vertex]
            x[vertex] = (px * ax + py * ay + pz * az + half) * scale
            y[vertex] = (px * bx + py * by + pz * bz + half) * scale
            nearness[vertex] = 4.0 + px * dx + py * dy + pz * dz
        near = np.zeros((DEPTH_SIZE, DEPTH_SIZE), np.float32)
        shown = np.full((DEPTH_SIZE, DEPTH_SIZE), -1, np.int32)
        zbuffer(x, y, nearness, faces, look, near, shown)
        for sample in range(places.shape[0]):
            if hidden[sample]:
                px, py, pz = places[sample]
                column = min(max(int((px * ax + py * ay + pz * az + half) * scale), 0), DEPTH_SIZE - 1)
                row = min(max(int((px * bx + py * by + pz * bz + half) * scale), 0), DEPTH_SIZE - 1)
                if 4.0 + px * dx + py * dy + pz * dz >= near[row, column] - CLEARANCE:
                    hidden[sample] = False
    return hidden


@njit(cache=True, nogil=True, fastmath=True)
def _nearest(points, positions, normals, faces, look, spacing, directions, out):  # type: ignore[no-untyped-def]
    half, grid = 0.64, 40
    total = 0
    for face in range(faces.shape[0]):
        steps = _steps(positions, faces[face], spacing)
        total += steps * (steps + 1) // 2
    places, colours, cells = np.empty((total, 3)), np.empty((total, 3), np.float32), np.empty(total, np.int64)
    albedo, light = np.empty(4), np.empty(3)
    counts = np.zeros(grid**3 + 1, np.int64)
    scale = grid / (2.0 * half)
    sample = 0
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        steps = _steps(positions, faces[face], spacing)
        texture = look[4][look[2][face]]
        area = _area(positions, a, b, c) / (spacing * spacing)
        level = mip_level(look, face, a, b, c, area) if texture >= 0 else 0
        for i in range(steps):
            for j in range(steps - i):
                v, w = (i + 1 / 3) / steps, (j + 1 / 3) / steps
                u = 1.0 - v - w
                for k in range(3):
                    places[sample, k] = u * positions[a, k] + v * positions[b, k] + w * positions[c, k]
                # seen from outside: the eye stands on the normals' side
                nx = normals[a, 0] + normals[b, 0] + normals[c, 0]
                ny = normals[a, 1] + normals[b, 1] + normals[c, 1]
                nz = normals[a, 2] + normals[b, 2] + normals[c, 2]
                shade(
                    look, positions, normals, a, b, c, face, u, v, w, level, places[sample, 0] + nx,
                    places[sample, 1] + ny, places[sample, 2] + nz, albedo, light,
                )  # fmt: skip
                for k in range(3):
                    colours[sample, k] = encode(light[k])
                cell = 0
                for k in range(3):
                    cell = cell * grid + min(max(int((places[sample, k] + half) * scale), 0), grid - 1)
                cells[sample] = cell
                counts[cell + 1] += 1
                sample += 1
    handicaps = np.where(_hidden(places, positions, faces, look, directions, half), HANDICAP * HANDICAP, 0.0)
    for cell in range(grid**3):
        counts[cell + 1] += counts[cell]
    order, fill = np.empty(total, np.int64), counts[:-1].copy()
    for sample in range(total):
        order[fill[cells[sample]]] = sample
        fill[cells[sample]] += 1
    for point in range(points.shape[0]):
        _find(points[point], places, colours, handicaps, order, counts, grid, half, out[point])


@njit(cache=True, nogil=True, fastmath=True)
def _find(point, places, colours, handicaps, order, counts, grid, half, out):  # type: ignore[no-untyped-def]
    """Colour of the nearest sample: shells of cells around the point's, until none nearer can come."""
    scale = grid / (2.0 * half)
    x = min(max(int((point[0] + half) * scale), 0), grid - 1)
    y = min(max(int((point[1] + half) * scale), 0), grid - 1)
    z = min(max(int((point[2] + half) * scale), 0), grid - 1)
    best, found = 1e30, -1
    for ring in range(grid):
        if found >= 0 and best < ((ring - 1) / scale) ** 2:
            break
        for i in range(max(x - ring, 0), min(x + ring, grid - 1) + 1):
            for j in range(max(y - ring, 0), min(y + ring, grid - 1) + 1):
                edge = abs(i - x) == ring or abs(j - y) == ring
                k = max(z - ring, 0) if edge else z - ring
                while k <= min(z + ring, grid - 1):
                    if k >= 0:
                        cell = (i * grid + j) * grid + k
                        for slot in range(counts[cell], counts[cell + 1]):
                            s = order[slot]
                            dx, dy, dz = places[s, 0] - point[0], places[s, 1] - point[1], places[s, 2] - point[2]
                            distance = dx * dx + dy * dy + dz * dz + handicaps[s]
                            if distance < best:
                                best, found = distance, s
                    k += 1 if edge or ring == 0 else 2 * ring
    for k in range(3):
        out[k] = colours[found, k] if found >= 0 else 1.0


@njit(cache=True, nogil=True, fastmath=True)
def _area(positions, a, b, c):  # type: ignore[no-untyped-def]
    x, y, z = cross(positions[a], positions[b], positions[c])
    return 0.5 * np.sqrt(x * x + y * y + z * z)


@njit(cache=True, nogil=True, fastmath=True)
def _steps(positions, face, spacing):  # type: ignore[no-untyped-def]
    """Rows of the triangular pattern of samples on a face: by area, more where it is long."""
    a, b, c = face[0], face[1], face[2]
    longest = 0.0
    for k in range(3):
        i, j = face[k], face[(k + 1) % 3]
        dx, dy = positions[i, 0] - positions[j, 0], positions[i, 1] - positions[j, 1]
        dz = positions[i, 2] - positions[j, 2]
        longest = max(longest, np.sqrt(dx * dx + dy * dy + dz * dz))
    by_area = np.sqrt(2.0 * _area(positions, a, b, c)) / spacing
    return int(max(by_area, 0.5 * longest / spacing)) + 1
