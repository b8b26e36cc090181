"""Animated creatures from a number: a kinematic tree of simple solids with textures and joint motions.

All shapes, proportions, colours and motions are our own design. A creature is determined by its seed alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from sv4d_ns.geometry.cameras import CAMERA_RADIUS, FIELD_OF_VIEW_DEG
from sv4d_ns.training_data.procedural.renderer import Shape, Texture, bounding_balls

NORMALISATION_TIMES = 17
"""Moments at which the extent of a motion is measured."""

FRAME_FILL = 0.9
"""Largest side of the union silhouette box in the view at azimuth 0, elevation 0, as a share of the frame."""

CONE_FILL = 0.955
"""Largest radius of the object's ball as a share of the largest ball inside the viewing cone. Slightly below the
benchmark's 0.97, because the extent is measured at a finite number of moments."""


@dataclass(frozen=True)
class Motion:
    """What a joint or the whole body does: value(t) = amplitude * wave(cycles * t + phase), t in [0, 1].

    `waves` is 0 for a sine, 1 for a single smooth move from -1 to 1 between phase and phase + 1/cycles.
    """

    amplitude: float = 0.0
    cycles: float = 1.0
    phase: float = 0.0
    one_shot: bool = False

    def __call__(self, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
        """Value at each time."""
        if self.one_shot:
            s = np.clip((times - self.phase) * self.cycles, 0.0, 1.0)
            return self.amplitude * (2.0 * s * s * (3.0 - 2.0 * s) - 1.0)
        return self.amplitude * np.sin(2.0 * np.pi * (self.cycles * times + self.phase))


@dataclass(frozen=True)
class Bone:
    """A joint: where it sits in its parent, how it rests, and how it swings about one axis of its own frame."""

    parent: int
    origin: Float[np.ndarray, "3"]
    rest: Float[np.ndarray, "3 3"]
    axis: Float[np.ndarray, "3"]
    bend: float
    swing: Motion


@dataclass(frozen=True)
class Creature:
    """A normalised creature: inside the object box, inside the frame in every view, at every time.

    `surface` holds the arrays of the parts as `renderer.draw` takes them; `bone_of`, `turns` and `offsets` place the
    parts in their bones. A world point is yaw @ (scale * (point - centre)).
    """

    seed: int
    kind: str
    bones: tuple[Bone, ...]
    bob: tuple[Motion, Motion, Motion]
    turn: Motion
    bone_of: np.ndarray
    turns: Float[np.ndarray, "p 3 3"]
    offsets: Float[np.ndarray, "p 3"]
    surface: dict[str, np.ndarray]
    lights: Float[np.ndarray, "l 3"]
    yaw: Float[np.ndarray, "3 3"]
    centre: Float[np.ndarray, "3"]
    scale: float

    def poses(self, times: Float[np.ndarray, " t"]) -> tuple[Float[np.ndarray, "t p 3 3"], Float[np.ndarray, "t p 3"]]:
        """World-from-part rotations and positions at times in [0, 1]; sizes in `surface` are already in world units."""
        times = np.asarray(times, dtype=np.float64)
        body = rotations_about(np.array([0.0, 0.0, 1.0]), self.turn(times))
        bob = np.stack([motion(times) for motion in self.bob], axis=-1)
        frames: list[tuple[np.ndarray, np.ndarray]] = []
        for bone in self.bones:
            local = bone.rest @ rotations_about(bone.axis, bone.bend + bone.swing(times))
            if bone.parent < 0:
                frames.append((body @ local, bob + body @ bone.origin))
            else:
                rotation, position = frames[bone.parent]
                frames.append((rotation @ local, position + rotation @ bone.origin))
        rotations = np.stack([frames[bone][0] for bone in self.bone_of], axis=1)
        positions = np.stack([frames[bone][1] for bone in self.bone_of], axis=1)
        positions = positions + np.einsum("tpij,pj->tpi", rotations, self.offsets)
        rotations = self.yaw @ rotations @ self.turns
        return rotations, (self.scale * (positions - self.centre)) @ self.yaw.T

    def surface_points(self, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n 3"]:
        """World points that enclose the creature tightly: extreme points of every part in 30 directions."""
        rotations, positions = self.poses(times)
        shapes, dims = self.surface["shapes"], self.surface["dims"]
        directions = np.einsum("tpji,nj->tpni", rotations, sphere_directions(24))
        half = dims[:, None, :3]
        squared = directions * half
        length = np.linalg.norm(squared, axis=-1, keepdims=True)
        ellipsoid = squared * half / np.maximum(length, 1e-12)
        box = np.sign(directions) * half
        ends = dims[:, None, 1:2] * directions, dims[:, None, 2:3] * directions + [1.0, 0.0, 0.0] * dims[:, None, :1]
        far = np.sum(ends[1] * directions, axis=-1) > np.sum(ends[0] * directions, axis=-1)
        cone = np.where(far[..., None], ends[1], ends[0])
        kind = shapes[:, None, None]
        local = np.where(kind == Shape.ELLIPSOID, ellipsoid, np.where(kind == Shape.BOX, box, cone))
        world = np.einsum("tpij,tpnj->tpni", rotations, local) + positions[:, :, None]
        return world.reshape(len(world), -1, 3)


def sphere_directions(count: int) -> Float[np.ndarray, "n 3"]:
    """Unit vectors spread evenly (a Fibonacci spiral) plus the six axis directions."""
    index = np.arange(count) + 0.5
    z = 1.0 - 2.0 * index / count
    angle = np.pi * (1.0 + 5.0**0.5) * index
    ring = np.sqrt(1.0 - z * z)
    axes = np.concatenate([np.eye(3), -np.eye(3)])
    return np.concatenate([np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=-1), axes])


def rotations_about(axis: Float[np.ndarray, "3"], angles: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t 3 3"]:
    """Rotation matrices about one unit axis (Rodrigues), angles in radians."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    sine, cosine = np.sin(angles)[..., None, None], np.cos(angles)[..., None, None]
    return np.eye(3) + sine * cross + (1.0 - cosine) * (cross @ cross)


def frame_along(direction: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """A rotation whose first column is the direction and whose third points as far up as it can."""
    x = np.asarray(direction, dtype=np.float64)
    x = x / np.linalg.norm(x)
    helper = np.array([0.0, 0.0, 1.0]) if abs(x[2]) < 0.95 else np.array([-1.0, 0.0, 0.0])
    y = np.cross(helper, x)
    y = y / np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


Y_AXIS = np.array([0.0, 1.0, 0.0])
Z_AXIS = np.array([0.0, 0.0, 1.0])
X_AXIS = np.array([1.0, 0.0, 0.0])
REST = Motion()


@dataclass(frozen=True)
class Coat:
    """Colours and texture of a part: two colours in sRGB [0, 1] and how they mix."""

    first: Float[np.ndarray, "3"]
    second: Float[np.ndarray, "3"]
    texture: Texture = Texture.PLAIN
    scale: float = 1.0
    axis: Float[np.ndarray, "3"] = field(default_factory=lambda: X_AXIS)
    phase: float = 0.0


@dataclass
class Builder:
    """Collects bones and parts while a body plan is laid out; the creature faces +x, up is +z."""

    rng: np.random.Generator
    bones: list[Bone] = field(default_factory=list)
    bone_of: list[int] = field(default_factory=list)
    turns: list[np.ndarray] = field(default_factory=list)
    offsets: list[np.ndarray] = field(default_factory=list)
    shapes: list[int] = field(default_factory=list)
    dims: list[list[float]] = field(default_factory=list)
    coats: list[Coat] = field(default_factory=list)
    bob: tuple[Motion, Motion, Motion] = (REST, REST, REST)
    turn: Motion = REST

    def between(self, low: float, high: float) -> float:
        """A uniform random number."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.random() < probability)

    def bone(
        self,
        parent: int,
        origin: tuple[float, float, float],
        axis: np.ndarray = Y_AXIS,
        swing: Motion = REST,
        bend: float = 0.0,
    ) -> int:
        """Add a joint whose frame rests parallel to its parent's; returns its index."""
        self.bones.append(Bone(parent, np.array(origin, dtype=np.float64), np.eye(3), axis, bend, swing))
        return len(self.bones) - 1

    def _part(
        self, bone: int, shape: Shape, offset: np.ndarray, turn: np.ndarray, dims: list[float], coat: Coat
    ) -> None:
        self.bone_of.append(bone)
        self.shapes.append(int(shape))
        self.offsets.append(np.asarray(offset, dtype=np.float64))
        self.turns.append(turn)
        self.dims.append(dims)
        self.coats.append(coat)

    def ball(
        self, bone: int, centre: tuple[float, float, float], radii: tuple[float, float, float], coat: Coat
    ) -> None:
        """Add an ellipsoid with its axes along the bone's."""
        self._part(bone, Shape.ELLIPSOID, np.array(centre), np.eye(3), [*radii, 0.0], coat)

    def box(self, bone: int, centre: tuple[float, float, float], half: tuple[float, float, float], coat: Coat) -> None:
        """Add a box with its axes along the bone's."""
        self._part(bone, Shape.BOX, np.array(centre), np.eye(3), [*half, 0.0], coat)

    def limb(
        self,
        bone: int,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        radii: tuple[float, float],
        coat: Coat,
    ) -> None:
        """Add a round cone from start (radii[0]) to end (radii[1]), both in the bone's frame."""
        start_point, vector = np.array(start, dtype=np.float64), np.subtract(end, start)
        length = float(np.linalg.norm(vector))
        self._part(bone, Shape.CONE, start_point, frame_along(vector), [length, *radii, 0.0], coat)

    def eyes(self, bone: int, centre: tuple[float, float, float], radius: float, spread: float) -> None:
        """Add two eyes at +-spread along y, looking forward and outward."""
        white, black = np.array([0.97, 0.97, 0.97]), np.array([0.04, 0.04, 0.05])
        plain = Coat(black, black) if self.chance(0.4) else Coat(white, white)
        x, y, z = centre
        for side in (-1.0, 1.0):
            self.ball(bone, (x, y + side * spread, z), (radius, radius, radius), plain)
            if plain.first is white:
                pupil = radius * 0.62
                offset = (x + 0.55 * radius, y + side * (spread + 0.4 * radius), z)
                self.ball(bone, offset, (pupil, pupil, pupil), Coat(black, black))


def hsv(hue: float, saturation: float, value: float) -> Float[np.ndarray, "3"]:
    """sRGB of a hue (in turns), saturation and value in [0, 1]."""
    offsets = (np.array([5.0, 3.0, 1.0]) + 6.0 * hue) % 6.0
    return value * (1.0 - saturation * np.clip(np.minimum(offsets, 4.0 - offsets), 0.0, 1.0))


@dataclass(frozen=True)
class Palette:
    """The coats of one creature."""

    main: Coat
    limbs: Coat
    head: Coat
    detail: Coat


def make_palette(rng: np.random.Generator) -> Palette:
    """Colours and textures that belong together: one main colour, a companion, an accent for small parts."""
    hue = rng.random()
    if rng.random() < 0.45:  # the browns, greys and sands of real animals
        hue = rng.uniform(0.03, 0.13)
        first = hsv(hue, rng.uniform(0.15, 0.85), rng.uniform(0.2, 0.95))
    else:
        first = hsv(hue, rng.uniform(0.35, 1.0), rng.uniform(0.35, 1.0))
    kind = rng.integers(4)
    if kind == 0:
        second = hsv((hue + rng.uniform(0.3, 0.7)) % 1.0, rng.uniform(0.3, 0.9), rng.uniform(0.4, 1.0))
    elif kind == 1:
        second = hsv((hue + rng.uniform(-0.08, 0.08)) % 1.0, rng.uniform(0.1, 0.9), rng.uniform(0.3, 1.0))
    elif kind == 2:
        second = np.full(3, rng.uniform(0.82, 0.97))
    else:
        second = np.full(3, rng.uniform(0.05, 0.3))
    accent = hsv(rng.random(), rng.uniform(0.4, 1.0), rng.uniform(0.3, 1.0))
    texture = Texture(rng.choice(7, p=[0.22, 0.14, 0.14, 0.06, 0.12, 0.2, 0.12]))
    coat = textured(rng, first, second, texture)
    plain = Coat(first, first)
    swapped = Coat(second, second)
    limbs = [coat, plain, swapped][rng.choice(3, p=[0.35, 0.4, 0.25])]
    head = [coat, plain, swapped][rng.choice(3, p=[0.4, 0.4, 0.2])]
    detail = Coat(accent, accent) if rng.random() < 0.6 else swapped
    return Palette(coat, limbs, head, detail)


def textured(rng: np.random.Generator, first: np.ndarray, second: np.ndarray, texture: Texture) -> Coat:
    """A coat with random parameters of its texture; lengths are those of a creature about one unit long."""
    scales = {
        Texture.PLAIN: 1.0,
        Texture.STRIPES: rng.uniform(18.0, 45.0),
        Texture.SPOTS: rng.uniform(5.0, 11.0),
        Texture.CHECKER: rng.uniform(12.0, 24.0),
        Texture.GRADIENT: rng.uniform(1.0, 4.0),
        Texture.BELLY: rng.uniform(0.0, 0.5),
        Texture.PATCHES: rng.uniform(9.0, 18.0),
    }
    axis = {Texture.STRIPES: [X_AXIS, Z_AXIS][int(rng.random() < 0.25)], Texture.BELLY: -Z_AXIS}.get(
        texture, [X_AXIS, Z_AXIS][int(rng.random() < 0.5)]
    )
    return Coat(first, second, texture, scales[texture], axis, rng.uniform(0.0, 6.28))


def wave(b: Builder, low: float, high: float, cycles: float, phase: float) -> Motion:
    """A periodic swing with a random amplitude between low and high (radians)."""
    return Motion(b.between(low, high), cycles, phase)


def walker_legs(b: Builder, body: int, hips: list[tuple[float, float, float, float]], length: float, thickness: float,
                coat: Coat, foot: Coat, cycles: float) -> None:  # fmt: skip
    """Two-segment legs at the hips (x, y, z, phase), with feet, swinging fore and aft."""
    reach = b.between(0.35, 0.75)
    knee = b.between(0.2, 0.6)
    boxy = b.chance(0.15)
    for x, y, z, phase in hips:
        upper = b.bone(body, (x, y, z), Y_AXIS, Motion(reach, cycles, phase), bend=-0.1)
        lower = b.bone(upper, (0.0, 0.0, -0.5 * length), Y_AXIS, Motion(knee, cycles, phase + 0.2), bend=0.2)
        if boxy:
            half = (thickness, thickness, 0.27 * length)
            b.box(upper, (0.0, 0.0, -0.25 * length), half, coat)
            b.box(lower, (0.0, 0.0, -0.25 * length), half, coat)
        else:
            b.limb(upper, (0.0, 0.0, 0.0), (0.0, 0.0, -0.5 * length), (thickness * 1.25, thickness), coat)
            b.limb(lower, (0.0, 0.0, 0.0), (0.0, 0.0, -0.48 * length), (thickness, thickness * 0.8), coat)
        b.ball(lower, (0.5 * thickness, 0.0, -0.5 * length), (thickness * 1.6, thickness * 1.2, thickness * 0.8), foot)


def tail_chain(b: Builder, body: int, start: tuple[float, float, float], direction: tuple[float, float, float],
               length: float, thickness: float, coat: Coat, cycles: float, links: int = 3) -> None:  # fmt: skip
    """A tail of round cones, each swinging about z a little later than the one before."""
    step = np.array(direction) / np.linalg.norm(direction) * length / links
    sway = b.between(0.15, 0.5)
    parent, origin = body, start
    for link in range(links):
        bone = b.bone(parent, origin, Z_AXIS, Motion(sway, cycles, -0.12 * link))
        taper = 1.0 - 0.75 * link / links, 1.0 - 0.75 * (link + 1) / links
        radii = max(thickness * taper[0], 0.012), max(thickness * taper[1], 0.01)
        end = (float(step[0]), float(step[1]), float(step[2]))
        b.limb(bone, (0.0, 0.0, 0.0), end, radii, coat)
        parent, origin = bone, end


def ears(b: Builder, head: int, radius: float, coat: Coat) -> None:
    """Two ears: round, pointed or long."""
    kind = int(b.rng.integers(3))
    for side in (-1.0, 1.0):
        base = (-0.15 * radius, side * 0.6 * radius, 0.7 * radius)
        if kind == 0:
            size = b.between(0.35, 0.5) * radius if side < 0 else b.dims[-1][1]
            b.ball(head, base, (0.4 * size, size, size), coat)
        else:
            height = (0.9, 2.0)[kind - 1] * radius
            ear = b.bone(head, base, X_AXIS, Motion(0.15, 2.0, 0.0))
            b.limb(
                ear, (0.0, 0.0, 0.0), (-0.2 * radius, side * 0.35 * height, height), (0.3 * radius, 0.12 * radius), coat
            )


def quadruped(b: Builder, p: Palette) -> None:
    """Dogs, horses, bears, giraffes..."""
    length, girth = b.between(0.28, 0.45), b.between(0.12, 0.22)
    leg, neck = b.between(0.22, 0.5), b.between(0.05, 0.45)
    cycles = float(b.rng.integers(1, 4))
    body = b.bone(-1, (0.0, 0.0, 0.0), Y_AXIS, wave(b, 0.0, 0.12, cycles, 0.1))
    if b.chance(0.15):
        b.box(body, (0.0, 0.0, 0.0), (length, girth * 0.9, girth * 0.9), p.main)
    else:
        b.ball(body, (0.0, 0.0, 0.0), (length, girth, girth * b.between(0.9, 1.2)), p.main)
        b.ball(body, (0.55 * length, 0.0, 0.02), (girth * 1.1, girth * 1.05, girth * 1.15), p.main)
    gait = [0.0, 0.5, 0.5, 0.0] if b.chance(0.7) else [0.0, 0.05, 0.45, 0.5]
    corners = [(0.6, 0.65), (0.6, -0.65), (-0.65, 0.65), (-0.65, -0.65)]
    hips = [(x * length, y * girth, -0.35 * girth, phase) for (x, y), phase in zip(corners, gait, strict=True)]
    walker_legs(b, body, hips, leg + 0.5 * girth, b.between(0.035, 0.07), p.limbs, p.detail, cycles)
    shoulder = b.bone(body, (0.8 * length, 0.0, 0.35 * girth), Y_AXIS, wave(b, 0.05, 0.25, cycles, 0.3))
    tip = (0.12 + 0.35 * neck, 0.0, 0.06 + neck)
    b.limb(shoulder, (0.0, 0.0, 0.0), tip, (girth * 0.7, girth * 0.5), p.head)
    size = b.between(0.1, 0.19)
    head = b.bone(shoulder, tip, [Y_AXIS, Z_AXIS][int(b.chance(0.5))], wave(b, 0.1, 0.4, cycles, 0.6))
    b.ball(head, (0.03, 0.0, 0.02), (size, size * 0.9, size * 0.9), p.head)
    snout = b.between(0.7, 1.5) * size
    b.limb(
        head,
        (0.4 * size, 0.0, -0.2 * size),
        (0.4 * size + snout, 0.0, -0.35 * size),
        (0.55 * size, 0.35 * size),
        p.head,
    )
    b.ball(head, (0.4 * size + snout * 1.25, 0.0, -0.3 * size), (0.2 * size,) * 3, p.detail)
    b.eyes(head, (0.65 * size, 0.0, 0.4 * size), 0.2 * size, 0.55 * size)
    ears(b, head, size, p.detail if b.chance(0.4) else p.head)
    rise = b.between(-0.6, 1.2)
    length_of_tail, thickness = b.between(0.1, 0.5), b.between(0.03, 0.08)
    start = (-0.9 * length, 0.0, 0.2 * girth)
    tail_chain(b, body, start, (-1.0, 0.0, rise), length_of_tail, thickness, p.limbs, cycles)
    b.bob = (REST, REST, wave(b, 0.0, 0.05, 2 * cycles, 0.2))


def biped(b: Builder, p: Palette) -> None:
    """People, bears on two legs, robots: arms wave, legs walk."""
    robot = b.chance(0.35)
    height, width = b.between(0.18, 0.28), b.between(0.12, 0.22)
    leg = b.between(0.22, 0.45)
    cycles = float(b.rng.integers(1, 3))
    body = b.bone(-1, (0.0, 0.0, 0.0), Z_AXIS, wave(b, 0.0, 0.35, cycles, 0.0))
    depth = width * b.between(0.6, 1.0)
    if robot:
        b.box(body, (0.0, 0.0, 0.0), (depth, width, height), p.main)
        b.box(body, (depth * 0.9, 0.0, 0.2 * height), (0.03 + depth * 0.15, width * 0.5, height * 0.35), p.detail)
    else:
        b.ball(body, (0.0, 0.0, 0.0), (depth, width, height), p.main)
        b.ball(body, (0.02, 0.0, -0.5 * height), (depth * 1.05, width * b.between(0.8, 1.2), height * 0.6), p.main)
    hips = [(0.0, 0.55 * width, -0.8 * height, 0.0), (0.0, -0.55 * width, -0.8 * height, 0.5)]
    walker_legs(b, body, hips, leg + 0.1, b.between(0.045, 0.08), p.limbs, p.detail, cycles)
    arm, thick = b.between(0.25, 0.42), b.between(0.035, 0.065)
    lift = b.between(0.1, 1.1)
    for side in (-1.0, 1.0):
        shoulder = b.bone(
            body, (0.0, side * width * 0.95, 0.6 * height), X_AXIS, wave(b, 0.1, 0.6, cycles, 0.25), side * lift
        )
        swing = b.bone(shoulder, (0.0, 0.0, 0.0), Y_AXIS, Motion(b.between(0.2, 0.9), cycles, 0.5 if side > 0 else 0.0))
        b.limb(swing, (0.0, 0.0, 0.0), (0.0, side * 0.04, -0.5 * arm), (thick * 1.2, thick), p.limbs)
        elbow = b.bone(swing, (0.0, side * 0.04, -0.5 * arm), Y_AXIS, wave(b, 0.1, 0.5, cycles, 0.1), -0.5)
        b.limb(elbow, (0.0, 0.0, 0.0), (0.0, 0.0, -0.5 * arm), (thick, thick * 0.9), p.limbs)
        b.ball(elbow, (0.0, 0.0, -0.53 * arm), (thick * 1.3,) * 3, p.detail)
    size = b.between(0.12, 0.24)
    head = b.bone(
        body, (0.0, 0.0, height * 0.95), [Y_AXIS, Z_AXIS, X_AXIS][b.rng.integers(3)], wave(b, 0.1, 0.45, cycles, 0.4)
    )
    if robot:
        b.box(head, (0.0, 0.0, 0.8 * size), (size * 0.8, size * 0.9, size * 0.75), p.head)
        b.limb(head, (0.0, 0.0, size * 1.5), (0.0, 0.0, size * 2.1), (0.015, 0.03), p.detail)
        b.eyes(head, (0.8 * size, 0.0, 0.95 * size), 0.2 * size, 0.4 * size)
    else:
        b.ball(head, (0.0, 0.0, 0.8 * size), (size * 0.9, size * b.between(0.85, 1.05), size), p.head)
        b.eyes(head, (0.75 * size, 0.0, 0.95 * size), 0.16 * size, 0.4 * size)
        if b.chance(0.55):
            crown = b.bone(head, (0.0, 0.0, 0.85 * size))
            ears(b, crown, size * 0.9, p.head)
        elif b.chance(0.6):
            b.ball(head, (-0.15 * size, 0.0, 1.15 * size), (size * 0.95, size, size * 0.85), p.detail)
        if b.chance(0.4):
            b.limb(
                head,
                (0.8 * size, 0.0, 0.65 * size),
                (1.3 * size, 0.0, 0.6 * size),
                (0.25 * size, 0.12 * size),
                p.detail,
            )
    b.bob = (REST, REST, wave(b, 0.0, 0.06, 2 * cycles, 0.0))


def bird(b: Builder, p: Palette) -> None:
    """Birds and bats: flapping wings, or standing with folded ones."""
    length, girth = b.between(0.18, 0.3), b.between(0.1, 0.18)
    cycles = float(b.rng.integers(1, 4))
    pitch = b.between(-0.7, 0.1)
    body = b.bone(-1, (0.0, 0.0, 0.0), Y_AXIS, wave(b, 0.0, 0.12, cycles, 0.5), pitch)
    b.ball(body, (0.0, 0.0, 0.0), (length, girth, girth * 1.05), p.main)
    flap, span, chord = b.between(0.4, 0.9), b.between(0.3, 0.55), b.between(0.09, 0.2)
    wing_coat = p.limbs if b.chance(0.5) else p.main
    for side in (-1.0, 1.0):
        inner = b.bone(
            body,
            (0.05 * length, side * 0.75 * girth, 0.3 * girth),
            X_AXIS,
            Motion(side * flap, cycles, 0.0),
            side * 0.15,
        )
        b.ball(inner, (0.0, side * 0.25 * span, 0.0), (chord, 0.3 * span, 0.025), wing_coat)
        outer = b.bone(inner, (0.0, side * 0.5 * span, 0.0), X_AXIS, Motion(side * flap * 0.7, cycles, -0.15))
        b.ball(
            outer,
            (-0.03, side * 0.24 * span, 0.0),
            (chord * 0.75, 0.3 * span, 0.02),
            p.detail if b.chance(0.5) else wing_coat,
        )
    size = b.between(0.09, 0.15)
    neck = b.between(0.0, 0.25)
    head = b.bone(body, (0.85 * length, 0.0, 0.35 * girth), Y_AXIS, wave(b, 0.1, 0.35, cycles, 0.2), -pitch)
    if neck > 0.08:
        b.limb(head, (0.0, 0.0, -0.03), (0.3 * neck, 0.0, neck), (size * 0.6, size * 0.5), p.head)
    top = (0.04 + 0.3 * neck, 0.0, 0.05 + neck)
    b.ball(head, top, (size, size * 0.92, size * 0.95), p.head)
    beak = b.between(0.08, 0.25)
    tip = (top[0] + 0.8 * size + beak, 0.0, top[2] - 0.3 * size)
    b.limb(head, (top[0] + 0.7 * size, 0.0, top[2] - 0.1 * size), tip, (0.35 * size, 0.06 * size), p.detail)
    b.eyes(head, (top[0] + 0.5 * size, 0.0, top[2] + 0.25 * size), 0.2 * size, 0.68 * size)
    tail = b.bone(body, (-0.85 * length, 0.0, 0.0), Y_AXIS, wave(b, 0.05, 0.3, cycles, 0.7), b.between(-0.2, 0.4))
    b.ball(tail, (-0.15, 0.0, 0.0), (b.between(0.12, 0.25), b.between(0.05, 0.13), 0.02), p.limbs)
    if b.chance(0.75):
        walker_legs(b, body, [(0.0, 0.45 * girth, -0.7 * girth, 0.0), (0.0, -0.45 * girth, -0.7 * girth, 0.5)],
                    b.between(0.15, 0.35), 0.022, p.detail, p.detail, cycles)  # fmt: skip
    b.bob = (REST, REST, Motion(b.between(0.02, 0.08), cycles, 0.25))


def fish(b: Builder, p: Palette) -> None:
    """Fish, whales and seahorse-like swimmers: the spine beats from side to side."""
    length, height, width = b.between(0.14, 0.22), b.between(0.1, 0.26), b.between(0.06, 0.16)
    cycles = float(b.rng.integers(1, 4))
    beat = b.between(0.18, 0.45)
    axis = Z_AXIS if b.chance(0.8) else Y_AXIS
    front = b.bone(-1, (0.0, 0.0, 0.0), axis, Motion(beat * 0.5, cycles, 0.25))
    b.ball(front, (0.1, 0.0, 0.0), (length * 1.5, width, height), p.main)
    middle = b.bone(front, (-length * 0.6, 0.0, 0.0), axis, Motion(beat, cycles, 0.0))
    b.ball(middle, (-0.3 * length, 0.0, 0.0), (length * 1.2, width * 0.8, height * 0.75), p.main)
    back = b.bone(middle, (-length * 1.1, 0.0, 0.0), axis, Motion(beat * 1.2, cycles, -0.15))
    b.limb(back, (0.1, 0.0, 0.0), (-0.8 * length, 0.0, 0.0), (height * 0.5, height * 0.2), p.main)
    fin = b.bone(back, (-0.8 * length, 0.0, 0.0), axis, Motion(beat * 1.3, cycles, -0.3))
    size = b.between(0.12, 0.24)
    flat = (0.02, size) if axis is Z_AXIS else (size, 0.02)
    b.ball(fin, (-0.45 * size, 0.0, 0.0), (0.5 * size, *flat), p.detail)
    b.ball(front, (0.02, 0.0, height * 0.95), (length * 0.9, 0.02, b.between(0.06, 0.16)), p.detail)
    for side in (-1.0, 1.0):
        flipper = b.bone(
            front, (0.1, side * width * 0.8, -0.3 * height), X_AXIS, Motion(side * 0.5, cycles, 0.1), side * -0.6
        )
        b.ball(flipper, (-0.05, side * 0.1, 0.0), (0.06, 0.12, 0.018), p.limbs)
    b.eyes(front, (0.1 + length * 1.05, 0.0, 0.25 * height), b.between(0.03, 0.055), width * 0.55)
    if b.chance(0.5):
        b.ball(front, (0.1 + 1.45 * length, 0.0, -0.15 * height), (0.04, 0.05, 0.025), p.detail)
    b.bob = (REST, REST, wave(b, 0.0, 0.06, 1.0, 0.0))


def snake(b: Builder, p: Palette) -> None:
    """Snakes, worms, caterpillars, dragons: a chain of joints in a travelling wave."""
    links = int(b.rng.integers(6, 11))
    step = 1.1 / links
    thick = b.between(0.05, 0.1)
    cycles = float(b.rng.integers(1, 3))
    bend, lag = b.between(0.3, 0.65), b.between(0.1, 0.2)
    axis = Z_AXIS if b.chance(0.7) else Y_AXIS
    beads = b.chance(0.35)
    parent, origin = -1, (0.0, 0.0, 0.0)
    head_bone = 0
    for link in range(links):
        bone = b.bone(parent, origin, axis, Motion(bend, cycles, -lag * link), 0.0)
        radius = thick * (1.0 - 0.6 * link / links)
        coat = p.main if link % 2 == 0 or not beads else p.limbs
        if beads:
            b.ball(bone, (-0.5 * step, 0.0, 0.0), (0.75 * step, radius * 1.3, radius * 1.3), coat)
        else:
            b.limb(bone, (0.0, 0.0, 0.0), (-step, 0.0, 0.0), (radius, thick * (1.0 - 0.6 * (link + 1) / links)), coat)
        parent, origin = bone, (-step, 0.0, 0.0)
    head = b.bone(head_bone, (0.03, 0.0, 0.0), Y_AXIS, wave(b, 0.1, 0.4, cycles, 0.0), -0.3)
    size = thick * b.between(1.2, 1.7)
    b.limb(head, (0.0, 0.0, 0.02), (size * 1.3, 0.0, 0.02), (size, size * 0.6), p.head)
    b.eyes(head, (0.7 * size, 0.0, 0.75 * size), 0.25 * size, 0.55 * size)
    if b.chance(0.5):
        b.limb(head, (1.8 * size, 0.0, 0.0), (2.7 * size, 0.0, -0.02), (0.018, 0.01), p.detail)


def insect(b: Builder, p: Palette) -> None:
    """Ants, beetles, spiders, crabs: many legs in alternating groups, sometimes claws or wings."""
    pairs = int(b.rng.integers(3, 5))
    girth = b.between(0.1, 0.22)
    cycles = float(b.rng.integers(1, 4))
    body = b.bone(-1, (0.0, 0.0, 0.0), Z_AXIS, wave(b, 0.0, 0.12, cycles, 0.0))
    crab = b.chance(0.35)
    if crab:
        b.ball(body, (0.0, 0.0, 0.0), (girth, girth * 1.5, girth * 0.6), p.main)
    else:
        b.ball(body, (0.0, 0.0, 0.0), (girth, girth * 0.8, girth * 0.7), p.limbs)
        abdomen = b.bone(body, (-0.8 * girth, 0.0, 0.0), Y_AXIS, wave(b, 0.05, 0.25, cycles, 0.3))
        b.ball(abdomen, (-girth, 0.0, 0.03), (girth * b.between(1.0, 1.7), girth * 1.05, girth * 0.95), p.main)
    length, thin = b.between(0.25, 0.45), b.between(0.018, 0.035)
    for pair in range(pairs):
        along = girth * (0.7 - 1.4 * pair / (pairs - 1))
        for side in (-1.0, 1.0):
            phase = 0.5 * ((pair + (side > 0)) % 2)
            spread = side * (0.5 - pair / (pairs - 1)) * 0.9
            swing = Motion(b.between(0.25, 0.5) if pair == 0 and side < 0 else 0.35, cycles, phase)
            hip = b.bone(body, (along, side * girth * (1.1 if crab else 0.6), 0.0), Z_AXIS, swing, -spread)
            lift = b.bone(hip, (0.0, 0.0, 0.0), X_AXIS, Motion(0.25, cycles, phase + 0.25), side * 0.55)
            b.limb(lift, (0.0, 0.0, 0.0), (0.0, side * 0.5 * length, 0.0), (thin * 1.2, thin), p.detail)
            knee = b.bone(lift, (0.0, side * 0.5 * length, 0.0), X_AXIS, REST, -side * 1.5)
            b.limb(knee, (0.0, 0.0, 0.0), (0.0, side * 0.65 * length, 0.0), (thin, thin * 0.5), p.detail)
    size = girth * b.between(0.5, 0.8)
    head = b.bone(body, (girth * 0.9, 0.0, 0.05), Z_AXIS, wave(b, 0.1, 0.4, cycles, 0.1))
    if crab:
        b.eyes(head, (0.0, 0.0, 0.6 * girth), 0.25 * girth, 0.45 * girth)
        for side in (-1.0, 1.0):
            claw = b.bone(
                body, (girth * 0.7, side * girth * 1.1, 0.0), Z_AXIS, wave(b, 0.2, 0.5, cycles, 0.0), side * 0.4
            )
            b.limb(claw, (0.0, 0.0, 0.0), (0.2, side * 0.05, 0.05), (0.035, 0.04), p.limbs)
            b.ball(claw, (0.28, side * 0.05, 0.07), (0.12, 0.06, 0.08), p.main)
    else:
        b.ball(head, (0.5 * size, 0.0, 0.0), (size, size * 0.95, size * 0.9), p.head)
        b.eyes(head, (0.9 * size, 0.0, 0.3 * size), 0.3 * size, 0.65 * size)
        for side in (-1.0, 1.0):
            feeler = b.bone(head, (size, side * 0.3 * size, 0.5 * size), X_AXIS, Motion(side * 0.3, cycles, 0.0))
            b.limb(feeler, (0.0, 0.0, 0.0), (0.15, side * 0.08, 0.15), (0.016, 0.012), p.detail)
    b.bob = (REST, REST, wave(b, 0.0, 0.03, 2 * cycles, 0.0))


def hopper(b: Builder, p: Palette) -> None:
    """Frogs, rabbits, blobs that hop: the whole body crouches, jumps and lands once or twice."""
    girth = b.between(0.18, 0.28)
    cycles = float(b.rng.integers(1, 3))
    body = b.bone(-1, (0.0, 0.0, 0.0), Y_AXIS, Motion(b.between(0.15, 0.4), cycles, 0.25), b.between(-0.4, 0.0))
    b.ball(body, (0.0, 0.0, 0.0), (girth * b.between(1.0, 1.4), girth, girth * b.between(0.8, 1.1)), p.main)
    leg, thick = b.between(0.2, 0.35), b.between(0.04, 0.07)
    fold = b.between(0.5, 1.0)
    for side in (-1.0, 1.0):
        hip = b.bone(body, (-0.5 * girth, side * 0.9 * girth, -0.3 * girth), Y_AXIS, Motion(fold, cycles, 0.5), -0.9)
        b.limb(hip, (0.0, 0.0, 0.0), (0.0, side * 0.05, -0.6 * leg), (thick * 1.5, thick), p.limbs)
        knee = b.bone(hip, (0.0, side * 0.05, -0.6 * leg), Y_AXIS, Motion(fold * 1.2, cycles, 0.0), 1.4)
        b.limb(knee, (0.0, 0.0, 0.0), (0.0, 0.0, -0.6 * leg), (thick, thick * 0.8), p.limbs)
        ankle = b.bone(knee, (0.0, 0.0, -0.6 * leg), Y_AXIS, Motion(fold * 0.5, cycles, 0.5), -0.6)
        b.ball(ankle, (0.06, 0.0, 0.0), (0.12, 0.05, 0.03), p.detail)
        arm = b.bone(body, (0.6 * girth, side * 0.7 * girth, -0.4 * girth), Y_AXIS, Motion(0.5, cycles, 0.3))
        b.limb(arm, (0.0, 0.0, 0.0), (0.03, side * 0.03, -0.7 * leg), (thick, thick * 0.8), p.limbs)
    size = girth * b.between(0.6, 0.95)
    head = b.bone(body, (girth * 0.9, 0.0, 0.45 * girth), Y_AXIS, wave(b, 0.1, 0.3, cycles, 0.6))
    b.ball(head, (0.3 * size, 0.0, 0.2 * size), (size, size * 1.05, size * 0.85), p.head)
    b.eyes(head, (0.65 * size, 0.0, 0.85 * size), 0.28 * size, 0.6 * size)
    if b.chance(0.5):
        ears(b, head, size, p.head)
    if b.chance(0.5):
        b.ball(body, (-1.1 * girth, 0.0, 0.1), (0.09, 0.09, 0.09), p.detail)
    b.bob = (REST, REST, Motion(b.between(0.08, 0.2), cycles, -0.25))


def saurian(b: Builder, p: Palette) -> None:
    """Dinosaurs, kangaroos, dragons: two strong legs, long tail, small arms, sometimes plates or wings."""
    length, girth = b.between(0.2, 0.3), b.between(0.12, 0.19)
    cycles = float(b.rng.integers(1, 3))
    body = b.bone(-1, (0.0, 0.0, 0.0), Y_AXIS, wave(b, 0.02, 0.15, cycles, 0.0), b.between(-0.9, -0.1))
    b.ball(body, (0.0, 0.0, 0.0), (length, girth, girth * 1.1), p.main)
    hips = [(-0.2 * length, 0.8 * girth, -0.2 * girth, 0.0), (-0.2 * length, -0.8 * girth, -0.2 * girth, 0.5)]
    upright = b.bone(body, (0.0, 0.0, 0.0), Y_AXIS, REST, -b.bones[body].bend)
    walker_legs(b, upright, hips, b.between(0.3, 0.5), b.between(0.05, 0.085), p.limbs, p.detail, cycles)
    tail_chain(b, upright, (-0.75 * length, 0.0, -0.05), (-1.0, 0.0, b.between(-0.4, 0.4)), b.between(0.35, 0.65),
               girth * 0.7, p.main, cycles, links=4)  # fmt: skip
    neck = b.bone(body, (0.8 * length, 0.0, 0.1), Y_AXIS, wave(b, 0.1, 0.35, cycles, 0.3), -b.bones[body].bend)
    tip = (0.1, 0.0, b.between(0.08, 0.35))
    b.limb(neck, (0.0, 0.0, 0.0), tip, (girth * 0.75, girth * 0.5), p.head)
    size = b.between(0.1, 0.16)
    head = b.bone(neck, tip, Z_AXIS, wave(b, 0.1, 0.4, cycles, 0.0))
    b.ball(head, (0.0, 0.0, 0.0), (size, size * 0.85, size * 0.85), p.head)
    b.limb(head, (0.3 * size, 0.0, 0.0), (1.7 * size, 0.0, -0.1 * size), (0.7 * size, 0.4 * size), p.head)
    jaw = b.bone(head, (0.3 * size, 0.0, -0.4 * size), Y_AXIS, wave(b, 0.1, 0.3, 2 * cycles, 0.0), 0.3)
    b.limb(jaw, (0.0, 0.0, 0.0), (1.3 * size, 0.0, 0.0), (0.35 * size, 0.2 * size), p.limbs)
    b.eyes(head, (0.5 * size, 0.0, 0.55 * size), 0.2 * size, 0.6 * size)
    for side in (-1.0, 1.0):
        arm = b.bone(upright, (0.7 * length, side * 0.8 * girth, 0.05), Y_AXIS, wave(b, 0.2, 0.7, cycles, 0.2), -0.4)
        b.limb(arm, (0.0, 0.0, 0.0), (0.03, side * 0.02, -0.17), (0.04, 0.025), p.limbs)
    if b.chance(0.4):
        for index in range(3):
            x = length * (0.5 - 0.5 * index)
            b.limb(body, (x, 0.0, girth), (x - 0.05, 0.0, girth + 0.12), (0.05, 0.015), p.detail)


def toy(b: Builder, p: Palette) -> None:
    """Machines and toys: a chassis with turning wheels, a tower that turns, an arm or an antenna that moves."""
    length, width, height = b.between(0.28, 0.42), b.between(0.14, 0.26), b.between(0.07, 0.16)
    body = b.bone(-1, (0.0, 0.0, 0.0), Y_AXIS, wave(b, 0.0, 0.08, 2.0, 0.0))
    b.box(body, (0.0, 0.0, 0.0), (length, width, height), p.main)
    radius = b.between(0.08, 0.15)
    for x in (-0.65 * length, 0.65 * length):
        for side in (-1.0, 1.0):
            wheel = b.bone(body, (x, side * (width + 0.03), -height), Y_AXIS, Motion(3.14, 1.0, 0.0, one_shot=True))
            b.ball(wheel, (0.0, 0.0, 0.0), (radius, 0.05, radius), p.limbs)
            b.ball(wheel, (0.0, side * 0.03, 0.5 * radius), (0.3 * radius, 0.04, 0.3 * radius), p.detail)
    cabin = b.bone(body, (b.between(-0.5, 0.4) * length, 0.0, height), Z_AXIS, Motion(b.between(0.4, 1.2), 1.0, 0.0))
    size = b.between(0.1, 0.18)
    if b.chance(0.5):
        b.box(cabin, (0.0, 0.0, size * 0.8), (size, size * 0.95, size * 0.8), p.head)
    else:
        b.ball(cabin, (0.0, 0.0, size * 0.6), (size, size, size), p.head)
    b.eyes(cabin, (size * 0.95, 0.0, size * 0.9), 0.2 * size, 0.45 * size)
    arm = b.bone(
        cabin, (0.0, 0.0, size * 1.5), [X_AXIS, Y_AXIS][b.rng.integers(2)], Motion(b.between(0.4, 0.9), 1.0, 0.2)
    )
    reach = b.between(0.15, 0.4)
    b.limb(arm, (0.0, 0.0, 0.0), (0.0, 0.0, reach), (0.035, 0.025), p.limbs)
    wrist = b.bone(arm, (0.0, 0.0, reach), Y_AXIS, Motion(b.between(0.3, 1.0), 2.0, 0.1), 0.8)
    b.limb(wrist, (0.0, 0.0, 0.0), (0.0, 0.0, reach * 0.7), (0.03, 0.02), p.limbs)
    b.ball(wrist, (0.0, 0.0, reach * 0.8), (0.06, 0.06, 0.06), p.detail)


PLANS: tuple[tuple[Callable[[Builder, Palette], None], float], ...] = (
    (quadruped, 0.26),
    (biped, 0.22),
    (bird, 0.11),
    (fish, 0.08),
    (snake, 0.06),
    (insect, 0.08),
    (hopper, 0.07),
    (saurian, 0.07),
    (toy, 0.05),
)
"""Body plans and how often each is drawn."""


def creature(seed: int) -> Creature:
    """The creature of a seed (any non-negative integer), normalised as the 4D benchmark's objects are.

    Centre: middle of the axis-aligned box over all times. Scale: the largest for which the object's ball lies inside
    the viewing cone (`CONE_FILL`) and the silhouette in the view at azimuth 0 stays within `FRAME_FILL` of the frame,
    times a random factor in [0.85, 1].
    """
    rng = np.random.default_rng([seed, 0x5EED])
    builder = Builder(rng)
    plans = [plan for plan, _ in PLANS]
    plan = plans[int(rng.choice(len(PLANS), p=[share for _, share in PLANS]))]
    plan(builder, make_palette(rng))
    _stretch(builder)
    if rng.random() < 0.4:
        builder.turn = Motion(rng.uniform(0.2, 0.8), rng.uniform(0.5, 1.0), rng.random(), bool(rng.random() < 0.5))
    yaw = rotations_about(Z_AXIS, np.array(rng.uniform(0.0, 2.0 * np.pi)))
    lights = _lights(rng)
    raw = _assemble(builder, seed, plan.__name__, yaw, lights, np.zeros(3), 1.0)
    points = raw.surface_points(np.linspace(0.0, 1.0, NORMALISATION_TIMES)) @ yaw  # undo the yaw: body coordinates
    flat = points.reshape(-1, 3)
    centre = (flat.min(axis=0) + flat.max(axis=0)) / 2
    scale = fitting_scale((flat - centre) @ yaw.T) * rng.uniform(0.85, 1.0)
    return _assemble(builder, seed, plan.__name__, yaw, lights, centre, scale)


def _stretch(builder: Builder) -> None:
    """Scale the whole body differently along x and z, so that fat and slim, short and tall ones occur."""
    wide, tall = builder.rng.uniform(0.85, 1.2, 2)
    builder.bones = [
        Bone(bone.parent, bone.origin * [1.0, wide, tall], bone.rest, bone.axis, bone.bend, bone.swing)
        for bone in builder.bones
    ]


def fitting_scale(points: Float[np.ndarray, "n 3"]) -> float:
    """Largest factor for centred world points that keeps them in the viewing cone and in the input view's frame."""
    half = np.deg2rad(FIELD_OF_VIEW_DEG) / 2
    ball = CONE_FILL * CAMERA_RADIUS * np.sin(half) / np.linalg.norm(points, axis=1).max()
    # in the view from +x, image-right is +y; a point at scale s projects to s y / (R - s x)
    room = FRAME_FILL * np.tan(half)
    across = np.abs(points[:, 1:]).max(axis=1)
    frame = (CAMERA_RADIUS * room / np.maximum(across + room * points[:, 0], 1e-9)).min()
    return float(min(ball, frame))


def _lights(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """Ambient and its slope, a key lamp and a fill lamp, varied around the benchmark's set-up."""
    rows = [np.array([rng.uniform(0.35, 0.6), rng.uniform(0.08, 0.22), 0.0])]
    key, fill = rng.uniform(0.35, 0.6), rng.uniform(0.05, 0.2)
    for strength, azimuth, elevation in ((key, 35.0, 48.0), (fill, -100.0, 30.0)):
        a = np.deg2rad(azimuth + rng.uniform(-60.0, 60.0))
        e = np.deg2rad(elevation + rng.uniform(-15.0, 15.0))
        rows.append(strength * np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)]))
    return np.stack(rows)


