"""What each export command writes into its folder."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sv4d_ns.export.formats.asset import AnimatedMesh, Placement, grounded, moved_to, placement_of
from sv4d_ns.export.formats.gltf import write_animated_glb
from sv4d_ns.export.formats.points import sample_points
from sv4d_ns.export.formats.sequence import SequenceFormat, stills, write_sequence
from sv4d_ns.export.formats.sequence import write_point_clouds as write_cloud_files
from sv4d_ns.export.formats.splats import Rasterise, refine, sample_splats
from sv4d_ns.export.formats.splats import write_splats as write_splat_files
from sv4d_ns.export.formats.usd import write_usd
from sv4d_ns.export.make import Options, generated_pictures, input_pictures, make_asset, make_frames
from sv4d_ns.export.rig import Skin, decompose
from sv4d_ns.runs.open import FinishedRun

if TYPE_CHECKING:
    from sv4d_ns.export.terminal import Terminal

GLB_NAME = "mesh.glb"
POSTER_AZIMUTH_DEG = 30.0
"""From the input view: the poster shows a side that the video does not."""
SKIN_BOUND = 5e-3
"""Root mean square error of the skinned vertices, as a share of the box's diagonal, at which no bones are added."""

Written = tuple[list[Path], str]


def write_mesh(
    run: FinishedRun,
    mesh: AnimatedMesh,
    folder: Path,
    animation: Literal["morph", "skin"],
    max_bones: int,
    usd: Literal["none", "usdc", "usdz"],
    sequence: Literal["none", "obj", "ply"],
    terminal: "Terminal",
    ground: bool = True,
    height: float | None = None,
) -> Written:
    """The animated mesh as GLB and, on request, as USD and as a file per frame.

    Args:
        mesh: of the run (`make_asset`).
        ground: put the lowest point of the clip at 0.
        height: metres the object is to be tall; None keeps the run's scale.
    """
    placement = grounded(mesh, height, ground)
    mesh = moved_to(mesh, placement)
    extras = _with_clip(run.extras, mesh.num_frames, mesh.fps, placement)
    files = [folder / GLB_NAME]
    if sequence != "none":
        files.append(folder / f"frames_{sequence}")
        with terminal.bar(f"writing .{sequence} frames", mesh.num_frames) as advance:
            write_sequence(stills(mesh), files[-1], sequence, mesh.fps, advance)
    if usd != "none":
        frames = list(stills(replace(mesh, root=None)))
        root = None if mesh.root is None else mesh.root.translation
        files += write_usd(frames, folder / f"mesh.{usd}", run.name, mesh.fps, extras, root)
    skin = _skin(run, mesh, max_bones, terminal, placement.scale) if animation == "skin" else None
    if skin is not None and ground:  # what the bones do not follow exactly would stand in the floor
        lift = -lowest_point(skin, mesh)
        mesh, skin = moved_to(mesh, Placement(1.0, lift)), skin.moved(np.array([0.0, 0.0, lift]))
        extras = _with_clip(run.extras, mesh.num_frames, mesh.fps, replace(placement, lift=placement.lift + lift))
    write_animated_glb(mesh, files[0], run.name, extras, skin)
    seconds = (mesh.num_frames - 1) / mesh.fps
    return files, (
        f"{mesh.num_frames} frames, {seconds:.2f} s. Open {GLB_NAME} in Blender (File > Import > glTF 2.0: it plays so "
        f"at any frame rate of the scene; set that to {mesh.fps:g} fps first if each frame is to be one key) "
        "or drop it on https://gltf-viewer.donmccurdy.com; press play."
    )


def _with_clip(extras: dict[str, Any], frames: int, fps: float, placement: Placement) -> dict[str, Any]:
    """The extras with what a program needs to know about the clip and the coordinates."""
    clip = {
        "frames": frames,
        "fps": fps,
        "seconds": (frames - 1) / fps,
        "note": f"frame i of the film is the key at i / {fps:g} s; keys are in seconds, so it plays at the film's "
        "speed whatever the scene's frame rate is",
    }
    ours = {**extras.get("sv4d", {}), "clip": clip, "placement": placement.described()}
    return {**extras, "sv4d": ours}


def lowest_point(skin: Skin, mesh: AnimatedMesh) -> float:
    """Of a mesh as its skin poses it, over all frames, with its root motion."""
    root = np.zeros(mesh.num_frames) if mesh.root is None else mesh.root.translation[:, 2]
    return float(min(x[:, 2].min() + z for x, z in zip(skin.frames(mesh.positions[0]), root, strict=True)))


def _skin(run: FinishedRun, mesh: AnimatedMesh, max_bones: int, terminal: "Terminal", scale: float) -> Skin:
    """Bones for the mesh; found on unique places, because vertices along texture seams are doubled."""
    low, high = (np.asarray(corner, dtype=float) for corner in run.field.aabb.cpu())
    diagonal = scale * float(np.linalg.norm(high - low))
    everywhere = mesh.positions.swapaxes(0, 1).reshape(mesh.positions.shape[1], -1)
    _, first, copy = np.unique(everywhere, axis=0, return_index=True, return_inverse=True)
    with terminal.bar("finding bones", max_bones) as advance:
        shown = 0

        def count(bones: int, _: float) -> None:
            nonlocal shown
            for _step in range(bones - shown):
                advance()
            shown = bones

        skin = decompose(mesh.positions[:, first], SKIN_BOUND * diagonal, max_bones, count)
    largest = skin.largest_error(mesh.positions[:, first])
    terminal.say(
        f"{skin.num_bones} bones, at most 4 for each vertex; root mean square error of the vertices "
        f"{skin.rmse / diagonal:.3%} of the box's diagonal ({1000 * skin.rmse:.1f} mm), the largest "
        f"{1000 * largest:.1f} mm (--animation morph has none)"
        + ("" if skin.rmse <= SKIN_BOUND * diagonal else f", above {SKIN_BOUND:.1%}: raise --max-bones")
    )
    return skin.taken(copy.ravel())


