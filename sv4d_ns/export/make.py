"""From a finished run to an asset: surface, motion, colours; each step says what it found."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from sv4d_ns.export.colour.baking import (
    DepthMaps,
    Picture,
    SurfacePoints,
    confidence,
    filled,
    gather,
    vertices_as_points,
)
from sv4d_ns.export.colour.film import FilmColors, film_colors, levelled, mirrored
from sv4d_ns.export.colour.raster import rasterise
from sv4d_ns.export.colour.texture import Atlas, bake, bake_many, unwrap
from sv4d_ns.export.formats.asset import (
    AnimatedMesh,
    Flipbook,
    RootMotion,
    Texture,
    animated_mesh,
    moments_in,
    torn_open,
    with_texture,
)
from sv4d_ns.export.formats.sequence import Still
from sv4d_ns.export.root_motion import root_motion
from sv4d_ns.export.surface.covering import covered
from sv4d_ns.export.surface.extraction import (
    CanonicalMesh,
    EmptyField,
    OpacityGrid,
    Tracks,
    follow_vertices,
    frozen,
    grown,
    opacity_grid,
    solid_and_level,
    surface_of,
    vertex_graph,
    vertex_normals,
)
from sv4d_ns.export.surface.folds import unfolded, unturned
from sv4d_ns.export.surface.mending import mended, strays
from sv4d_ns.export.surface.outlines import fitted_to_film, fitted_to_outlines
from sv4d_ns.export.surface.registration import FrameSurface, refitted, settled
from sv4d_ns.export.surface.remeshing import Remesh, remeshed
from sv4d_ns.export.surface.silhouettes import completed, silhouettes
from sv4d_ns.export.surface.webs import drawn_in, hidden_webs
from sv4d_ns.geometry.cameras import ViewPlan, look_at_cameras
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.runs.open import FinishedRun
from sv4d_ns.views.grid import ViewGrid

if TYPE_CHECKING:
    from sv4d_ns.export.terminal import Terminal

INPUT_TRUST = 3.0
"""Weight of the input camera against each generated view's when colours are gathered: its pixels are real."""
FIELD_PICTURE_SIZE = 320
"""Pixels along the side of the pictures of the field that its colours are taken from (about one voxel each)."""
UNDER_PICTURE_SIZE = 208
"""The same where the film shows the rest: the field's far sides are no sharper than this, at two fifths of the time."""
CONFIDENCE_EVERY = 2
"""Frames from one to the next whose generated views tell what they saw: what one frame sees, its neighbour does too."""
FIELD_ELEVATIONS_DEG = (-50.0, 0.0, 50.0)
"""Rings of cameras, relative to the input view's elevation, of the pictures of the field."""
FIELD_AZIMUTHS = 6
"""Cameras on each ring."""
NEARLY_BEST = 0.25
"""Share of the best camera's weight at a place from which another camera draws it, too."""
RINGS_BESIDE = 4
"""Rings of vertices, of those the film shows, that the field is drawn at: there the two layers are brought together."""
DRAWN_BESIDE = 3
"""Pixels around those that are wanted that are drawn, too: whether a silhouette is near shows in them."""
FULL_WEIGHT = 0.05
"""Weight from which a texel is what its pictures show: one picture that sees it at 60 degrees."""

FILM_FULL = 0.03
"""Weight from which a place shows the film alone: the sharpest frame sees it at 72 degrees."""
FILM_SILHOUETTE = 0.75
"""Pixels along the film's silhouettes that are not trusted: fewer than of other pictures, for its soft pixels were
given the object's own colours when it was cut out."""
MOMENT_FULL = 0.002
"""The same of a single frame's own picture: it sees the place at 80 degrees, for at its moment and from where it looks
it is right up to its outline, where the dark sides of light objects would show as lines."""
FINE_VIDEO = 384
"""Pixels along the side of the input frames from which a texture has 2048 texels along its own, else 1024: two texels
for each pixel of an object that fills the picture, on either side of it."""

FRAME_RESOLUTION = 96
"""Nodes along the side of the grids that a moving field's surface at each frame is cut from: they correct what followed
its motion, at half the time of 128."""

