"""From a finished run to an asset: surface, motion, colours; each step says what it found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from sv4d_ns.export.colour.baking import Picture, SurfacePoints, confidence, filled, gather, vertices_as_points
from sv4d_ns.export.colour.texture import bake, unwrap
from sv4d_ns.export.formats.asset import AnimatedMesh, RootMotion, animated_mesh, with_texture
from sv4d_ns.export.formats.sequence import Still
from sv4d_ns.export.root_motion import root_motion
from sv4d_ns.export.surface.extraction import (
    CanonicalMesh,
    Tracks,
    canonical_mesh,
    follow_vertices,
    frozen,
    opacity_grid,
    vertex_normals,
)
from sv4d_ns.export.surface.registration import refitted, registered, without_strays
from sv4d_ns.geometry.cameras import ViewPlan, look_at_cameras
from sv4d_ns.runs.open import FinishedRun
from sv4d_ns.views.grid import ViewGrid

if TYPE_CHECKING:
    from sv4d_ns.export.terminal import Terminal

INPUT_TRUST = 3.0
"""Weight of the input camera against each generated view's when colours are gathered: its pixels are real."""
FIELD_PICTURE_SIZE = 320
"""Pixels along the side of the pictures of the field that its colours are taken from (about one voxel each)."""
FIELD_ELEVATIONS_DEG = (-50.0, 0.0, 50.0)
"""Rings of cameras, relative to the input view's elevation, of the pictures of the field."""
FIELD_AZIMUTHS = 6
"""Cameras on each ring."""
FULL_WEIGHT = 0.05
"""Weight from which a texel is what its pictures show: one picture that sees it at 60 degrees."""

TextureSource = Literal["views", "field", "none"]


@dataclass(frozen=True)
class Options:
    """What kind of asset to make."""

    resolution: int = 128
    max_faces: int | None = 20_000
    watertight: bool = False
    texture: TextureSource = "field"
    texture_size: int = 1024
    fps: float | None = None
    restore_root_motion: bool = False


def make_asset(run: FinishedRun, options: Options, terminal: "Terminal") -> AnimatedMesh:
    """The run's object as one mesh of fixed topology, coloured or textured, over all frames."""
    root = _restored_motion(run, options, terminal)
    surface, tracks = moving_surface(run, options, terminal)
    mesh = colored(run, surface, tracks, options, terminal)
    return replace(mesh, root=root)


def _restored_motion(run: FinishedRun, options: Options, terminal: "Terminal") -> RootMotion | None:
    """The root motion to put back, if that is asked for and there is any."""
    if not options.restore_root_motion:
        return None
    root = root_motion(run.views.framing, run.views.plan, run.views.num_frames)
    if root is None:
        terminal.say("The crop stood still: all motion is in the mesh, there is no root motion to restore.")
    return root


def moving_surface(run: FinishedRun, options: Options, terminal: "Terminal") -> tuple[CanonicalMesh, Tracks]:
    """The canonical mesh and where its vertices are at every frame."""
    first, frames = run.canonical_frame, run.views.num_frames
    # the canonical shape has a time of its own, which need not be a frame's to the last digit
    still = run.field if run.deforms else frozen(run.field, run.time(first))
    with terminal.bar("sampling the field", options.resolution) as advance:
        grid = opacity_grid(still, options.resolution, run.possible(run.time(first)), advance)
    surface = canonical_mesh(grid, options.max_faces, options.watertight)
    terminal.say(
        f"{len(surface.vertices)} vertices, {len(surface.faces)} faces, {frames} frames; "
        f"{surface.dropped_parts} floating parts dropped"
    )
    diagonal = float(np.linalg.norm(grid.high - grid.low))

    def own_surface(frame: int) -> tuple[np.ndarray, np.ndarray]:
        return surface_at(run, frame, options.resolution)

    if not run.deforms:
        with terminal.bar("fitting the frames", frames) as advance:
            tracks = registered(surface, first, frames, own_surface, diagonal, advance)
        terminal.say(
            "this run's field has no deformation: its mesh is fitted to each frame's own surface, to "
            f"{tracks.residuals.mean():.3%} of the box's diagonal on average; --mode sequence writes those surfaces"
        )
        return surface, tracks
    with terminal.bar("following the vertices", frames) as advance:
        tracks = follow_vertices(run.field, surface, run.views.times, advance)
    terminal.say(tracks.summary())
    tracks, lines = refitted(tracks, surface, own_surface, diagonal)
    for line in lines:
        terminal.say(line)
    with terminal.bar("comparing with the field", frames) as advance:
        tracks, strays = without_strays(tracks, surface, own_surface, diagonal, advance)
    if strays:
        terminal.say(
            f"{strays:.2%} of the vertex positions would stand where the field shows nothing at their frame; "
            "they were drawn below its surface"
        )
    return surface, tracks