def _assemble(
    b: Builder, seed: int, kind: str, yaw: np.ndarray, lights: np.ndarray, centre: np.ndarray, scale: float
) -> Creature:
    """Freeze a builder, with all lengths in world units."""
    shapes = np.array(b.shapes, dtype=np.int64)
    dims = np.array(b.dims) * scale
    per_length = {Texture.STRIPES, Texture.SPOTS, Texture.CHECKER, Texture.GRADIENT, Texture.PATCHES}
    scales = [coat.scale / scale if coat.texture in per_length else coat.scale for coat in b.coats]
    colours = np.stack([np.stack([coat.first, coat.second]) for coat in b.coats])
    axes = np.stack([turn.T @ coat.axis for turn, coat in zip(b.turns, b.coats, strict=True)])
    surface = {
        "shapes": shapes,
        "dims": dims,
        "bounds": bounding_balls(shapes, dims),
        "textures": np.array([int(coat.texture) for coat in b.coats], dtype=np.int64),
        "axes": axes,
        "scales": np.array(scales),
        "phases": np.array([coat.phase for coat in b.coats]),
        "colours": colours**2,  # linear light under a gamma of 2
    }
    return Creature(
        seed, kind, tuple(b.bones), b.bob, b.turn, np.array(b.bone_of), np.stack(b.turns), np.stack(b.offsets),
        surface, lights, yaw, centre, scale,
    )  # fmt: skip