MOST_MOMENTS = 32
"""Pictures of an animated texture; of a longer clip, neighbouring frames share one."""
LARGEST_SHEET = 16_384
"""Texels along the side of the image that holds them all: more, graphics cards do not take."""

TextureSource = Literal["animated", "film", "views", "field", "none"]


@dataclass(frozen=True)
class Options:
    """What kind of asset to make."""

    resolution: int = 128
    max_faces: int | None = 20_000
    watertight: bool = False
    remesh: Remesh = "none"
    texture: TextureSource = "animated"
    texture_size: int | None = None
    """None: by the video's resolution."""
    fps: float | None = None
    restore_root_motion: bool = False
    hide_webs: bool = True
    """Let faces drawn out over nothing shrink to a point in the frames where they are, which cuts the mesh along their
    rims. False: for bones, which cannot take a face away, for one whole surface, and where points are taken from it."""


def make_asset(run: FinishedRun, options: Options, terminal: "Terminal") -> AnimatedMesh:
    """The run's object as one mesh of fixed topology, coloured or textured, over all frames."""
    root = _restored_motion(run, options, terminal)
    surface, tracks, own = moving_surface(run, options, terminal)
    if not options.hide_webs:
        return replace(colored(run, surface, tracks, options, terminal), root=root)
    shapes = silhouettes(input_pictures(run.views))
    hidden = hidden_webs(surface, tracks.positions, shapes, own, _diagonal(run))
    tracks = replace(tracks, positions=drawn_in(surface, tracks.positions, shapes, hidden))
    mesh = replace(colored(run, surface, tracks, options, terminal), root=root)
    terminal.say(
        f"at most {hidden.mean(axis=1).max():.1%} of the faces are drawn out over nothing in a frame: hidden there"
    )
    return torn_open(mesh, hidden)


def _restored_motion(run: FinishedRun, options: Options, terminal: "Terminal") -> RootMotion | None:
    """The root motion to put back, if that is asked for and there is any."""
    if not options.restore_root_motion:
        return None
    root = root_motion(run.views.framing, run.views.plan, run.views.num_frames)
    if root is None:
        terminal.say("The crop stood still: all motion is in the mesh, there is no root motion to restore.")
    return root


def moving_surface(
    run: FinishedRun, options: Options, terminal: "Terminal"
) -> tuple[CanonicalMesh, Tracks, list[FrameSurface]]:
    """The canonical mesh, where its vertices are at every frame, and the field's own surfaces there."""
    film = input_pictures(run.views)
    grid, solid, level = _solid(run, options.resolution, film[run.canonical_frame], terminal)
    own = _own_surfaces(run, options.resolution, terminal)
    surface = _surface(solid, level, grid, options, terminal)
    tracks = _mended(run, surface, _followed(run, surface, terminal), own, terminal)
    with terminal.bar("fitting the outlines", len(film)) as advance:
        positions = fitted_to_outlines(tracks.positions, surface.faces, film, advance)
    tracks = replace(tracks, positions=positions.astype(np.float32))
    with terminal.bar("fitting what is on them", len(film)) as advance:
        colors = _film_at_vertices(film, tracks.positions, surface.faces)
        positions = fitted_to_film(tracks.positions, surface.faces, film, colors, advance)
    positions = unturned(positions, surface.faces)
    tracks = replace(tracks, positions=positions.astype(np.float32))
    stray = strays(tracks.positions, surface.faces, silhouettes(film))
    if stray.any():
        terminal.say(f"pieces of {stray.mean():.1%} of the vertices left the film's silhouettes; they were dropped")
        surface, tracks = without(surface, tracks, stray)
    return surface, tracks, own


def _own_surfaces(run: FinishedRun, resolution: int, terminal: "Terminal") -> list[FrameSurface]:
    """The field's own surface at every frame."""
    surfaces = []
    with terminal.bar("cutting the frames' own surfaces", run.views.num_frames) as advance:
        for frame in range(run.views.num_frames):
            surfaces.append(_own_surface(run, frame, resolution))
            advance()
    _say_empty([len(one.vertices) for one in surfaces], "the mesh goes where the field's motion says there", terminal)
    return surfaces


