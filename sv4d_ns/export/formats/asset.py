"""What every file format writes: one coloured mesh over all frames, in world coordinates (z up)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import sparse
from scipy.sparse import csgraph

from sv4d_ns.export.colour.texture import Atlas
from sv4d_ns.export.surface.extraction import vertex_normals

CLOSED = 0.01
"""Size of a sheet of hidden faces in frames that do not show it. Without any, its faces have no direction, and Blender
takes the normals of all frames relative to that of the first."""


@dataclass(frozen=True, eq=False)
class Flipbook:
    """Base colour images of moments of the clip, all with the same texture coordinates."""

    images: UInt8[np.ndarray, "m h h 3"]
    """sRGB."""
    shown: Int[np.ndarray, " t"]
    """Which of them each frame shows."""


def moments_in(side: int) -> int:
    """Pictures of moments that a sheet as wide as `side` of them has room for; the whole clip's takes four places."""
    return side * side - 4


@dataclass(frozen=True, eq=False)
class Texture:
    """A base colour image and where each vertex lies in it."""

    uv: Float[np.ndarray, "n 2"]
    """(0, 0) is the image's upper left corner, v runs down, as in glTF."""
    image: UInt8[np.ndarray, "s s 3"]
    """sRGB; what the whole clip shows."""
    moments: Flipbook | None = None
    """What the frames show, half as fine, for formats whose texture may change."""


@dataclass(frozen=True, eq=False)
class RootMotion:
    """Where the object is at each frame, relative to frame 0."""

    translation: Float[np.ndarray, "t 3"]
    """World units (metres)."""


@dataclass(frozen=True, eq=False)
class AnimatedMesh:
    """A mesh of fixed topology over all frames, in world coordinates (z up)."""

    positions: Float[np.ndarray, "t n 3"]
    faces: Int[np.ndarray, "f 3"]
    colors: UInt8[np.ndarray, "n 3"]
    """sRGB."""
    normals: Float[np.ndarray, "t n 3"]
    """Unit length, outward."""
    fps: float
    confidence: Float[np.ndarray, " n"]
    """`baking.OBSERVED`, `GENERATED` or `UNSEEN`."""
    texture: Texture | None = None
    """Vertices along the atlas's seams are doubled; None shows the vertex colours."""
    root: RootMotion | None = None
    """None: the object stays in place."""

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.positions)

    @property
    def seconds(self) -> Float[np.ndarray, " t"]:
        """When each frame is shown."""
        return np.arange(self.num_frames) / self.fps

    def placed(self) -> Float[np.ndarray, "t n 3"]:
        """Positions with the root motion applied, for formats that have no nodes."""
        return self.positions if self.root is None else self.positions + self.root.translation[:, None]