def write_frames(
    run: FinishedRun,
    options: Options,
    folder: Path,
    file_format: SequenceFormat,
    usd: Literal["none", "usdc", "usdz"],
    terminal: "Terminal",
    ground: bool = True,
    height: float | None = None,
) -> Written:
    """A mesh of its own for every frame; `ground` and `height` as of `write_mesh`."""
    frames = make_frames(run, options, terminal)
    placement = placement_of([frame.positions[:, 2] for frame in frames], height, ground)
    frames = [replace(frame, positions=placement.applied(frame.positions)) for frame in frames]
    fps = options.fps or run.views.fps
    files = [folder / f"frames_{file_format}"]
    write_sequence(frames, files[0], file_format, fps)
    if usd != "none":
        extras = _with_clip(run.extras, len(frames), fps, placement)
        files += write_usd(frames, folder / f"mesh.{usd}", run.name, fps, extras)
    return files, f"{len(frames)} frames at {fps:g} per second, each with its own topology; frame_0000 is the first."


def write_point_clouds(
    run: FinishedRun, options: Options, folder: Path, num_points: int, terminal: "Terminal"
) -> Written:
    """A coloured point cloud per frame."""
    mesh = make_asset(run, replace(options, hide_webs=False), terminal)
    with terminal.bar("writing point clouds", mesh.num_frames) as advance:
        write_cloud_files(sample_points(mesh, num_points), folder / "points", mesh.fps, advance)
    return [folder / "points"], (
        f"{mesh.num_frames} clouds of {num_points} points at {mesh.fps:g} frames per second; point i is the same "
        "place of the surface in all of them."
    )


def write_splats(
    run: FinishedRun, options: Options, folder: Path, num_splats: int, refine_steps: int, terminal: "Terminal"
) -> Written:
    """A Gaussian-splat file per frame."""
    mesh = make_asset(run, replace(options, hide_webs=False), terminal)
    splats = sample_splats(replace(mesh, root=None), num_splats)
    rasterise = _gsplat(run) if refine_steps else None
    if rasterise is None:
        why = "refining them needs a CUDA device and gsplat" if refine_steps else "they are not refined, as asked"
        terminal.say(f"Splats are as sampled from the surface: {why}.")
    else:
        pictures = [*input_pictures(run.views), *generated_pictures(run.views)]
        with terminal.bar("refining splats", refine_steps) as advance:
            splats = refine(splats, pictures, refine_steps, rasterise, str(run.field.aabb.device), advance=advance)
    if mesh.root is not None:
        splats = replace(splats, positions=splats.positions + mesh.root.translation[:, None])
    with terminal.bar("writing splats", mesh.num_frames) as advance:
        write_splat_files(splats, folder / "splats", mesh.fps, advance)
    return [folder / "splats"], (
        f"{mesh.num_frames} frames of {num_splats} Gaussians at {mesh.fps:g} per second, +Y up. SuperSplat plays the "
        "folder as a sequence and turns .ply files by 180 degrees about z: set that rotation to 0."
    )


def _gsplat(run: FinishedRun) -> Rasterise | None:
    """`gsplat.rasterization` where it can run."""
    if run.field.aabb.device.type != "cuda":
        return None
    try:
        from gsplat import rasterization
    except ImportError:
        return None
    return rasterization


def write_web(run: FinishedRun, options: Options, folder: Path, terminal: "Terminal") -> Written:
    """The asset and the input video in one page."""
    return web_files(run, make_asset(run, options, terminal), folder)


def web_files(run: FinishedRun, mesh: AnimatedMesh, folder: Path) -> Written:
    """`write_web` of an asset that is made already."""
    import tempfile

    from sv4d_ns.export.colour.picture import draw
    from sv4d_ns.export.formats.web import POSTER_NAME, POSTER_SIZE, write_page, write_poster
    from sv4d_ns.geometry.cameras import look_at_cameras

    page, poster, views = folder / "index.html", folder / POSTER_NAME, run.views
    with tempfile.TemporaryDirectory() as scratch:
        glb = Path(scratch) / GLB_NAME
        write_animated_glb(mesh, glb, run.name, _with_clip(run.extras, mesh.num_frames, mesh.fps, Placement(1.0, 0.0)))
        write_page(glb, views.input_frames, views.plan, mesh.fps, run.name, page)
    elevation, size = np.array([views.plan.input_elevation_deg]), POSTER_SIZE[0] // 2
    camera = look_at_cameras(np.array([POSTER_AZIMUTH_DEG]), elevation, views.plan.radius)[0]
    write_poster(views.input_frames[0], draw(mesh, 0, camera, views.plan.focal_px(size), size), poster)
    return [page, poster], f"Open {page.absolute().as_uri()} in any browser; it needs no network."