def _say_empty(vertices: Sequence[int], what: str, terminal: "Terminal") -> None:
    """Which frames have no vertices, and what becomes of them.

    Raises:
        EmptyField: none has any.
    """
    empty = ", ".join(str(frame) for frame, count in enumerate(vertices) if not count)
    if not any(vertices):
        raise EmptyField("the field shows nothing at any frame; train longer, or check the input video's foreground.")
    if empty:
        terminal.say(f"the field shows nothing at frame {empty}: {what}")


def _own_surface(run: FinishedRun, frame: int, resolution: int) -> FrameSurface:
    """The field's own surface at a frame, only as fine as it helps to correct the motion."""
    try:
        return FrameSurface.of(*surface_at(run, frame, min(resolution, FRAME_RESOLUTION)))
    except EmptyField:
        return FrameSurface.of(np.zeros((0, 3)), np.zeros((0, 3), np.int64))


def without(surface: CanonicalMesh, tracks: Tracks, dropped: Bool[np.ndarray, " n"]) -> tuple[CanonicalMesh, Tracks]:
    """A surface and its way without some vertices and the faces at them."""
    kept = np.flatnonzero(~dropped)
    number = np.zeros(len(dropped), surface.faces.dtype)
    number[kept] = np.arange(len(kept))
    faces = number[surface.faces[~dropped[surface.faces].any(axis=1)]]
    return (
        CanonicalMesh(surface.vertices[kept], faces, surface.dropped_parts + 1),
        Tracks(tracks.positions[:, kept], tracks.residuals[:, kept], tracks.guessed[:, kept]),
    )


def _surface(
    solid: Float[np.ndarray, "r r r"], level: float, grid: OpacityGrid, options: Options, terminal: "Terminal"
) -> CanonicalMesh:
    """The canonical surface with the triangles that were asked for."""
    if options.remesh == "none":
        return surface_of(solid, level, grid, options.max_faces, options.watertight)
    fine = surface_of(solid, level, grid)
    with terminal.bar("making the triangles even", 1) as advance:
        even = remeshed(fine, options.remesh, options.max_faces or len(fine.faces))
        advance()
    return even


def _solid(
    run: FinishedRun, resolution: int, film: Picture, terminal: "Terminal"
) -> tuple[OpacityGrid, Float[np.ndarray, "r r r"], float]:
    """The canonical opacity, the same smoothed and completed by the film's picture, and the level of its surface."""
    possible = run.possible(run.time(run.canonical_frame))
    with terminal.bar("sampling the field", resolution) as advance:
        return _completed_opacity(opacity_grid(run.field, resolution, possible, advance), film)


def _completed_opacity(grid: OpacityGrid, film: Picture) -> tuple[OpacityGrid, Float[np.ndarray, "r r r"], float]:
    """The grid, its opacity smoothed and completed by the film's picture of that moment, and the surface's level."""
    solid, level = solid_and_level(grid)
    return grid, completed(grid, solid, level, film), level


def _followed(run: FinishedRun, surface: CanonicalMesh, terminal: "Terminal") -> Tracks:
    """Where the field's motion alone takes a surface."""
    terminal.say(
        f"{len(surface.vertices)} vertices, {len(surface.faces)} faces, {run.views.num_frames} frames; "
        f"{surface.dropped_parts} floating parts dropped"
    )
    with terminal.bar("following the vertices", run.views.num_frames) as advance:
        return follow_vertices(run.field, surface, run.views.times, advance)