@dataclass(frozen=True)
class Placement:
    """How a file's coordinates come from the run's: scaled, then lifted along z."""

    scale: float
    lift: float
    """Metres."""

    def applied(self, positions: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 3"]:
        """The file's coordinates of places of the run."""
        return (self.scale * positions + np.array([0.0, 0.0, self.lift])).astype(positions.dtype)

    def described(self) -> dict[str, float]:
        """For a file's extras."""
        return {"scale": self.scale, "lift": self.lift}


def placement_of(heights: Sequence[Float[np.ndarray, " n"]], height: float | None, ground: bool) -> Placement:
    """The placement that makes an object `height` metres tall and puts its lowest point of all frames at z = 0.

    Args:
        heights: z of every frame's vertices, with the root motion; frames without any say nothing.
        height: from the lowest to the highest point of the frame in which that is most; None keeps the run's scale.
        ground: else the run's z = 0 stays.
    """
    seen = [z for z in heights if len(z)]
    scale = 1.0 if height is None else height / max(max((float(np.ptp(z)) for z in seen), default=0.0), 1e-9)
    lowest = min((float(z.min()) for z in seen), default=0.0)
    return Placement(float(scale), -scale * lowest if ground else 0.0)


def grounded(mesh: AnimatedMesh, height: float | None, ground: bool = True) -> Placement:
    """`placement_of` an animated mesh."""
    return placement_of(list(mesh.placed()[..., 2]), height, ground)


def moved_to(mesh: AnimatedMesh, placement: Placement) -> AnimatedMesh:
    """The mesh as `placement` says; the root motion is scaled with it."""
    root = None if mesh.root is None else RootMotion(placement.scale * mesh.root.translation)
    return replace(mesh, positions=placement.applied(mesh.positions), root=root)


def animated_mesh(
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    colors: UInt8[np.ndarray, "n 3"],
    confidence: Float[np.ndarray, " n"],
    fps: float,
) -> AnimatedMesh:
    """Put the pieces together; normals are computed anew on every frame."""
    normals = np.stack([vertex_normals(frame, faces) for frame in positions])
    return AnimatedMesh(positions, faces, colors, normals, fps, confidence)


def with_texture(mesh: AnimatedMesh, atlas: Atlas, texture: Texture) -> AnimatedMesh:
    """`mesh` cut along the atlas's seams; normals stay those of the uncut surface, so no seam shows."""
    return replace(_of_vertices(mesh, atlas.vertex, atlas.faces), texture=texture)


def _of_vertices(mesh: AnimatedMesh, vertex: Int[np.ndarray, " m"], faces: Int[np.ndarray, "f 3"]) -> AnimatedMesh:
    """`mesh` with copies of some of its vertices, and faces over those; without its texture."""
    return replace(
        mesh,
        positions=mesh.positions[:, vertex],
        normals=mesh.normals[:, vertex],
        colors=mesh.colors[vertex],
        confidence=mesh.confidence[vertex],
        faces=faces,
        texture=None,
    )


def torn_open(mesh: AnimatedMesh, hidden: Bool[np.ndarray, "t f"]) -> AnimatedMesh:
    """`mesh` with faces that some frames do not show.

    Neighbouring faces that the same frames hide get vertices of their own. In those frames each sheet of hidden faces
    has shrunk to one place of the skin around it, so that no format and no viewer needs to know of it.
    """
    torn = np.flatnonzero(hidden.any(axis=0))
    if not len(torn):
        return mesh
    count = mesh.positions.shape[1]
    kinds, kind = np.unique(hidden[:, torn].T, axis=0, return_inverse=True)
    copies, corners = np.unique(kind.reshape(-1, 1).astype(np.int64) * count + mesh.faces[torn], return_inverse=True)
    kind_of, vertex_of = np.divmod(copies, count)
    faces = mesh.faces.copy()
    faces[torn] = count + corners.reshape(-1, 3)
    vertex = np.concatenate([np.arange(count), vertex_of])
    used, faces = np.unique(faces, return_inverse=True)
    positions = mesh.positions[:, vertex]
    # vertices along the texture's seams are doubled: they are one place of the skin
    _, first, place = np.unique(mesh.positions[0], axis=0, return_index=True, return_inverse=True)
    places = place.ravel()[mesh.faces]
    for frame, gone in enumerate(hidden):
        closed = np.flatnonzero(kinds[kind_of, frame])
        if len(closed):
            x = mesh.positions[frame]
            onto = _closing(places[gone], places[~gone], x[first])
            goal = x[first[onto[place.ravel()[vertex_of[closed]]]]]
            positions[frame, count + closed] = goal + CLOSED * (x[vertex_of[closed]] - goal)
    opened = replace(_of_vertices(mesh, vertex[used], faces.reshape(-1, 3)), positions=positions[:, used])
    if mesh.texture is None:
        return opened
    return replace(opened, texture=replace(mesh.texture, uv=mesh.texture.uv[vertex[used]]))


def _closing(
    gone: Int[np.ndarray, "g 3"], shown: Int[np.ndarray, "s 3"], x: Float[np.ndarray, "n 3"]
) -> Int[np.ndarray, " n"]:
    """For each place of hidden faces the one that their sheet closes onto: in the middle of its rim, if it has one.

    Args:
        gone: hidden faces, over places of the skin.
        shown: the others.
        x: where the places are.
    """
    edges = gone.ravel(), np.roll(gone, 1, axis=1).ravel()
    graph = sparse.csr_matrix((np.ones(gone.size), edges), (len(x), len(x)))
    _, sheet = csgraph.connected_components(graph, directed=False)
    held = np.zeros(len(x), dtype=bool)
    held[shown] = True
    rim = np.unique(gone)
    free = np.bincount(sheet[rim], held[rim], len(x)) == 0  # sheets that hang on nothing
    rim = rim[held[rim] | free[sheet[rim]]]
    size = np.maximum(np.bincount(sheet[rim], minlength=len(x)), 1)
    middle = np.stack([np.bincount(sheet[rim], x[rim, i], len(x)) / size for i in range(3)], axis=-1)
    apart = np.linalg.norm(x[rim] - middle[sheet[rim]], axis=-1)
    rim = rim[np.lexsort((apart, sheet[rim]))]
    chosen = np.zeros(len(x), np.int64)
    numbers, nearest = np.unique(sheet[rim], return_index=True)
    chosen[numbers] = rim[nearest]
    return chosen[sheet]