def surface_at(
    run: FinishedRun, frame: int, resolution: int, max_faces: int | None = None, watertight: bool = False
) -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, "f 3"]]:
    """The field's own surface at a frame, cut and cleaned like the canonical one."""
    time = run.time(frame)
    mesh = canonical_mesh(opacity_grid(frozen(run.field, time), resolution, run.possible(time)), max_faces, watertight)
    return mesh.vertices, mesh.faces


# ------------------------------------------------------------------------------------------------------- colours


def colored(
    run: FinishedRun, surface: CanonicalMesh, tracks: Tracks, options: Options, terminal: "Terminal"
) -> AnimatedMesh:
    """Vertex colours, confidence and, where asked for, the texture."""
    faces, count = surface.faces, len(surface.vertices)
    plain = animated_mesh(
        tracks.positions, faces, np.zeros((count, 3), np.uint8), np.zeros(count), options.fps or run.views.fps
    )
    observed, generated = input_pictures(run.views), generated_pictures(run.views)
    pictures = [*observed, *generated]
    if options.texture != "views":
        with terminal.bar("drawing the field", len(field_cameras(run.views.plan))) as advance:
            pictures = field_pictures(run, run.canonical_frame, advance)

    def gathered(
        pictures: Sequence[Picture], points: SurfacePoints, advance: Callable[[], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return gather(pictures, points, plain.positions, plain.normals, faces, advance)

    corners = vertices_as_points(faces, count)
    with terminal.bar("colouring the vertices", len(observed) + len(generated) + len(pictures)) as advance:
        sure = confidence(gathered(observed, corners, advance)[1], gathered(generated, corners, advance)[1])
        color = filled(*gathered(pictures, corners, advance), faces)
    shares = ", ".join(
        f"{(sure == value).mean():.0%} {name}" for value, name in ((1, "observed"), (0.5, "generated"), (0, "unseen"))
    )
    terminal.say(f"surface seen by the input camera, by generated views only, by none: {shares}")
    mesh = replace(plain, colors=np.round(color * 255).astype(np.uint8), confidence=sure)
    if options.texture == "none":
        return mesh
    with terminal.bar("unwrapping", 1) as advance:
        atlas = unwrap(surface.vertices, faces, options.texture_size)
        advance()
    with terminal.bar("baking the texture", len(pictures)) as advance:
        image = bake(atlas, lambda points: gathered(pictures, points, advance), color, FULL_WEIGHT)
    return with_texture(mesh, atlas, image)


def input_pictures(views: ViewGrid) -> list[Picture]:
    """The frames of the input video."""
    camera, focal = views.plan.c2w()[0], views.plan.focal_px(1)
    return [Picture(rgba, camera, focal, frame, INPUT_TRUST) for frame, rgba in enumerate(views.input_frames)]


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


def field_pictures(run: FinishedRun, frame: int, advance: Callable[[], None] | None = None) -> list[Picture]:
    """Renderings of the field at a frame from all sides.

    The views constrained the colours of whole rays, not of points: the field's colour at the surface itself is the
    outermost, least supervised layer's, and 2 to 3 dB worse than what a rendering shows there.
    """
    from sv4d_ns.field.images import render_rgba

    plan, size, time = run.views.plan, FIELD_PICTURE_SIZE, run.time(frame)
    pictures = []
    for camera in field_cameras(plan):
        rgba = render_rgba(run.field, run.occupancy, camera, plan.focal_px(size), size, time)
        pictures.append(Picture(rgba, camera, plan.focal_px(1), frame))
        if advance is not None:
            advance()
    return pictures


# --------------------------------------------------------------------------------------------- a mesh for each frame


def make_frames(run: FinishedRun, options: Options, terminal: "Terminal") -> list[Still]:
    """The field's own surface at every frame, coloured by the pictures of that frame (or of the field at it)."""
    frames = []
    root = _restored_motion(run, options, terminal)
    with terminal.bar("cutting frames", run.views.num_frames) as advance:
        for frame in range(run.views.num_frames):
            vertices, faces = surface_at(run, frame, options.resolution, options.max_faces, options.watertight)
            still = _colored_still(run, frame, vertices, faces, options.texture == "views")
            frames.append(still if root is None else replace(still, positions=vertices + root.translation[frame]))
            advance()
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