def _mended(
    run: FinishedRun, surface: CanonicalMesh, followed: Tracks, own: Sequence[FrameSurface], terminal: "Terminal"
) -> Tracks:
    """The way of a surface, on the field's own surface of each frame where its motion leaves that."""
    diagonal = _diagonal(run)
    terminal.say(followed.summary())
    tracks, lines = refitted(followed, surface, own, diagonal)
    for line in lines:
        terminal.say(line)
    positions, changed = mended(
        tracks.positions, tracks.guessed, surface.vertices, surface.faces, own, run.canonical_frame, diagonal
    )
    if changed.any():
        terminal.say(
            f"{changed.mean():.2%} of the vertex positions were unknown or off the field's own surface; "
            "their skin was mended"
        )
    positions = covered(positions, surface.faces, own, diagonal)
    positions = settled(positions, surface.faces, own, diagonal)
    positions = unfolded(positions, surface.vertices, surface.faces)
    return replace(tracks, positions=positions.astype(np.float32))


def _diagonal(run: FinishedRun) -> float:
    """Of the field's box, world units."""
    return float((run.field.aabb[1] - run.field.aabb[0]).norm())


def _film_at_vertices(
    film: Sequence[Picture], positions: Float[np.ndarray, "t n 3"], faces: Int[np.ndarray, "f 3"]
) -> Float[np.ndarray, "n 3"]:
    """The vertices' colours as the film shows them, continued where it does not."""
    normals, corners = (
        np.stack([vertex_normals(x, faces) for x in positions]),
        vertices_as_points(faces, positions.shape[1]),
    )
    return filled(*film_colors(film, positions, normals, faces, corners).at_corners, faces)


def surface_at(
    run: FinishedRun, frame: int, resolution: int, max_faces: int | None = None, watertight: bool = False
) -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, "f 3"]]:
    """The field's own surface at a frame, cut, completed and cleaned like the canonical one."""
    time, film = run.time(frame), input_pictures(run.views)[frame]
    sampled = opacity_grid(frozen(run.field, time), resolution, run.possible(time))
    grid, solid, level = _completed_opacity(sampled, film)
    mesh = surface_of(solid, level, grid, max_faces, watertight)
    return mesh.vertices, mesh.faces


# ------------------------------------------------------------------------------------------------------- colours


@dataclass(frozen=True, eq=False)
class Layers:
    """The surface's colours from pictures of it: the film where it saw a place, other pictures elsewhere."""

    under: Callable[[SurfacePoints], tuple[np.ndarray, np.ndarray]]
    """Colours and weights of the other pictures (`baking.gather`)."""
    under_colors: Float[np.ndarray, "n 3"]
    """Of the vertices, everywhere defined."""
    faces: Int[np.ndarray, "f 3"]
    film: FilmColors | None = None
    correction: Float[np.ndarray, "n 3"] | None = None
    """What brings the other layer to the film's level, at the vertices."""

    def at(self, points: SurfacePoints) -> Float[np.ndarray, "k 3"]:
        """sRGB in [0, 1]."""
        if self.film is None or self.correction is None:
            return self._under(points)
        return self._over(points, self.correction, *self.film.at(points))

    def _over(
        self, points: SurfacePoints, correction: np.ndarray, color: np.ndarray, weight: np.ndarray
    ) -> Float[np.ndarray, "k 3"]:
        """The film's colours, the other layer where it has little weight."""
        rest = np.flatnonzero(weight < FILM_FULL)
        some = SurfacePoints(points.face[rest], points.barycentric[rest])
        under = self._under(some) + some.at(correction, self.faces)
        color[rest] = _mixed(color[rest], weight[rest] / FILM_FULL, under)
        return color.clip(0, 1)

    def moments(self, points: SurfacePoints, centres: Sequence[float]) -> Iterator[Float[np.ndarray, "k 3"]]:
        """sRGB in [0, 1] as the film shows it around each moment (a frame's number), else as the whole clip does."""
        assert self.film is not None and self.correction is not None
        looks = self.film.looks(points)
        whole = self._over(points, self.correction, *self.film.agreed(looks))
        reach = float(np.diff(centres).min()) / 2 if len(centres) > 1 else 0.5
        for color, weight in self.film.moments(looks, centres, reach):
            yield _mixed(color, weight / MOMENT_FULL, whole)

    def _under(self, points: SurfacePoints) -> Float[np.ndarray, "k 3"]:
        color, weight = self.under(points)
        return _mixed(color, weight / FULL_WEIGHT, points.at(self.under_colors, self.faces))


def _mixed(over: np.ndarray, share: np.ndarray, under: np.ndarray) -> np.ndarray:
    """`over` where its share is 1, `under` where it is 0, smoothly between."""
    share = np.clip(share, 0, 1)[:, None]
    share = share * share * (3 - 2 * share)
    return share * over + (1 - share) * under


def colored(
    run: FinishedRun, surface: CanonicalMesh, tracks: Tracks, options: Options, terminal: "Terminal"
) -> AnimatedMesh:
    """Vertex colours, confidence and, where asked for, the texture."""
    faces, count = surface.faces, len(surface.vertices)
    plain = animated_mesh(
        tracks.positions, faces, np.zeros((count, 3), np.uint8), np.zeros(count), options.fps or run.views.fps
    )
    corners = vertices_as_points(faces, count)
    depths = DepthMaps(plain.positions, faces)
    sure = _confidence(run.views, plain, corners, depths, terminal)
    layers = _layers(run, surface, plain, corners, depths, options.texture, terminal)
    color = layers.at(corners)
    mesh = replace(plain, colors=np.round(color * 255).astype(np.uint8), confidence=sure)
    if options.texture == "none":
        return mesh
    size = options.texture_size or (2048 if run.views.input_frames.shape[1] >= FINE_VIDEO else 1024)
    frames = run.views.num_frames
    animated = options.texture == "animated" and frames > 1
    with terminal.bar("unwrapping", 1) as advance:
        # the pictures of single frames are half as fine
        atlas = unwrap(surface.vertices, faces, size // 2 * 2 if animated else size)
        advance()
    with terminal.bar("baking the texture", 1) as advance:
        texture = Texture(atlas.uv, bake(atlas, layers.at))
        advance()
    if animated:
        with terminal.bar("baking the texture of each frame", 1) as advance:
            texture = replace(texture, moments=flipbook(atlas, layers, frames))
            advance()
    return with_texture(mesh, atlas, texture)


def flipbook(atlas: Atlas, layers: Layers, frames: int) -> Flipbook:
    """Pictures of moments evenly over the clip, of every frame where it has no more than `MOST_MOMENTS` and their sheet
    is not too large; each half as fine as the atlas, which is about a pixel of the film."""
    most = min(MOST_MOMENTS, moments_in(LARGEST_SHEET // (atlas.size // 2)))
    centres = np.unique(np.linspace(0, frames - 1, min(frames, most)).round())
    half = replace(atlas, size=atlas.size // 2)
    pictures = bake_many(half, lambda points: layers.moments(points, centres.tolist()))
    return Flipbook(np.stack(list(pictures)), np.abs(np.arange(frames)[:, None] - centres).argmin(axis=1))


def _confidence(
    views: ViewGrid, mesh: AnimatedMesh, corners: SurfacePoints, depths: DepthMaps, terminal: "Terminal"
) -> Float[np.ndarray, " n"]:
    """Which cameras saw each vertex."""
    generated = [picture for picture in generated_pictures(views) if picture.frame % CONFIDENCE_EVERY == 0]
    film = input_pictures(views)
    with terminal.bar("who saw what", len(film) + len(generated)) as advance:
        moving = corners, mesh.positions, mesh.normals, mesh.faces, advance
        sure = confidence(gather(film, *moving, depths)[1], gather(generated, *moving)[1])
    shares = ", ".join(
        f"{(sure == value).mean():.0%} {name}" for value, name in ((1, "observed"), (0.5, "generated"), (0, "unseen"))
    )
    terminal.say(f"surface seen by the input camera, by generated views only, by none: {shares}")
    return sure


def _layers(
    run: FinishedRun,
    surface: CanonicalMesh,
    mesh: AnimatedMesh,
    corners: SurfacePoints,
    depths: DepthMaps,
    texture: TextureSource,
    terminal: "Terminal",
) -> Layers:
    """What colours come from."""
    film = None
    shown = np.zeros(len(surface.vertices), dtype=bool)
    if texture in ("film", "none", "animated"):
        film = film_colors(input_pictures(run.views), mesh.positions, mesh.normals, mesh.faces, corners, depths)
        graph = vertex_graph(mesh.faces, len(shown))
        shown = ~grown(graph, film.at_corners[1] < FILM_FULL, RINGS_BESIDE)
    if texture == "views":
        pictures = [*input_pictures(run.views), *generated_pictures(run.views)]
    else:
        with terminal.bar("drawing the field", len(field_cameras(run.views.plan))) as advance:
            size = UNDER_PICTURE_SIZE if film is not None else FIELD_PICTURE_SIZE
            pictures = _field_where(run, mesh, corners, depths, ~shown, size, advance)

    def under(points: SurfacePoints) -> tuple[np.ndarray, np.ndarray]:
        return gather(pictures, points, mesh.positions, mesh.normals, mesh.faces, None, depths)

    color, weight = under(corners)
    if film is not None:  # the field is not drawn where the film shows all; its mirror image may be seen by nobody
        color, weight = np.where(shown[:, None], film.at_corners[0], color), np.where(shown, 1.0, weight)
    color, known = mirrored(surface.vertices, color, weight > 0)
    color = filled(color, np.where(known, np.maximum(weight, 1e-6), 0), mesh.faces)
    if film is None:
        return Layers(under, color, mesh.faces)
    return Layers(under, color, mesh.faces, film, levelled(*film.at_corners, color, mesh.faces))


def _field_where(
    run: FinishedRun,
    mesh: AnimatedMesh,
    corners: SurfacePoints,
    depths: DepthMaps,
    wanted: Bool[np.ndarray, " n"],
    size: int,
    advance: Callable[[], None],
) -> list[Picture]:
    """`field_pictures` of the canonical frame, drawn only where they show wanted vertices as well as any of them does;
    the rest is not believed."""
    frame, plan = run.canonical_frame, run.views.plan
    blank = np.full((size, size, 4), 255, np.uint8)
    seen = [
        gather(
            [Picture(blank, camera, plan.focal_px(1), frame)],
            corners, mesh.positions, mesh.normals, mesh.faces, None, depths,
        )[1]
        for camera in field_cameras(plan)
    ]  # fmt: skip
    best = np.max(seen, axis=0)
    masks, covered = [], []
    for camera, weight in zip(field_cameras(plan), seen, strict=True):
        drawn = rasterise(
            *project_array(mesh.positions[frame], camera, plan.focal_px(size), size), mesh.faces, size
        ).face
        useful = wanted & (weight > NEARLY_BEST * best)
        mask = (drawn >= 0) & useful[mesh.faces].any(axis=1)[drawn]
        masks.append(ndimage.binary_dilation(mask, iterations=DRAWN_BESIDE))
        covered.append(drawn >= 0)
    pictures = field_pictures(run, frame, size, advance, masks)
    return [
        replace(picture, rgba=_completed_alpha(picture.rgba, mask, inside), confidence=255 * mask.astype(np.uint8))
        for picture, mask, inside in zip(pictures, masks, covered, strict=True)
    ]


def _completed_alpha(
    rgba: UInt8[np.ndarray, "s s 4"], drawn: Bool[np.ndarray, "s s"], inside: Bool[np.ndarray, "s s"]
) -> UInt8[np.ndarray, "s s 4"]:
    """The object's own alpha where it was not drawn, so that the edge of what was drawn is no silhouette."""
    alpha = np.where(drawn, rgba[..., 3], np.where(inside, 255, 0))
    return np.concatenate([rgba[..., :3], alpha[..., None].astype(np.uint8)], axis=-1)


def input_pictures(views: ViewGrid) -> list[Picture]:
    """The frames of the input video."""
    camera, focal = views.plan.c2w()[0], views.plan.focal_px(1)
    return [
        Picture(rgba, camera, focal, frame, INPUT_TRUST, silhouette=FILM_SILHOUETTE)
        for frame, rgba in enumerate(views.input_frames)
    ]


def generated_pictures(views: ViewGrid) -> list[Picture]:
    """The generated views at every frame."""
    cameras, focal = views.plan.c2w()[1:], views.plan.focal_px(1)
    return [
        Picture(
            views.novel_views[frame, view],
            cameras[view],
            focal,
            frame,
            confidence=None if views.confidence is None else views.confidence[frame, view],
        )
        for frame in range(views.num_frames)
        for view in range(views.num_views)
    ]


def field_cameras(plan: ViewPlan) -> Float[np.ndarray, "v 4 4"]:
    """Cameras on three rings around the object."""
    azimuths = np.arange(FIELD_AZIMUTHS) * 360.0 / FIELD_AZIMUTHS
    elevations = np.clip(plan.input_elevation_deg + np.array(FIELD_ELEVATIONS_DEG), -80, 80)
    return look_at_cameras(np.tile(azimuths, len(elevations)), np.repeat(elevations, FIELD_AZIMUTHS), plan.radius)


def field_pictures(
    run: FinishedRun,
    frame: int,
    size: int = FIELD_PICTURE_SIZE,
    advance: Callable[[], None] | None = None,
    wanted: Sequence[Bool[np.ndarray, "size size"]] | None = None,
) -> list[Picture]:
    """Renderings of the field at a frame from all sides, `size` pixels along their sides; of the wanted pixels alone.

    The views constrained the colours of whole rays, not of points: the field's colour at the surface itself is the
    outermost, least supervised layer's, and 2 to 3 dB worse than what a rendering shows there.
    """
    from sv4d_ns.field.images import render_rgba

    plan, time = run.views.plan, run.time(frame)
    pictures = []
    for number, camera in enumerate(field_cameras(plan)):
        pixels = None if wanted is None else wanted[number]
        rgba = render_rgba(run.field, run.occupancy, camera, plan.focal_px(size), size, time, pixels)
        pictures.append(Picture(rgba, camera, plan.focal_px(1), frame))
        if advance is not None:
            advance()
    return pictures


# --------------------------------------------------------------------------------------------- a mesh for each frame


EMPTY_STILL = Still(
    np.zeros((0, 3)), np.zeros((0, 3), np.int32), np.zeros((0, 3)), np.zeros((0, 3), np.uint8), np.zeros(0)
)


def make_frames(run: FinishedRun, options: Options, terminal: "Terminal") -> list[Still]:
    """The field's own surface at every frame, coloured by the pictures of that frame (or of the field at it)."""
    frames = []
    root = _restored_motion(run, options, terminal)
    with terminal.bar("cutting frames", run.views.num_frames) as advance:
        for frame in range(run.views.num_frames):
            try:
                vertices, faces = surface_at(run, frame, options.resolution, options.max_faces, options.watertight)
                still = _colored_still(run, frame, vertices, faces, options.texture == "views")
            except EmptyField:
                still = EMPTY_STILL
            place = 0 if root is None else root.translation[frame]
            frames.append(replace(still, positions=still.positions + place))
            advance()
    _say_empty([len(still.positions) for still in frames], "it has no mesh there", terminal)
    terminal.say(f"{sum(len(frame.faces) for frame in frames)} faces in {len(frames)} frames")
    return frames


def _colored_still(run: FinishedRun, frame: int, vertices: np.ndarray, faces: np.ndarray, from_views: bool) -> Still:
    """One frame's surface with vertex colours; meshes of different topology cannot share a texture."""
    normals = vertex_normals(vertices, faces)
    corners = vertices_as_points(faces, len(vertices))

    def gathered(pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        here = [replace(picture, frame=0) for picture in pictures]
        return gather(here, corners, vertices[None], normals[None], faces)

    observed = [picture for picture in input_pictures(run.views) if picture.frame == frame]
    generated = [picture for picture in generated_pictures(run.views) if picture.frame == frame]
    pictures = [*observed, *generated] if from_views else field_pictures(run, frame)
    color = filled(*gathered(pictures), faces)
    sure = confidence(gathered(observed)[1], gathered(generated)[1])
    return Still(vertices, faces, normals, np.round(color * 255).astype(np.uint8), sure)
